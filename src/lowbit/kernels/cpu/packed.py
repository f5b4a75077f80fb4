"""ATen's packed CPU matmuls, where they are right and fast."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.kernels.select import Problem


def int8_packed(
    x: Tensor, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None
) -> Tensor:
    """bf16 `x (M, K)` times int8 `(N, K)` with `torch._weight_int8pack_mm`.

    The op wants scales in bf16, which would round ours; it gets ones, and the fp32 scales are applied afterwards.
    It reads out of bounds where K is not a multiple of its vector width, so `select` never sends such a K here.
    """
    ones = _ones(problem.n)
    y = torch._weight_int8pack_mm(x, planes["qdata"], ones).float() * planes["scale"].view(1, -1)
    return (y if bias is None else y + bias).to(problem.dtype)


def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bfloat16)
