"""The torch.library ops between the linear layers of a decoder, for inference: each is one GPU kernel.

Here are their definitions, in PyTorch, which run wherever there is no kernel. Everything is computed in fp32 (fp64 for
fp64 inputs) and rounded once, to the dtype of the activations. B sequences, T tokens, H query heads, G key/value heads,
S positions of a cache, D numbers per head. Ops write into the cache, whose positions are read from memory: nothing on
the host knows how long a sequence is, so a CUDA graph of them serves every length.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.errors import see
from lowbit.kernels.cache_layout import check_heads
from lowbit.kernels.cpu import native
from lowbit.kernels.cuda import decode_attention as cuda_attention
from lowbit.kernels.cuda import hadamard as cuda_hadamard
from lowbit.kernels.hadamard import transformed
from lowbit.kernels.select import triton_missing

_LIB = torch.library.Library("lowbit", "FRAGMENT")
_LIB.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_LIB.define("add_rms_norm(Tensor x, Tensor y, Tensor weight, float eps) -> (Tensor, Tensor)")
_LIB.define("silu_mul(Tensor gate_up) -> Tensor")
_LIB.define("hadamard(Tensor x, Tensor? signs=None, bool inverse=False) -> Tensor")
_LIB.define("gemv(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_ROPE = (
    "Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor positions, Tensor cos, Tensor sin, Tensor? q_norm,"
    " Tensor? k_norm, float eps, SymInt heads"
)
_LIB.define(f"rope_write({_ROPE}) -> Tensor")
_LIB.define(f"decode_attention({_ROPE}, Tensor(c!) arrived) -> Tensor")
_LIB.define(
    "take_greedy(Tensor logits, Tensor(a!) token, Tensor(b!) positions, Tensor(c!) ids, Tensor(d!) arrived,"
    " SymInt step) -> ()"
)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, _rms_norm(total, weight, eps)


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _hadamard(x: Tensor, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Rows of `x (..., K)` turned by the orthogonal R = diag(signs) T, or back by R^T; T is a Hadamard transform.

    Online rotations of QuaRot (Ashkboos et al., arXiv:2404.00456, section 4) and, on both sides of a weight, the
    incoherence processing of QuIP# (Tseng et al., arXiv:2402.04396, section 3).

    Args:
        x: bf16, fp16, fp32 or fp64; the result has its dtype. Sums are in fp32, or fp64.
        signs: int8 `(K,)` of 1 and -1, or None for ones.
        inverse: R^T instead of R.

    Raises:
        TypeError: x is no float tensor, or signs are not int8.
        ValueError: sizes or devices differ.
    """
    _check_hadamard(x, signs)
    return transformed(x, signs, inverse)


