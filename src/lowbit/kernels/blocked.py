"""The portable kernel: dequantize some rows of the weight, multiply, go on. Any device, any format, bounded memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.formats.activation import Activation
from lowbit.formats.base import Format
from lowbit.kernels.problem import Operand, Problem

# fp32 weights of one block: 1 MiB stays in a CPU core's cache between being written and being read.
BLOCK_ELEMENTS = 1 << 18


def split_input(x: Tensor | Operand, act: Activation | None, act_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The fp32 operand `(M, K)` that meets the weights, and the row scale of a quantized activation."""
    if isinstance(x, Operand):
        return x.values.float(), x.row_scale
    if act is None:
        return x.float(), None
    if act.grouped:
        return act.format.dequantize(act.quantize(x), *x.shape), None
    operand, row_scale = act.split(x, act_scale)
    return operand.float(), row_scale


def blocked(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """`x (M, K)` times the weight `(N, K)` in fp32, one block of rows of the weight at a time."""
    fmt, (m, k), n = problem.weight, x.shape, problem.n
    operand, row_scale = split_input(x, problem.activation, act_scale)
    y = torch.empty(m, n, dtype=torch.float32, device=operand.device)
    for start, stop in fmt.row_blocks(n, k, BLOCK_ELEMENTS):
        w = fmt.dequantize_rows(planes, start, stop, k)
        torch.mm(operand, w.T, out=y[:, start:stop])
    if row_scale is not None:
        y *= row_scale
    if bias is not None:
        y += bias
    return y.to(problem.dtype)


def blocked_dgrad(grad: Tensor, planes: Mapping[str, Tensor], fmt: Format, n: int, k: int) -> Tensor:
    """`grad (M, N) @ W (N, K)`: the gradient of the input, in fp32 accumulation, block by block."""
    out = torch.zeros(grad.shape[0], k, dtype=torch.float32, device=grad.device)
    elements = BLOCK_ELEMENTS if grad.device.type == "cpu" else 1 << 23
    for start, stop in fmt.row_blocks(n, k, elements):
        w = fmt.dequantize_rows(planes, start, stop, k)
        out.addmm_(grad[:, start:stop].float(), w)
    return out.to(grad.dtype)
