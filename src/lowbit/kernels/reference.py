"""The definition of a quantized matmul: dequantize both operands and multiply in fp64. Slow, and only by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lowbit.kernels.problem import Problem


def reference(
    x: Tensor, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None
) -> Tensor:
    """`x (M, K)` times the dequantized weight `(N, K)`, in fp64, rounded once to `problem.dtype`."""
    act = problem.activation
    if act is not None:
        x = act.format.dequantize(act.quantize(x, act_scale), *x.shape)
    w = problem.weight.dequantize(planes, problem.n, problem.k).double()
    y = x.double() @ w.T
    return (y if bias is None else y + bias.double()).to(problem.dtype)
