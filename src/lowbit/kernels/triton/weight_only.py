"""`y = x @ W.T` with packed weights decoded in registers, any format, any M, N, K.

The product is computed transposed, `acc (BN, BM) += W_tile (BN, BK) @ x_tile.T`, so that the decoded tile is the
operand which matrix units take from registers. A scale that covers a whole step along K multiplies the fp32
accumulator and costs no accuracy; a finer one multiplies the fp32 level before it is rounded to the operand's dtype.
Grids too small for the GPU are split along K: partial sums go to a workspace and are added in a fixed order, so
results do not change from run to run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.kernels.problem import Operand, Problem
from lowbit.kernels.triton import act_quant
from lowbit.kernels.triton.decode import Layout, Tiles, layout_of, levels, scales, tile_bytes, tile_of, weight_args
from lowbit.kernels.triton.decode_packed import lut_of, lut_parts, packing_for, part_of, split_parts
from lowbit.kernels.triton.launch import OPTIONS, has_native_float8, multiprocessors, on_device

# Scales that cover at least this many weights along K are applied once per step, to the accumulator.
MIN_STEP = 64
# Upper limit of the partial sums of a split, in bytes.
MAX_PARTIALS = 16 << 20


@dataclass(frozen=True)
class Config:
    """One launch: tile sizes, warps, stages of the software pipeline and the number of slices of K."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    split: int = 1


def power_of_two_divisor(n: int) -> int:
    """The largest power of two that divides `n >= 1`."""
    return n & -n


