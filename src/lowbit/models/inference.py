"""A `Llama` as it runs for generation: the model's own modules, with one op for everything between two linear layers.

A layer with quantized weights is seven kernels for one new token (norm, qkv, attention, o, norm, gate and up with SiLU,
down), nine for a prompt. Where activations are quantized as well, norms and SiLU hand over codes, and only the inputs
of o (and of down, for few tokens) need a kernel of their own.
`Session` keeps what they need from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import decoder_ops as ops
from lowbit import operand_ops
from lowbit.kernels.problem import Problem, arch_of, early_launches, is_batch_invariant
from lowbit.models import fuse
from lowbit.models.llama import MLP, Attention, DecoderLayer, KVCache, Llama, RMSNorm, added_up
from lowbit.models.ranks import Ranks
from lowbit.ops import fuses_silu_mul, linear_of_operand, linear_silu_mul, operand_dtype
from lowbit.tensor import QuantizedTensor

#: That pass an MLP at once.
TOKENS = 8192
#: New tokens of a sequence that pass the model at once, behind those in the cache: what the attention's kernel takes.
MOST_NEW = 16


@dataclass(frozen=True)
class Quantized:
    """What a layer reads, already quantized: the operand `(B, T, K)`, its row scales, and the dtype of the results."""

    operand: Tensor
    row_scale: Tensor
    dtype: torch.dtype


class State:
    """Where a batch of sequences stands: its cache, and what a step reads and writes, all on the model's device.

    Attributes:
        cache: keys and values.
        ids: `(B, capacity + 1)` int64: prompts, and every token since.
        token: `(B,)` int64, the newest, which the next step reads.
        positions: `(B,)` int32, its places.
        cos, sin: fp32 `(capacity, head_dim / 2)`, the rotary angles of every position.
        arrived: int32 `(B G,)`, zeros between two calls of the kernels that count in them.
    """

    def __init__(self, model: Llama, batch: int, capacity: int) -> None:
        self.cache: KVCache = model.new_cache(batch, capacity)
        device = self.cache.keys.device
        self.ids = torch.zeros(batch, capacity + 1, dtype=torch.int64, device=device)
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, dtype=torch.int32, device=device)
        cos, sin = model.model.rotary_emb(torch.arange(capacity, device=device), torch.float32)
        half = model.config.head_dim // 2
        self.cos, self.sin = cos[:, :half].contiguous(), sin[:, :half].contiguous()
        self.arrived = torch.zeros(batch * model.config.num_kv_heads, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Of everything that is kept."""
        kept = (self.ids, self.token, self.positions, self.cos, self.sin, self.arrived)
        return self.cache.nbytes + sum(t.numel() * t.element_size() for t in kept)

    def take_greedy(self, logits: Tensor, step: int) -> None:
        """Make the most likely tokens by `logits (B, V)` the newest, `step` places behind the ones before."""
        ops.take_greedy(logits, self.token, self.positions, self.ids, self.arrived, step)

    def take(self, token: Tensor, step: int) -> None:
        """Make `token (B,)` the newest, `step` places behind the one before."""
        self.token.copy_(token)
        self.positions += step
        self.ids.scatter_(1, self.positions.long()[:, None], token[:, None])


def forward(model: Llama, ids: Tensor, state: State) -> Tensor:
    """Logits `(B, V)` behind the last of the tokens `ids (B, T)`, which go into the cache at `state.positions`.

    More than one token has to be the beginning of its sequence.
    """
    x, change = _layers(model, ids, state, begins=ids.shape[1] > 1)
    if ids.shape[1] > 1:
        x, change = x[:, -1:], None if change is None else change[:, -1:].contiguous()
    return _logits(model, x, change)[:, 0]


def forward_new(model: Llama, ids: Tensor, state: State) -> Tensor:
    """Logits `(B, T, V)` behind each of the new tokens `ids (B, T)`, which go into the cache at `state.positions`.

    They follow what is in the cache there; at most `MOST_NEW`. In `batch_invariant()` every token has the bits that it
    would have alone: what does not promise that (attention, layers that are not quantized) takes one after the other.
    """
    return _logits(model, *_layers(model, ids, state, begins=False))


