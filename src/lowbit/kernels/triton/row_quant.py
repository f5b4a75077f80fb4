"""Rows that are computed and quantized in one kernel, every row in registers: nothing in between meets memory.

A *source* says what a row is before it is quantized: the input itself, or what stands between two linear layers of a
decoder. It is rounded to the dtype of the activations first, as the op would round it that this kernel makes needless,
so that codes are the same.

For few tokens several programs share a row. Each of them reads all of it, which is short and in the cache, and finds
the same scale; then each divides and rounds only its own part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.act_rules import Rule, group_scales, int8_of, level, row_level, row_scale
from lowbit.kernels.triton.early import let_the_next_start, wait_for_the_kernel_before
from lowbit.kernels.triton.launch import (
    OPTIONS,
    ceil_pow2,
    early_options,
    has_native_float8,
    multiprocessors,
    on_device,
    start,
    uses_ptx,
)

LONGEST = 65536  # of a row that registers hold
PART = 1024  # the least of a row that is worth a program


@dataclass(frozen=True)
class Source:
    """What is quantized: `x` itself, or what `name` makes of it.

    Attributes:
        name: `plain`, `relu`, `silu_mul`, `rms_norm` or `add_rms_norm`.
        x: contiguous `(M, K)`, bf16, fp16 or fp32; `(M, 2 K)`, gate and then up, for `silu_mul`.
        y: like `x`, added to it by `add_rms_norm`.
        weight, eps: `(K,)` and a number, of the norms.
    """

    name: str
    x: Tensor
    y: Tensor | None = None
    weight: Tensor | None = None
    eps: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """M and K of what is quantized."""
        m, k = self.x.shape
        return m, k // 2 if self.name == "silu_mul" else k


@triton.jit
def _given(x, y, d, D, inside, SOURCE: tl.constexpr):
    """fp32 numbers `d` of a row as they are rounded before the quantization, or before the norm."""
    v = tl.load(x + d, mask=inside, other=0.0)
    if SOURCE == "silu_mul":
        gate = v.to(tl.float32)
        up = tl.load(x + D + d, mask=inside, other=0.0).to(tl.float32)
        return (gate / (1.0 + tl.exp(-gate)) * up).to(x.dtype.element_ty).to(tl.float32)
    elif SOURCE == "add_rms_norm":
        total = v.to(tl.float32) + tl.load(y + d, mask=inside, other=0.0).to(tl.float32)
        return total.to(x.dtype.element_ty).to(tl.float32)
    elif SOURCE == "relu":
        # A comparison with NaN is false: NaN stays.
        return tl.where(v.to(tl.float32) < 0.0, 0.0, v.to(tl.float32))
    else:
        return v.to(tl.float32)


@triton.jit
def _normed(v, factor, w, x):
    return (v * factor * w).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def quantized_row_kernel(
    x, y, weight, total, operand, scales, static_scale, D, groups, eps,
    SOURCE: tl.constexpr, R: tl.constexpr, STATIC: tl.constexpr, FOLD: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr, FMA: tl.constexpr, CONVERT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid `(M, BLOCK / PART)`. One scale per row (or the given one), or one per group of K, which `FOLD` multiplies
    into the operand.

    `CONVERT`: float8 codes come from the GPU's own conversion, which rounds ties to even and saturates.
    """
    let_the_next_start(EARLY)
    NORM: tl.constexpr = SOURCE == "rms_norm" or SOURCE == "add_rms_norm"
    WHOLE: tl.constexpr = PART == BLOCK
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    mine = tl.program_id(1) * PART + tl.arange(0, PART)
    own = mine < D
    if NORM:
        w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        own_w = w if WHOLE else tl.load(weight + mine, mask=own, other=0.0).to(tl.float32)
    wait_for_the_kernel_before(EARLY)
    width = D * 2 if SOURCE == "silu_mul" else D
    x_row, y_row = x + row * width, y + row * width
    # What is loaded twice is on its way at once, not after the sums over the row.
    v = _given(x_row, y_row, mine, D, own, SOURCE)
    if NORM or (R.group == 0 and not STATIC):
        line = v if WHOLE else _given(x_row, y_row, d, D, inside, SOURCE)
    if SOURCE == "add_rms_norm":
        tl.store(total + row * D + mine, v.to(total.dtype.element_ty), mask=own)
    if NORM:
        factor = 1.0 / tl.sqrt_rn(tl.sum(line * line, axis=0) / D + eps)
        line = _normed(line, factor, w, x)
        v = line if WHOLE else _normed(v, factor, own_w, x)
    if R.group == 0:
        if STATIC:
            scale = tl.load(static_scale).to(tl.float32)
            zero_point = 0.0
        else:
            scale, zero_point = row_scale(line, R)
        # Numbers may be far beyond a given scale, and their quotients beyond what `divided` is right for.
        q = row_level(v, scale, zero_point, R, FMA and not STATIC, not CONVERT)
        # A static scale comes out, too, once.
        tl.store(scales + row, scale, mask=(tl.program_id(1) == 0) & ((row == 0) | (not STATIC)))
    else:
        G: tl.constexpr = PART // R.group
        outer = 1.0
        if STATIC:
            outer = tl.load(static_scale).to(tl.float32)
        parts = tl.reshape(v, (G, R.group))
        by, inner = group_scales(parts, outer, R)
        levels = level(tl.div_rn(parts, tl.broadcast_to(by[:, None], (G, R.group))), R)
        if FOLD:
            levels *= inner[:, None]
            tl.store(scales, outer, mask=(tl.program_id(1) == 0) & (row == 0))
        else:
            group = tl.program_id(1) * G + tl.arange(0, G)
            tl.store(scales + row * groups + group, by, mask=group < groups)
        q = tl.reshape(levels, (PART,))
    if operand.dtype.element_ty == tl.int8:
        tl.store(operand + row * D + mine, int8_of(q), mask=own)
    else:
        tl.store(operand + row * D + mine, q.to(operand.dtype.element_ty), mask=own)