@functools.cache
def config_for(m: int, n: int, k: int, layout: Layout, operand: torch.dtype, act_group: int, sms: int) -> Config:
    """Tile sizes from the shape alone; nothing is measured at run time."""
    if operand == torch.float32:  # plain fused multiply-adds: small tiles
        c = Config(16 if m <= 16 else 32, 64, 32, 4, 2)
    elif m <= 16:
        c = Config(16, 64, 256, 4, 3)
    elif m <= 64:
        c = Config(32 if m <= 32 else 64, 128, 128, 4 if layout.bits == 8 else 8, 3)
    else:
        c = Config(128, 128, 64 if layout.bits == 8 else 128, 8, 3)
    bk = c.bk
    for tile in (layout.scale.k, layout.outer.k, layout.shift.k):
        divisor = power_of_two_divisor(tile) if tile else bk
        bk = min(bk, divisor) if divisor >= min(MIN_STEP, c.bk) else bk
    if act_group:
        bk = min(bk, power_of_two_divisor(act_group))
    ctas, steps = -(-m // c.bm) * -(-n // c.bn), -(-k // bk)
    wanted = (2 if m <= 32 else 1) * sms
    split = max(1, min(wanted // ctas, steps // 4, 16, MAX_PARTIALS // (4 * m * n)))
    per_split = -(-steps // split)
    # Shorter steps have room for one more in flight.
    stages = c.stages + 1 if m <= 16 and bk < c.bk else c.stages
    return replace(c, bk=bk, stages=stages, split=-(-steps // per_split))


@triton.jit
def _finish(
    acc, y, rows, row_ok, tokens, token_ok, N, K,
    scale, stride_scale, outer_scale, stride_outer_scale, scale_offset, stride_scale_offset,
    row_scale, stride_row_scale, bias,
    L: tl.constexpr, SCALE_AT: tl.constexpr, OUTER_LAST: tl.constexpr, HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """What is left after the sum over K: scales that do not depend on k, the activation's scale, bias, one rounding."""
    if SCALE_AT == "end":
        acc *= scales(
            scale, stride_scale, outer_scale, stride_outer_scale, scale_offset, stride_scale_offset,
            rows, row_ok, 0, K, L, 16, 1,
        )  # fmt: skip
    if OUTER_LAST:
        acc *= tl.load(outer_scale).to(tl.float32)
    if HAS_ROW_SCALE:
        acc *= tl.load(row_scale + tokens.to(tl.int64) * stride_row_scale, mask=token_ok, other=0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=row_ok, other=0).to(tl.float32)[:, None]
    at = y + tokens.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(at, acc.to(y.dtype.element_ty), mask=row_ok[:, None] & token_ok[None, :])


@triton.jit
def weight_only_kernel(
    x, y, partials,
    p0, p1, p2, stride_p0, stride_p1, stride_p2, bytes_p0, bytes_p1, bytes_p2,
    scale, stride_scale, zero_point, stride_zero_point, outer_scale, stride_outer_scale,
    scale_offset, stride_scale_offset, codebook,
    row_scale, stride_row_scale, bias, M, N, K, k_per_split,
    L: tl.constexpr, SCALE_AT: tl.constexpr, OUTER_LAST: tl.constexpr, HAS_ROW_SCALE: tl.constexpr,
    ACT_GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PACKING: tl.constexpr,
    NATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid `(ceil(M/BM), ceil(N/BN), SPLIT)`: tokens on the one axis without a limit of 65535.

    Decoded in parts, the weights of a word come one after the other and meet every `PARTS`th column of x.
    """
    PARTS: tl.constexpr = PACKING.parts
    OPERAND: tl.constexpr = x.dtype.element_ty
    STEP: tl.constexpr = PARTS if PARTS else 1
    ZERO: tl.constexpr = L.zero
    SCALE: tl.constexpr = L.scale
    # Products of a level and a scale that both fit bf16 round once, as in fp32.
    NARROW: tl.constexpr = SCALE.kind != "number" and L.outer.kind == "" and L.shift.kind == ""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    token_ok, row_ok = tokens < M, rows < N
    x_rows = x + tokens.to(tl.int64)[:, None] * K
    begin = tl.program_id(2) * k_per_split
    end = tl.minimum(begin + k_per_split, K)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    if PACKING.has_lut:
        l0, l1, l2, l3, h0, h1, h2, h3 = lut_of(codebook)
    if SCALE_AT == "step":
        following = scales(
            scale, stride_scale, outer_scale, stride_outer_scale, scale_offset, stride_scale_offset,
            rows, row_ok, begin, K, L, BK, STEP,
        )  # fmt: skip
    for k0 in range(begin, end, BK):
        k = k0 + tl.arange(0, BK)
        xt = tl.load(x_rows + k[None, :], mask=token_ok[:, None] & (k < K)[None, :], other=0.0)
        if SCALE_AT == "level":
            s = scales(
                scale, stride_scale, outer_scale, stride_outer_scale, scale_offset, stride_scale_offset,
                rows, row_ok, k0, K, L, BK, STEP,
            )  # fmt: skip
        # A step that is scaled afterwards is summed on its own.
        if SCALE_AT == "step" or ACT_GROUP:
            total = tl.zeros((BN, BM), dtype=tl.float32)
        else:
            total = acc
        if PARTS:
            words = tile_bytes(p0, stride_p0, bytes_p0, rows, row_ok, k0, PARTS, BK)
            x_parts = split_parts(xt, PARTS)
            if ZERO.kind != "":
                zero = tile_of(zero_point, stride_zero_point, rows, row_ok, k0, K, ZERO, BK, STEP).to(OPERAND)
            if PACKING.has_lut:
                entries = lut_parts(words, l0, l1, l2, l3, h0, h1, h2, h3, PACKING)
            for j in tl.static_range(PARTS):
                if PACKING.has_lut:
                    w = entries[j]
                else:
                    w = part_of(words, codebook, j, L, PACKING, NATIVE, OPERAND)
                if ZERO.kind != "":
                    w -= zero
                if SCALE_AT == "level":
                    if NARROW and x.dtype.element_ty == tl.bfloat16:
                        w *= s.to(OPERAND)
                    else:
                        w = (w.to(tl.float32) * s).to(OPERAND)
                total = tl.dot(w, tl.trans(x_parts[j]), total, input_precision="ieee")
        else:
            w = levels(
                p0, p1, p2, stride_p0, stride_p1, stride_p2, bytes_p0, bytes_p1, bytes_p2,
                zero_point, stride_zero_point, codebook, rows, row_ok, k0, K, L, BK, OPERAND,
            )  # fmt: skip
            if SCALE_AT == "level":
                w *= s
            total = tl.dot(w.to(OPERAND), tl.trans(xt), total, input_precision="ieee")
        if SCALE_AT == "step":
            total *= following
            # Read one step ahead, so that no sum waits for its scale.
            following = scales(
                scale, stride_scale, outer_scale, stride_outer_scale, scale_offset, stride_scale_offset,
                rows, row_ok, tl.minimum(k0 + BK, K - 1), K, L, BK, STEP,
            )  # fmt: skip
        if ACT_GROUP:
            at = row_scale + tokens.to(tl.int64) * stride_row_scale + k0 // ACT_GROUP
            total *= tl.load(at, mask=token_ok, other=0)[None, :]
        if SCALE_AT == "step" or ACT_GROUP:
            acc += total
        else:
            acc = total
    if SPLIT == 1:
        _finish(
            acc, y, rows, row_ok, tokens, token_ok, N, K,
            scale, stride_scale, outer_scale, stride_outer_scale, scale_offset, stride_scale_offset,
            row_scale, stride_row_scale, bias, L, SCALE_AT, OUTER_LAST, HAS_ROW_SCALE, HAS_BIAS,
        )  # fmt: skip
    else:
        slab = partials + tl.program_id(2).to(tl.int64) * M * N
        at = slab + tokens.to(tl.int64)[None, :] * N + rows[:, None]
        tl.store(at, acc, mask=row_ok[:, None] & token_ok[None, :])


@triton.jit
def sum_partials_kernel(
    y, partials, scale, stride_scale, outer_scale, stride_outer_scale, scale_offset, stride_scale_offset,
    row_scale, stride_row_scale, bias, M, N, K,
    L: tl.constexpr, SCALE_AT: tl.constexpr, OUTER_LAST: tl.constexpr, HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds the slices of K in ascending order. Grid `(M, ceil(N/BN))`."""
    tokens = tl.program_id(0) + tl.arange(0, 1)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    token_ok, row_ok = tokens < M, rows < N
    at = partials + tokens.to(tl.int64)[None, :] * N + rows[:, None]
    acc = tl.zeros((BN, 1), dtype=tl.float32)
    for i in tl.static_range(SPLIT):
        # MAX_PARTIALS keeps i * M * N far below 2**31.
        acc += tl.load(at + i * M * N, mask=row_ok[:, None] & token_ok[None, :], other=0.0)
    _finish(
        acc, y, rows, row_ok, tokens, token_ok, N, K,
        scale, stride_scale, outer_scale, stride_outer_scale, scale_offset, stride_scale_offset,
        row_scale, stride_row_scale, bias, L, SCALE_AT, OUTER_LAST, HAS_ROW_SCALE, HAS_BIAS,
    )  # fmt: skip


def constants(fmt: Format, bk: int) -> dict[str, Any]:
    """Where the scales of `fmt` are applied in steps of `bk`, as compile-time arguments."""
    layout = layout_of(fmt)
    # One factor for the whole tensor waits for the end: it keeps block scales and their products exact in bf16.
    outer_last = layout.outer.kind != "" and layout.outer.n == layout.outer.k == 0 and layout.shift.kind == ""
    if outer_last:
        layout = replace(layout, outer=Tiles(""))
    at = "end" if layout.scale_is_constant_along_k else "step" if layout.scale_fits(bk) else "level"
    return {"L": layout, "SCALE_AT": at, "OUTER_LAST": outer_last}


def matmul(
    x: Tensor,
    planes: Mapping[str, Tensor],
    fmt: Format,
    n: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    row_scale: Tensor | None = None,
    act_group: int = 0,
    config: Config | None = None,
) -> Tensor:
    """`y (M, N)` in `dtype` from `x (M, K)` contiguous, in bf16, fp16 or fp32.

    Args:
        row_scale: fp32 `(M or 1, 1)`, multiplied into the result, or `(M, ceil(K / act_group))` when `act_group` is
            set: one scale per token and group of K.
    """
    m, k = x.shape
    c = config or config_for(m, n, k, layout_of(fmt), x.dtype, act_group, multiprocessors(x.device))
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    partials = torch.empty(c.split, m, n, dtype=torch.float32, device=x.device) if c.split > 1 else y
    args = weight_args(fmt, planes)
    shared = constants(fmt, c.bk) | {
        "HAS_ROW_SCALE": row_scale is not None and not act_group,
        "HAS_BIAS": bias is not None,
        "SPLIT": c.split,
        "row_scale": y if row_scale is None else row_scale,
        "stride_row_scale": 0 if row_scale is None or row_scale.shape[0] == 1 else row_scale.stride(0),
        "bias": y if bias is None else bias.contiguous(),
    }
    steps = -(-k // c.bk)
    packing = packing_for(shared["L"], c.bk, x.dtype, args["p0"])
    if packing.has_ptx or packing.has_lut:
        args |= {"p0": args["p0"].view(torch.int16), "stride_p0": args["stride_p0"] // 2}
        args["bytes_p0"] //= 2
    decoding = {"PACKING": packing, "NATIVE": has_native_float8(x.device)}
    k_per_split = -(-steps // c.split) * c.bk
    with on_device(x):
        weight_only_kernel[(-(-m // c.bm), -(-n // c.bn), c.split)](
            x, y, partials, M=m, N=n, K=k, k_per_split=k_per_split, ACT_GROUP=act_group, BM=c.bm, BN=c.bn, BK=c.bk,
            num_warps=c.warps, num_stages=c.stages, **args, **shared, **decoding, **OPTIONS,
        )  # fmt: skip
        if c.split > 1:
            beside = {name: value for name, value in args.items() if "scale" in name}
            block = 256
            sum_partials_kernel[(m, -(-n // block))](
                y, partials, M=m, N=n, K=k, BN=block, num_warps=4, **beside, **shared, **OPTIONS
            )
    return y


def weight_only(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The table's entry: quantizes the activation if the problem asks for it, then multiplies."""
    act, row_scale, group = problem.activation, None, 0
    if act is not None and act.grouped:
        group = act.scale_tile[1] or 0
        assert isinstance(x, Tensor)
        if act.scale_tile[0] != 1 or group % 16:
            # No step along K has one scale per token: the rounded activation itself is multiplied, in fp32.
            x, group = act.format.dequantize(act.quantize(x, act_scale), *x.shape), 0
            return matmul(x, planes, problem.weight, problem.n, bias, problem.dtype)
    if act is not None:
        x, row_scale = act_quant.split(x, act, act_scale)
    assert isinstance(x, Tensor)
    return matmul(x, planes, problem.weight, problem.n, bias, problem.dtype, row_scale, group)
