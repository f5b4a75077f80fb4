"""8-bit codes times 8-bit codes on the matrix units, any M, N, K: int8 into int32, float8 into fp32.

The scales of tokens and of output channels do not depend on k, so the sum runs over plain codes and both scales,
the bias and one rounding come at its end. int32 cannot overflow below K = 131072: a product is at most 2**14.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.problem import Operand, Problem
from lowbit.kernels.triton import act_quant
from lowbit.kernels.triton.launch import OPTIONS, on_device


@dataclass(frozen=True)
class Config:
    """One launch: tile sizes, warps and stages of the software pipeline."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


@cache
def config_for(m: int) -> Config:
    """Tile sizes from the number of tokens alone."""
    if m <= 16:
        return Config(16, 32, 256, 4, 4)
    if m <= 64:
        return Config(64, 64, 128, 4, 4)
    if m <= 256:
        return Config(128, 64, 128, 4, 4)
    return Config(128, 128, 128, 8, 3)


@triton.jit
def scaled_mm_kernel(
    x, w, stride_w, y, row_scale, stride_row_scale, weight_scale, stride_weight_scale, bias, M, N, K,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid `(ceil(M/BM), ceil(N/BN))`."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    token_ok, row_ok = tokens < M, rows < N
    x_at = x + tokens.to(tl.int64)[:, None] * K
    w_at = w + rows.to(tl.int64)[:, None] * stride_w
    INTEGER: tl.constexpr = x.dtype.element_ty == tl.int8
    acc = tl.zeros((BM, BN), dtype=tl.int32 if INTEGER else tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(x_at + k[None, :], mask=token_ok[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(w_at + k[None, :], mask=row_ok[:, None] & (k < K)[None, :], other=0.0)
        if INTEGER:
            acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        else:
            # Hopper's float8 units keep about 14 bits of a sum; each step's sum is added in fp32.
            acc += tl.dot(a, tl.trans(b), out_dtype=tl.float32)
    value = acc.to(tl.float32)
    value *= tl.load(weight_scale + rows * stride_weight_scale, mask=row_ok, other=0)[None, :]
    value *= tl.load(row_scale + tokens.to(tl.int64) * stride_row_scale, mask=token_ok, other=0)[:, None]
    if HAS_BIAS:
        value += tl.load(bias + rows, mask=row_ok, other=0).to(tl.float32)[None, :]
    at = y + tokens.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=token_ok[:, None] & row_ok[None, :])


def matmul(
    codes: Tensor, row_scale: Tensor, w: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`(codes * row_scale) @ (w * weight_scale).T + bias`.

    Args:
        codes, w: `(M, K)` contiguous and `(N, K)`, both int8 or both one float8 dtype.
        row_scale, weight_scale: fp32 `(M or 1, 1)` and `(N or 1, 1)`.
    """
    (m, k), n = codes.shape, w.shape[0]
    if w.stride(1) != 1:
        w = w.contiguous()
    y = torch.empty(m, n, dtype=dtype, device=codes.device)
    c = config_for(m)
    with on_device(codes):
        scaled_mm_kernel[(-(-m // c.bm), -(-n // c.bn))](
            codes, w, w.stride(0), y, row_scale, 0 if row_scale.shape[0] == 1 else 1,
            weight_scale, 0 if weight_scale.shape[0] == 1 else weight_scale.stride(0),
            y if bias is None else bias.contiguous(), m, n, k, HAS_BIAS=bias is not None, BM=c.bm, BN=c.bn, BK=c.bk,
            num_warps=c.warps, num_stages=c.stages, **OPTIONS,
        )  # fmt: skip
    return y


def scaled_mm(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The table's entry: activation to codes, codes times codes."""
    assert problem.activation is not None
    w = planes["qdata"]
    codes, row_scale = act_quant.codes(x, problem.activation, act_scale)
    return matmul(codes, row_scale, w, planes["scale"].float(), bias, problem.dtype)
