"""What lies between the linear layers of a decoder, one kernel each: residual sum and RMSNorm, rotary embedding and
KV-cache write, SiLU and product.

Everything is computed in fp32 and rounded once, to the dtype of the activations. `decoder_ops` has the definitions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.cache_layout import check_heads
from lowbit.kernels.triton.early import let_the_next_start, wait_for_the_kernel_before
from lowbit.kernels.triton.launch import OPTIONS, ceil_pow2, early_options, on_device, start

ELEMENTS = 1024  # of a block of `silu_mul`
HEADS = 8  # of a block of `rope_write`


# Residual sum and RMSNorm ------------------------------------------------------------------------


@triton.jit
def rms_norm_kernel(
    x, y, weight, total, out, D, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """A row `(D,)` per program. With `ADD`, `x + y` is stored in `total` and normed as it was rounded."""
    let_the_next_start(EARLY)
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    inside = d < D
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    wait_for_the_kernel_before(EARLY)
    v = tl.load(x + row + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(y + row + d, mask=inside, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row + d, rounded, mask=inside)
        v = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(v * v, axis=0) / D + eps)
    tl.store(out + row + d, (v * scale * w).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x (..., D)` normed."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _norm(x, x, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + y`, and the same normed, `(..., D)`."""
    x, y = x.contiguous(), y.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _norm(x, y, weight, total, out, eps, add=True)
    return total, out


def _norm(x: Tensor, y: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float, add: bool) -> None:
    d = x.shape[-1]
    rows = x.numel() // d
    block = ceil_pow2(d, 16)
    named = {"ADD": add, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}
    with on_device(x):
        start(rms_norm_kernel, (rows, 1), (x, y, weight, total, out, d, eps), named | early_options(x.device) | OPTIONS)


# SiLU and product --------------------------------------------------------------------------------


@triton.jit
def silu_mul_kernel(x, out, N, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """`silu(gate) * up` of rows `(2 N,)` that hold gate, then up. Grid `(rows, ceil(N / BLOCK))`."""
    let_the_next_start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    wait_for_the_kernel_before(EARLY)
    gate = tl.load(x + row * 2 * N + n, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * N + N + n, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * N + n, y.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`(..., 2 N)` to `(..., N)`."""
    gate_up = gate_up.contiguous()
    n = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], n)
    block = min(ELEMENTS, ceil_pow2(n, 16))
    grid, named = (out.numel() // n, -(-n // block)), {"BLOCK": block, "num_warps": 4}
    with on_device(gate_up):
        start(silu_mul_kernel, grid, (gate_up, out, n), named | early_options(gate_up.device) | OPTIONS)
    return out


# Rotary embedding and cache ----------------------------------------------------------------------


@triton.jit
def rotated(a, b, c, s):
    """The pairs `(a, b)` turned by the angles with cosine `c` and sine `s`."""
    return a * c - b * s, b * c + a * s


@triton.jit
def rope_write_kernel(
    qkv, queries, keys, values, positions, cos, sin, q_norm, k_norm, eps, T, H, G, S, D, HALF_D,
    NORM: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Some heads of one token per program. Grid `(B T, ceil((H + 2 G) / BLOCK_HEADS))`.

    Heads are in the order of `qkv`: H of queries, G of keys, G of values. Queries go to `queries (B, T, H, D)`, keys
    and values into the cache `(B, G, S, D)`.
    """
    let_the_next_start(EARLY)
    token = tl.program_id(0).to(tl.int64)
    batch, t = token // T, token % T
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    i = tl.arange(0, HALF)
    is_q, is_k, is_v = head < H, (head >= H) & (head < H + G), (head >= H + G) & (head < H + 2 * G)
    inside = (head < H + 2 * G)[:, None] & (i < HALF_D)[None, :]
    wait_for_the_kernel_before(EARLY)
    position = tl.load(positions + batch).to(tl.int64) + t
    fits = (i < tl.where(position < S, HALF_D, 0))[None, :]
    at = qkv + token * (H + 2 * G) * D + head[:, None] * D + i[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF_D, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + position * HALF_D + i[None, :], mask=fits, other=0.0)
    s = tl.load(sin + position * HALF_D + i[None, :], mask=fits, other=0.0)
    ra, rb = a, b
    if NORM:
        scale = (1.0 / tl.sqrt_rn((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps))[:, None]
        chosen_q = is_q[:, None] & inside
        chosen_k = is_k[:, None] & inside
        wa = tl.load(q_norm + i[None, :] + head[:, None] * 0, mask=chosen_q, other=0.0).to(tl.float32)
        wb = tl.load(q_norm + HALF_D + i[None, :] + head[:, None] * 0, mask=chosen_q, other=0.0).to(tl.float32)
        wa += tl.load(k_norm + i[None, :] + head[:, None] * 0, mask=chosen_k, other=0.0).to(tl.float32)
        wb += tl.load(k_norm + HALF_D + i[None, :] + head[:, None] * 0, mask=chosen_k, other=0.0).to(tl.float32)
        ra, rb = a * scale * wa, b * scale * wb
    ra, rb = rotated(ra, rb, c, s)
    to_q = queries + (token * H + head[:, None]) * D + i[None, :]
    chosen = is_q[:, None] & inside
    tl.store(to_q, ra.to(queries.dtype.element_ty), mask=chosen)
    tl.store(to_q + HALF_D, rb.to(queries.dtype.element_ty), mask=chosen)
    to_k = keys + ((batch * G + head[:, None] - H) * S + position) * D + i[None, :]
    chosen = is_k[:, None] & fits
    tl.store(to_k, ra.to(keys.dtype.element_ty), mask=chosen)
    tl.store(to_k + HALF_D, rb.to(keys.dtype.element_ty), mask=chosen)
    to_v = values + ((batch * G + head[:, None] - H - G) * S + position) * D + i[None, :]
    chosen = is_v[:, None] & fits
    tl.store(to_v, a.to(values.dtype.element_ty), mask=chosen)
    tl.store(to_v + HALF_D, b.to(values.dtype.element_ty), mask=chosen)


def rope_write(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    """Queries `(B, T, H, D)` of `qkv (B, T, (H + 2 G) D)`; keys and values go into the cache from `positions` on."""
    check_heads(qkv, keys, heads)
    qkv = qkv.contiguous()
    batch, tokens, _ = qkv.shape
    _, groups, capacity, d = keys.shape
    queries = qkv.new_empty(batch, tokens, heads, d)
    with on_device(qkv):
        rope_write_kernel[(batch * tokens, -(-(heads + 2 * groups) // HEADS))](
            qkv, queries, keys, values, positions, cos, sin, qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm, eps, tokens, heads, groups, capacity, d, d // 2,
            NORM=q_norm is not None, BLOCK_HEADS=HEADS, HALF=ceil_pow2(d // 2, 16), num_warps=1,
            **early_options(qkv.device), **OPTIONS,
        )  # fmt: skip
    return queries