def _layers(model: Llama, ids: Tensor, state: State, begins: bool) -> tuple[Tensor, Tensor | None]:
    """The residual stream behind all layers, and what has yet to be added to it, of which every rank has a part."""
    decoder = model.model
    x, change = decoder.embed_tokens(ids), None
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        x, h = _normed(x, change, layer.input_layernorm, readers_of(layer.self_attn), model.ranks)
        change = _attention(layer.self_attn, h, state, i, begins)
        # Longer prompts pass the MLP in parts.
        readers = readers_of(layer.mlp) if ids.numel() <= TOKENS else ()
        x, h = _normed(x, change, layer.post_attention_layernorm, readers, model.ranks)
        change = _mlp(layer.mlp, h)
    return x, change


def _logits(model: Llama, x: Tensor, change: Tensor | None) -> Tensor:
    _, h = _normed(x, change, model.model.norm, (model.lm_head,), model.ranks)
    logits = linear(model.lm_head, h)
    return logits if model.ranks is None else model.ranks.gather(logits)


def readers_of(owner: Attention | MLP) -> tuple[nn.Module, ...]:
    """The layers that read what is normed before an attention or an MLP."""
    joint, parts = fuse.ATTENTION if isinstance(owner, Attention) else fuse.MLP
    fused = getattr(owner, joint)
    return (fused,) if fused is not None else tuple(owner.get_submodule(part) for part in parts)


def _normed(
    x: Tensor, change: Tensor | None, norm: RMSNorm, readers: Sequence[nn.Module], ranks: Ranks | None
) -> tuple[Tensor, Tensor | Quantized]:
    """The residual stream with `change` added to it, and the same normed, quantized where the readers take that.

    Args:
        ranks: that have to add up their `change` first.
    """
    how = _wanted(readers, x)
    if how is None and change is not None and ranks is not None:
        return ranks.add_rms_norm(x, change, norm.weight, norm.eps)
    change = None if change is None else added_up(change, ranks)
    if how is not None:
        if change is None:
            return x, Quantized(*operand_ops.rms_norm_quantized(x, norm.weight, norm.eps, *how), x.dtype)
        total, operand, row_scale = operand_ops.add_rms_norm_quantized(x, change, norm.weight, norm.eps, *how)
        return total, Quantized(operand, row_scale, x.dtype)
    if change is None:
        return x, ops.rms_norm(x, norm.weight, norm.eps)
    return ops.add_rms_norm(x, change, norm.weight, norm.eps)


def _problem(w: QuantizedTensor, like: Tensor, dtype: torch.dtype) -> Problem:
    """That a layer poses for as many tokens as `like (B, T, ...)` has, in activations of `dtype`."""
    what = (w.out_features, w.in_features, w.format.spec, w.act_spec)
    return Problem(like.shape[0] * like.shape[1], *what, dtype, like.device.type, arch_of(like.device))


def _wanted(readers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor | None, str, torch.dtype] | None:
    """How the input of all of these layers is to be quantized, for the tokens and in the dtype of `x`.

    None if one of them takes it as it is.
    """
    found: set[tuple[str, torch.dtype]] = set()
    scales: list[Tensor | None] = []
    for module in readers:
        w = getattr(module, "weight", None)
        if type(module) is not nn.Linear or not isinstance(w, QuantizedTensor) or not w.act_spec or _is_watched(module):
            return None
        dtype = operand_dtype(_problem(w, x, x.dtype))
        if dtype is None:
            return None
        found.add((w.act_spec, dtype))
        scales.append(w.act_scale)
    # Calibrated scales are compared by identity: their values are on the device.
    if len(found) != 1 or any(s is not scales[0] for s in scales):
        return None
    return scales[0], *found.pop()


