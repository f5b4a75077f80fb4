"""One token times a plain weight: `y (1, N) = x (1, K) W (N, K)^T`, at the speed of memory.

Matrix libraries take one token for a small matrix, and on small layers lose a quarter of the time to it. A block reads
a few whole rows; so many blocks are resident that the memory is never idle. Sums are fp32, in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.early import let_the_next_start, wait_for_the_kernel_before
from lowbit.kernels.triton.launch import OPTIONS, ceil_pow2, early_options, on_device


@dataclass(frozen=True)
class Config:
    """One launch: rows of W and weights of each per step of a block, and its warps."""

    rows: int = 4
    block: int = 1024
    warps: int = 4


CONFIG = Config()


@triton.jit
def gemv_kernel(
    x, weight, bias, y, N, K, stride, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`ROWS` outputs per program. The first weights are on their way before the kernel ahead has ended."""
    let_the_next_start(EARLY)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    rows = weight + n.to(tl.int64)[:, None] * stride
    if WHOLE:
        w = tl.load(rows + k[None, :], mask=(n < N)[:, None], other=0.0, eviction_policy="evict_first")
    else:
        w = tl.load(rows + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    wait_for_the_kernel_before(EARLY)
    if WHOLE:
        acc = w.to(tl.float32) * tl.load(x + k).to(tl.float32)[None, :]
    else:
        acc = w.to(tl.float32) * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    for k0 in range(BLOCK, K, BLOCK):
        at = k0 + k
        if WHOLE:
            w = tl.load(rows + at[None, :], mask=(n < N)[:, None], other=0.0, eviction_policy="evict_first")
            v = tl.load(x + at)
        else:
            w = tl.load(rows + at[None, :], mask=(n < N)[:, None] & (at < K)[None, :], other=0.0)
            v = tl.load(x + at, mask=at < K, other=0.0)
        acc += w.to(tl.float32) * v.to(tl.float32)[None, :]
    out = tl.sum(acc, axis=1)
    if HAS_BIAS:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config = CONFIG) -> Tensor:
    """`y (..., N)` from `x (..., K)` of one token."""
    x, weight = x.contiguous(), weight if weight.stride(1) == 1 else weight.contiguous()
    n, k = weight.shape
    y = x.new_empty(*x.shape[:-1], n)
    block = min(config.block, ceil_pow2(k, 16))
    with on_device(x):
        gemv_kernel[(-(-n // config.rows),)](
            x, weight, x if bias is None else bias, y, n, k, weight.stride(0), HAS_BIAS=bias is not None,
            ROWS=config.rows, BLOCK=block, WHOLE=k % block == 0, num_warps=config.warps, **early_options(x.device),
            **OPTIONS,
        )  # fmt: skip
    return y
