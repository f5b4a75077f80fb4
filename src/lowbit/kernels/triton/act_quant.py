"""Activations to operands in one pass: what `Activation.split` gives, and the same of what stands before it.

An operand is levels, exact in bf16, or real 8-bit codes, beside fp32 row scales. `rule_of` says which formats the
kernels know. Any other format takes `Activation.split`, plain torch operations. What is quantized as it comes is left
to `cuda.act_quant` where that has a kernel for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats.activation import Activation
from lowbit.formats.fp8 import E4M3
from lowbit.kernels.cuda import act_quant as cuda
from lowbit.kernels.problem import Operand
from lowbit.kernels.triton.act_rules import Rule, bounded_bits, magnitude, rule_of, safe
from lowbit.kernels.triton.launch import OPTIONS, ceil_pow2, on_device
from lowbit.kernels.triton.row_quant import LONGEST, Source, launch, needs_whole_rows

BLOCK = 2048


@triton.jit
def row_amax_kernel(x, amax, M, K, BLOCK: tl.constexpr):
    """fp32 largest magnitude of each row `(M,)`. Grid `(M,)`."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.zeros((BLOCK,), dtype=tl.int32)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        best = tl.maximum(best, magnitude(tl.load(x + row * K + k, mask=k < K, other=0.0)))
    tl.store(amax + row, bounded_bits(tl.max(best, axis=0)).to(tl.float32, bitcast=True))


@triton.jit
def tensor_scale_kernel(amax, scale, M, TOP: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """The scale of a tensor from its rows' largest magnitudes `(M,)`, by one program."""
    best = tl.zeros((BLOCK,), dtype=tl.int32)
    for m0 in range(0, M, BLOCK):
        m = m0 + tl.arange(0, BLOCK)
        best = tl.maximum(best, magnitude(tl.load(amax + m, mask=m < M, other=0.0)))
    tl.store(scale, safe(tl.div_rn(tl.max(best, axis=0).to(tl.float32, bitcast=True), TOP), R))


def _row_block(k: int) -> int:
    return min(BLOCK, ceil_pow2(k, 16))


def _tensor_scale(x: Tensor, rule: Rule) -> Tensor:
    """fp32 `(1, 1)`: the scale of the whole tensor, or NVFP4's outer scale."""
    m, k = x.shape
    top = rule.top * E4M3.max if rule.scaling == "nvfp4" else rule.top
    amax = torch.empty(m, dtype=torch.float32, device=x.device)
    scale = torch.empty(1, 1, dtype=torch.float32, device=x.device)
    with on_device(x):
        row_amax_kernel[(m,)](x, amax, m, k, BLOCK=_row_block(k), num_warps=4, **OPTIONS)
        tensor_scale_kernel[(1,)](amax, scale, m, TOP=top, R=rule, BLOCK=_row_block(m), num_warps=4, **OPTIONS)
    return scale


def quantize(
    x: Tensor, act: Activation, static_scale: Tensor | None, dtype: torch.dtype, fold: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Operand `(M, K)` in `dtype` and fp32 row scales, or None if the format is none of those the kernels know.

    Args:
        x: contiguous, bf16, fp16 or fp32, `M, K >= 1`.
        dtype: bf16 (levels), or the dtype of 8-bit codes without a zero point. fp32 also holds every level.
        fold: multiply grouped scales into the operand, which rounds it to `dtype`. Those of MX and NVFP4 always are:
            the operand stays exact.

    Returns:
        Scales `(M, 1)`, `(1, 1)` for one scale per tensor, or `(M, ceil(K / group))`.
    """
    found = quantize_source(Source("plain", x), act, static_scale, dtype, fold)
    return None if found is None else found[1:]


def quantize_source(
    source: Source, act: Activation, static_scale: Tensor | None, dtype: torch.dtype, fold: bool = False
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`quantize` of what `source` makes, with its sum first; None also where one kernel cannot do it.

    That is where the scale of a whole tensor has to be found first, and where a row is too long for registers.
    """
    rule, x, k = rule_of(act.format), source.x, source.shape[1]
    if rule is None or (k > LONGEST and needs_whole_rows(source.name, rule, static_scale is not None)):
        return None
    per_tensor = act.format.scale_planes[0].n is None
    if static_scale is None and (per_tensor or rule.scaling == "nvfp4"):
        if source.name != "plain":
            return None
        static_scale = _tensor_scale(x, rule)
    if source.name == "plain" and not fold:
        found = cuda.plan(act, static_scale is not None, dtype, *source.shape, x.dtype, x.device)
        if found is not None and found.takes(x, static_scale):
            return x, *found.start(x, static_scale)
    return launch(source, rule, static_scale, dtype, fold or rule.scaling in ("mx", "nvfp4"))


def after(
    name: str, given: Sequence[Any], act: Activation, act_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, ...] | None:
    """Operand and scales of what a source makes of `given`, in its shape, after the sum where there is one.

    Args:
        name: the source's.
        given: its tensors `(..., K)`, then weight and eps of a norm.

    Returns:
        None where one kernel cannot do it.
    """
    x = given[0]
    width = x.shape[-1]
    norm = {"weight": given[-2].contiguous(), "eps": given[-1]} if "norm" in name else {}
    if name == "add_rms_norm":
        norm["y"] = given[1].reshape(-1, width).contiguous()
    source = Source(name, x.reshape(-1, width).contiguous(), **norm)
    found = quantize_source(source, act, act_scale if act.static else None, dtype)
    if found is None:
        return None
    total, operand, scales = found
    operand = operand.view(*x.shape[:-1], source.shape[1])
    return (total.view(x.shape), operand, scales) if name == "add_rms_norm" else (operand, scales)


# What kernels of the table call --------------------------------------------------------------------


def split(x: Tensor | Operand, act: Activation, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`Activation.split` on a GPU: a bf16 operand and row scales."""
    if isinstance(x, Operand):
        return x.values, x.row_scale
    if act.static and static_scale is None:
        return act.split(x, static_scale)  # raises the error that says what is missing
    found = quantize(x, act, static_scale if act.static else None, torch.bfloat16)
    return act.split(x, static_scale) if found is None else found


def dequantized(x: Tensor, act: Activation, static_scale: Tensor | None) -> Tensor:
    """A grouped activation `(M, K)` rounded to its format and back, in the dtype of `x`."""
    found = quantize(x, act, static_scale if act.static else None, x.dtype, fold=True)
    if found is not None:
        return found[0]
    m, k = x.shape
    return act.format.dequantize(act.quantize(x, static_scale), m, k, x.dtype)


def codes(x: Tensor | Operand, act: Activation, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whole 8-bit codes `(M, K)` in the dtype of their plane, and fp32 scales `(M or 1, 1)`.

    For activations without zero points and with one level of scales.
    """
    if isinstance(x, Operand):
        return x.values, x.row_scale
    if act.static and static_scale is None:
        act.quantize(x)  # raises the error that says what is missing
    found = quantize(x, act, static_scale if act.static else None, act.format.planes[0].dtype)
    return act.codes(x, static_scale) if found is None else found
