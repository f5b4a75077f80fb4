"""Fake quantization: rounds on the way forward, as if it were not there on the way back.

The straight-through estimator of Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons",
arXiv:1308.3432, as Jacob et al., arXiv:1712.05877 (section 3) train with it. Scales are chosen anew each time from the
values of the moment and cover the largest, so that hardly anything is clipped and the gradient passes everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.formats.activation import Activation
from lowbit.formats.base import Format


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Format | Activation) -> Tensor:
        if isinstance(how, Activation):
            fmt, flat = how.format, x.reshape(-1, x.shape[-1])
            params = how.params(flat)
        else:
            fmt, flat = how, x.reshape(x.shape[0], -1)
            params = fmt.choose_params(flat)
        levels = fmt.levels(fmt.encode(flat.float(), params), params, flat.shape[1])
        return fmt.scaled(levels, params).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def fake_quantize(x: Tensor, how: Format | Activation) -> Tensor:
    """What `x` is after quantization, in its own dtype; its gradient is passed on as it comes.

    Args:
        x: a weight of two or more dimensions for a `Format` (all after the first count as K), or an input `(..., K)`
            for an `Activation` with dynamic scales. NaN and Inf are not looked for; they make their tile NaN.
    """
    return _FakeQuantize.apply(x, how)  # type: ignore[no-any-return, no-untyped-call]