def _hadamard_cpu(x: Tensor, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    _check_hadamard(x, signs)
    return native.hadamard(x, signs, inverse)


def _hadamard_cuda(x: Tensor, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    _check_hadamard(x, signs)
    if x.numel() and cuda_hadamard.why_not(x) is None:
        return cuda_hadamard.hadamard(x, signs, inverse)
    return _on_gpu(_hadamard, "hadamard")(x, signs, inverse)  # type: ignore[no-any-return]


def _check_hadamard(x: Tensor, signs: Tensor | None) -> None:
    if not x.is_floating_point() or x.dtype.itemsize == 1 or (signs is not None and signs.dtype != torch.int8):
        raise TypeError(
            f"lowbit.hadamard: x must be bf16, fp16, fp32 or fp64 and signs int8, got {x.dtype} and "
            f"{None if signs is None else signs.dtype}" + see("input-mismatch")
        )
    if x.dim() == 0 or not x.shape[-1]:
        raise ValueError(f"lowbit.hadamard: x must have numbers in a row, got {tuple(x.shape)}" + see("input-mismatch"))
    if signs is not None and (signs.shape != x.shape[-1:] or signs.device != x.device):
        raise ValueError(
            f"lowbit.hadamard: rows of {x.shape[-1]} on {x.device} take as many signs, got {tuple(signs.shape)} on "
            f"{signs.device}" + see("input-mismatch")
        )


def _hadamard_fake(x: Tensor, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    _check_hadamard(x, signs)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _hadamard_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, signs, ctx.inverse = inputs
    ctx.save_for_backward(signs)


def _hadamard_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    """The transpose of an orthogonal matrix is its inverse."""
    return torch.ops.lowbit.hadamard(grad, ctx.saved_tensors[0], not ctx.inverse), None, None


def _gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _rope_write(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    """Queries `(B, T, H, D)`, normed and rotated; keys, too, and values are written into the cache.

    Args:
        qkv: `(B, T, (H + 2 G) D)` queries, keys and values, heads side by side.
        keys, values: a layer's cache, `(B, G, S, D)`.
        positions: int32 `(B,)`, the places of the first of the T tokens.
        cos, sin: fp32 `(S, D / 2)` of every position's angles.
        q_norm, k_norm: `(D,)` weights of RMSNorm over each head, or None.
    """
    check_heads(qkv, keys, heads)
    batch, tokens, _ = qkv.shape
    _, groups, _, d = keys.shape
    x = qkv.view(batch, tokens, -1, d)
    turning, v = _wide(x[:, :, : heads + groups]), x[:, :, heads + groups :]
    if q_norm is not None and k_norm is not None:
        q, k = turning.split([heads, groups], dim=2)
        q, k = F.rms_norm(q, (d,), q_norm.to(q.dtype), eps), F.rms_norm(k, (d,), k_norm.to(k.dtype), eps)
        turning = torch.cat((q, k), dim=2)
    starts = positions.tolist()
    if min(starts) == max(starts):  # sequences of one length are the rule
        spans = [(slice(None), slice(starts[0], starts[0] + tokens))]
    else:
        spans = [(slice(i, i + 1), slice(start, start + tokens)) for i, start in enumerate(starts)]
    c, s = (torch.stack([table[span, None] for _, span in spans]) for table in (cos, sin))
    a, b = turning.chunk(2, dim=-1)
    turned = torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(qkv.dtype)
    for rows, span in spans:
        keys[rows, :, span] = turned[rows, :, heads:].transpose(1, 2)
        values[rows, :, span] = v[rows].transpose(1, 2)
    return turned[:, :, :heads].contiguous()


def _decode_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, heads: int, arrived: Tensor,
) -> Tensor:  # fmt: skip
    """Attention of T new tokens `qkv (B, T, (H + 2 G) D)` over the cache, themselves and those before: `(B, T, H D)`.

    Arguments are those of `rope_write`; `arrived` is int32 `(B G,)` of zeros that the kernel counts in.
    """
    q = _rope_write(qkv, keys, values, positions, cos, sin, q_norm, k_norm, eps, heads)
    batch, tokens = qkv.shape[:2]
    places, mask = positions.tolist(), None
    end = max(places) + tokens
    if min(places) + 1 < end:
        last = positions[:, None] + torch.arange(tokens, device=qkv.device)
        mask = (torch.arange(end, device=qkv.device) <= last[:, :, None])[:, None]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys[:, :, :end], values[:, :, :end], attn_mask=mask, enable_gqa=heads > keys.shape[1]
    )
    return y.transpose(1, 2).reshape(batch, tokens, -1)


def _take_greedy(logits: Tensor, token: Tensor, positions: Tensor, ids: Tensor, arrived: Tensor, step: int) -> None:
    """Make the most likely token of every sequence its newest.

    Args:
        logits: `(B, V)`; of equal ones the first wins.
        token: int64 `(B,)`, which becomes the new tokens.
        positions: int32 `(B,)`, moved on by `step` to the places of these.
        ids: int64 `(B, S)`, which holds every sequence.
        arrived: int32 of at least B zeros, which the kernel counts in.
    """
    token.copy_(logits.argmax(-1))
    positions += step
    ids.scatter_(1, positions.long()[:, None], token[:, None])


# On a GPU ----------------------------------------------------------------------------------------


def _on_gpu(definition: Callable[..., Any], module: str) -> Callable[..., Any]:
    """The kernel of the same name in `lowbit.kernels.triton`, or the definition where Triton is not installed."""
    name = definition.__name__.lstrip("_")

    def run(*args: Any) -> Any:
        if triton_missing():
            return definition(*args)
        return getattr(importlib.import_module(f"lowbit.kernels.triton.{module}"), name)(*args)

    return run


def _decode_attention_cuda(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, heads: int, arrived: Tensor,
) -> Tensor:  # fmt: skip
    where = (qkv, keys, values, positions, cos, sin, q_norm, k_norm, eps, heads)
    if cuda_attention.why_not(qkv, keys, values, q_norm, k_norm, heads) is None:
        return cuda_attention.decode_attention(*where)
    return _on_gpu(_decode_attention, "decode_attention")(*where, arrived)  # type: ignore[no-any-return]


# What comes out, for torch.compile ---------------------------------------------------------------


def _like(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _two_like(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _half_as_wide(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _gemv_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _rope_fake(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    check_heads(qkv, keys, heads)
    return qkv.new_empty(*qkv.shape[:-1], heads, keys.shape[3])


def _attention_fake(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, heads: int, arrived: Tensor,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(*qkv.shape[:2], heads * keys.shape[3])


def _nothing(logits: Tensor, token: Tensor, positions: Tensor, ids: Tensor, arrived: Tensor, step: int) -> None:
    pass


for _name, _definition, _module, _fake in (
    ("rms_norm", _rms_norm, "between", _like),
    ("add_rms_norm", _add_rms_norm, "between", _two_like),
    ("silu_mul", _silu_mul, "between", _half_as_wide),
    ("gemv", _gemv, "gemv", _gemv_fake),
    ("rope_write", _rope_write, "between", _rope_fake),
    ("take_greedy", _take_greedy, "greedy", _nothing),
):
    _LIB.impl(_name, _definition, "CompositeExplicitAutograd")
    _LIB.impl(_name, _on_gpu(_definition, _module), "CUDA")
    torch.library.register_fake(f"lowbit::{_name}", _fake, lib=_LIB)

_LIB.impl("decode_attention", _decode_attention, "CompositeExplicitAutograd")
_LIB.impl("decode_attention", _decode_attention_cuda, "CUDA")
torch.library.register_fake("lowbit::decode_attention", _attention_fake, lib=_LIB)
_LIB.impl("hadamard", _hadamard, "CompositeExplicitAutograd")
_LIB.impl("hadamard", _hadamard_cpu, "CPU")
_LIB.impl("hadamard", _hadamard_cuda, "CUDA")
torch.library.register_fake("lowbit::hadamard", _hadamard_fake, lib=_LIB)
torch.library.register_autograd("lowbit::hadamard", _hadamard_backward, setup_context=_hadamard_setup, lib=_LIB)

hadamard: Callable[..., Tensor] = torch.ops.lowbit.hadamard.default
rms_norm: Callable[..., Tensor] = torch.ops.lowbit.rms_norm.default
add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = torch.ops.lowbit.add_rms_norm.default
silu_mul: Callable[..., Tensor] = torch.ops.lowbit.silu_mul.default
gemv: Callable[..., Tensor] = torch.ops.lowbit.gemv.default
rope_write: Callable[..., Tensor] = torch.ops.lowbit.rope_write.default
decode_attention: Callable[..., Tensor] = torch.ops.lowbit.decode_attention.default
take_greedy: Callable[..., None] = torch.ops.lowbit.take_greedy.default
