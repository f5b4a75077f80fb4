"""The portable kernel: dequantize some rows of the weight, multiply, go on. Any device, any format, bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.kernels.select import Problem

# fp32 weights of one block: 1 MiB stays in a CPU core's cache between being written and being read.
BLOCK_ELEMENTS = 1 << 18


def row_blocks(fmt: Format, n: int, k: int, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive rows, on tile boundaries, of about `elements` weights each."""
    step = max(1, elements // max(k, 1) // fmt.tile[0]) * fmt.tile[0]
    return ((i, min(i + step, n)) for i in range(0, n, step))


def blocked(
    x: Tensor, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None
) -> Tensor:
    """`x (M, K)` times the weight `(N, K)` in fp32, one block of rows of the weight at a time."""
    fmt, act, (m, k), n = problem.weight, problem.activation, x.shape, problem.n
    row_scale = None
    if act is None:
        operand = x.float()
    elif act.grouped:
        operand = act.format.dequantize(act.quantize(x), m, k)
    else:
        operand, row_scale = act.split(x, act_scale)
        operand = operand.float()
    y = torch.empty(m, n, dtype=torch.float32, device=x.device)
    for start, stop in row_blocks(fmt, n, k):
        w = fmt.dequantize(fmt.slice_planes(planes, 0, start, stop), stop - start, k)
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
    for start, stop in row_blocks(fmt, n, k, elements):
        w = fmt.dequantize(fmt.slice_planes(planes, 0, start, stop), stop - start, k)
        out.addmm_(grad[:, start:stop].float(), w)
    return out.to(grad.dtype)
