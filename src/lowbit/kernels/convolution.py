"""2-D convolution and its gradient, one block of dequantized output channels at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from lowbit.formats.base import Format
from lowbit.kernels.blocked import BLOCK_ELEMENTS


@dataclass(frozen=True)
class Convolution:
    """A weight `(N, C / groups, kh, kw)`, stored as the format's `(N, C / groups * kh * kw)`, and how it is moved."""

    weight_shape: tuple[int, ...]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @property
    def in_channels(self) -> int:
        return self.weight_shape[1] * self.groups


def _blocks(
    planes: Mapping[str, Tensor], fmt: Format, conv: Convolution, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(input channels, output channels, weight) of consecutive blocks, none of which spans two groups."""
    n, c, kh, kw = conv.weight_shape
    k, per_group = c * kh * kw, n // conv.groups
    step = max(1, BLOCK_ELEMENTS // k)
    for g in range(conv.groups):
        for a in range(g * per_group, (g + 1) * per_group, step):
            b = min(a + step, (g + 1) * per_group)
            # Rows are taken from whole tiles of the format, then cut to the channels of this block.
            lo, hi = a // fmt.tile[0] * fmt.tile[0], min(-(-b // fmt.tile[0]) * fmt.tile[0], n)
            w = fmt.dequantize_rows(planes, lo, hi, k, dtype)[a - lo : b - lo]
            yield slice(g * c, (g + 1) * c), slice(a, b), w.view(b - a, c, kh, kw)


def conv2d(x: Tensor, planes: Mapping[str, Tensor], bias: Tensor | None, fmt: Format, conv: Convolution) -> Tensor:
    """`x (B, C, H, W)` to `(B, N, H', W')` in the dtype of `x`."""
    outs = [
        torch.conv2d(x[:, inputs], w, None, conv.stride, conv.padding, conv.dilation)
        for inputs, _, w in _blocks(planes, fmt, conv, x.dtype)
    ]
    y = torch.cat(outs, dim=1)
    return y if bias is None else y.add_(bias.view(-1, 1, 1))


def conv2d_dgrad(
    grad: Tensor, planes: Mapping[str, Tensor], fmt: Format, conv: Convolution, input_shape: Sequence[int]
) -> Tensor:
    """Gradient of the input `(B, C, H, W)` from `grad (B, N, H', W')`; blocks are summed in fp32."""
    dx = torch.zeros(input_shape, dtype=torch.float32, device=grad.device)
    for inputs, outputs, w in _blocks(planes, fmt, conv, torch.float32):
        size = (input_shape[0], w.shape[1], *input_shape[2:])
        part = grad[:, outputs].float()
        dx[:, inputs] += conv2d_input(size, w, part, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type, no-untyped-call]
    return dx.to(grad.dtype)
