"""ATen's CPU matmuls of int8, where they are right and fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.cpu import native
from lowbit.kernels.problem import Operand, Problem

# The op's vector loads want whole cache lines; anything else ends the process (AVX512: 32 bytes for x, 16 for weights).
ALIGNMENT = 64
# Bytes of weights that are copied at a time where they lie badly.
BLOCK_BYTES = 1 << 20


def int8_packed(
    x: Tensor, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None
) -> Tensor:
    """bf16 `x (M, K)` times int8 `(N, K)` with `torch._weight_int8pack_mm`.

    The op wants scales in bf16, which would round ours; it gets ones, and the fp32 scales are applied afterwards.
    It reads out of bounds where K is not a multiple of its vector width, so `select` never sends such a K here, and it
    crashes on operands that are not aligned: views and memory-mapped files, which are copied.
    """
    x = x if _aligned(x) else x.clone()
    parts = [torch._weight_int8pack_mm(x, w, _ones(w.shape[0])) for w in _rows(planes["qdata"])]
    y = torch.cat(parts, dim=1).float() * planes["scale"].view(1, -1)
    return (y if bias is None else y + bias).to(problem.dtype)


def _rows(w: Tensor) -> Iterator[Tensor]:
    """`w` itself where it is aligned and contiguous, else aligned copies of consecutive rows."""
    if w.is_contiguous() and _aligned(w):
        yield w
        return
    step = max(1, BLOCK_BYTES // w.shape[1])
    for i in range(0, w.shape[0], step):
        yield w[i : i + step].clone(memory_format=torch.contiguous_format)


def _aligned(t: Tensor) -> bool:
    return t.data_ptr() % ALIGNMENT == 0


def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bfloat16)


@cache
def multiplies_int8() -> bool:
    """Whether the CPU adds products of bytes in 32 bits. Others add pairs of them in 16, which overflow."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and bool(supported())


def int_mm(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """int8 codes times int8 codes with `torch._int_mm`: exact sums in int32, scales and bias at their end."""
    codes, row_scale = _codes(x, problem, act_scale)
    y = torch._int_mm(codes, planes["qdata"].t()).float()
    # The sums become numbers where they lie: for many tokens every pass over the result counts.
    y *= planes["scale"].float().view(1, -1)
    y *= row_scale
    return (y if bias is None else y.add_(bias)).to(problem.dtype)


def _codes(x: Tensor | Operand, problem: Problem, act_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if isinstance(x, Operand):
        return x.values, x.row_scale
    if problem.act == "int8:row" and (fast := native.quantize_rows(x, problem.act, codes=True)) is not None:
        return fast
    assert problem.activation is not None
    return problem.activation.codes(x, act_scale)