def row_block(k: int, group: int = 0) -> int:
    """The power of two that holds a row of K numbers, and at least one group."""
    return ceil_pow2(k, max(16, group))


def part_of(m: int, block: int, group: int, processors: int) -> int:
    """What a program takes of a row: more programs than rows while there are multiprocessors without one."""
    part = block
    while part > max(PART, group) and m * (block // part) * 2 <= processors:
        part //= 2
    return part


def needs_whole_rows(source: str, rule: Rule, static: bool) -> bool:
    """Whether anything depends on all of a row: a norm, or its scale."""
    return "norm" in source or (rule.group == 0 and not static)


def launch(
    source: Source, rule: Rule, static_scale: Tensor | None, dtype: torch.dtype, fold: bool, part: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The source's sum (of `add_rms_norm`; its input otherwise), the operand `(M, K)` and the scales.

    Scales are `(M, 1)`, `(M, ceil(K / group))`, or `(1, 1)` where all rows have one: a static scale, NVFP4's outer
    scale, or the 1 that is left where a format folds all of its scales.

    Args:
        static_scale: fp32 `(1, 1)` in place of a row's own scale; NVFP4's outer scale.
        fold: grouped scales are multiplied into the operand, and none come out.
        part: what a program takes of a row, instead of the rule's choice.
    """
    x, (m, k), device, static = source.x, source.shape, source.x.device, static_scale is not None
    groups = -(-k // rule.group) if rule.group else 1
    operand = torch.empty(m, k, dtype=dtype, device=device)
    shared = fold if rule.group else static
    scales = torch.empty((1, 1) if shared else (m, groups), dtype=torch.float32, device=device)
    total = torch.empty_like(x) if source.name == "add_rms_norm" else x
    grid, named = _program(source.name, rule, static, dtype, fold, m, k, part, device)
    given = (
        x, x if source.y is None else source.y, x if source.weight is None else source.weight, total, operand, scales,
        x if static_scale is None else static_scale, k, groups, source.eps,
    )  # fmt: skip
    with on_device(x):
        start(quantized_row_kernel, grid, given, named | early_options(device))
    return total, operand, scales


@lru_cache(maxsize=4096)
def _program(
    name: str, rule: Rule, static: bool, dtype: torch.dtype, fold: bool, m: int, k: int, part: int | None,
    device: torch.device,
) -> tuple[tuple[int, int], dict[str, Any]]:  # fmt: skip
    """Grid and constants of a launch, remembered: they take as long as the launch itself."""
    block = row_block(k, rule.group)
    whole = needs_whole_rows(name, rule, static)
    if part is None:
        least = min(block, max(PART, rule.group))
        part = part_of(m, block, rule.group, multiprocessors(device)) if whole else least
    converts = dtype.is_floating_point and dtype.itemsize == 1 and uses_ptx(device) and has_native_float8(device)
    # 16 numbers per thread of a row that is held, 8 of a part that is not reduced over.
    warps = block // 512 if whole else part // 256
    return (m, block // part), {
        "SOURCE": name, "R": rule, "STATIC": static, "FOLD": fold, "BLOCK": block, "PART": part,
        "FMA": uses_ptx(device), "CONVERT": converts, "num_warps": min(32 if block == LONGEST else 16, max(1, warps)),
        **OPTIONS,
    }  # fmt: skip