def _attention(a: Attention, h: Tensor | Quantized, state: State, layer: int, begins: bool) -> Tensor:
    qkv = _joint(a, h)
    batch, tokens, _ = qkv.shape
    keys, values = state.cache.keys[layer], state.cache.values[layer]
    q_norm = a.q_norm.weight if isinstance(a.q_norm, RMSNorm) else None
    k_norm = a.k_norm.weight if isinstance(a.k_norm, RMSNorm) else None
    eps = a.q_norm.eps if isinstance(a.q_norm, RMSNorm) else 0.0
    heads = a.groups * keys.shape[1]
    where, rest = (keys, values), (state.cos, state.sin, q_norm, k_norm, eps, heads)
    if begins:
        q = ops.rope_write(qkv, *where, state.positions, *rest)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys[:, :, :tokens], values[:, :, :tokens], is_causal=True, enable_gqa=a.groups > 1
        )
        y = y.transpose(1, 2)
    elif tokens > 1 and is_batch_invariant():
        # Each looks at what the one ahead of it has written into the cache, and so may not begin before its end.
        with early_launches(False):
            parts = enumerate(qkv.split(1, dim=1))
            each = [ops.decode_attention(x, *where, state.positions + t, *rest, state.arrived) for t, x in parts]
            y = torch.cat(each, dim=1)
    else:
        y = ops.decode_attention(qkv, *where, state.positions, *rest, state.arrived)
    return linear(a.o_proj, y.reshape(batch, tokens, -1))


def _mlp(mlp: MLP, h: Tensor | Quantized) -> Tensor:
    """Gate and up are several times as wide as what goes in: long prompts pass some thousand tokens at a time."""
    if isinstance(h, Tensor) and h.shape[0] * h.shape[1] > TOKENS:
        parts = h.view(1, -1, h.shape[-1]).split(TOKENS, dim=1)
        return torch.cat([_mlp(mlp, part) for part in parts], dim=1).view(h.shape)
    fused = mlp.gate_up_proj
    if type(fused) is nn.Linear and isinstance(w := fused.weight, QuantizedTensor) and not _is_watched(fused):
        given = h if isinstance(h, Tensor) else h.operand
        if fuses_silu_mul(_problem(w, given, h.dtype)):
            return linear(mlp.down_proj, _gated(fused, w, h))
    gate_up = _joint(mlp, h)
    how = _wanted((mlp.down_proj,), gate_up)
    if how is not None:
        return linear(mlp.down_proj, Quantized(*operand_ops.silu_mul_quantized(gate_up, *how), gate_up.dtype))
    return linear(mlp.down_proj, ops.silu_mul(gate_up))


def _gated(module: nn.Linear, w: QuantizedTensor, h: Tensor | Quantized) -> Tensor:
    if isinstance(h, Quantized):
        return _of_operand(module, w, h, gated=True)
    what = (w.format.spec, w.act_spec, w.out_features, w.in_features)
    return linear_silu_mul(h, list(w.planes.values()), module.bias, w.act_scale, *what)


def _joint(owner: Attention | MLP, x: Tensor | Quantized) -> Tensor:
    """What the joint projection gives, or the separate ones side by side."""
    done = [linear(module, x) for module in readers_of(owner)]
    return done[0] if len(done) == 1 else torch.cat(done, dim=-1)


def linear(module: nn.Module, x: Tensor | Quantized) -> Tensor:
    """The module's result; for one token and a plain weight on a GPU, by the kernel that is made for that."""
    if isinstance(x, Quantized):
        assert isinstance(module, nn.Linear)
        assert isinstance(module.weight, QuantizedTensor)
        return _of_operand(module, module.weight, x, gated=False)
    new = x.shape[1] if x.dim() == 3 else 1
    if 1 < new <= MOST_NEW and is_batch_invariant() and not isinstance(module.weight, QuantizedTensor):
        return torch.cat([linear(module, part.contiguous()) for part in x.split(1, dim=1)], dim=1)
    if x.is_cuda and x.numel() == x.shape[-1] and type(module) is nn.Linear and not _is_watched(module):
        weight = module.weight
        if not isinstance(weight, QuantizedTensor) and weight.dtype == x.dtype:
            return ops.gemv(x, weight, module.bias)
    return module(x)  # type: ignore[no-any-return]


def _of_operand(module: nn.Linear, w: QuantizedTensor, x: Quantized, gated: bool) -> Tensor:
    return linear_of_operand(
        x.operand, x.row_scale, list(w.planes.values()), module.bias, w.format.spec, w.act_spec, w.out_features,
        w.in_features, x.dtype, gated,
    )  # fmt: skip


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
