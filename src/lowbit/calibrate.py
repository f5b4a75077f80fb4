"""Runs batches through a model and collects what static activation scales need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import see
from lowbit.formats.activation import Activation
from lowbit.formats.fp8 import E4M3
from lowbit.formats.nvfp4 import NVFP4Format


@dataclass
class Statistics:
    """What was seen at the input of one layer: the largest magnitude, and over how many tokens."""

    amax: float = 0.0
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        if x.numel():
            self.amax = max(self.amax, float(x.detach().abs().amax()))
            self.tokens += x.numel() // x.shape[-1]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Statistics]:
    """Run `batches` through `model` and return the input statistics of every Linear by name.

    Args:
        model: the float model, on the device it shall run on.
        batches: inputs; each is passed as `model(batch)`, or `model(**batch)` when it is a dict.
        forward: `forward(model, batch)` for models that are called differently.

    Raises:
        ValueError: no batch was given, or no Linear ran.
    """
    seen: dict[str, Statistics] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                seen.setdefault(name, Statistics()).add(args[0])

            hooks.append(module.register_forward_pre_hook(hook))
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                count += 1
                if forward is not None:
                    forward(model, batch)
                elif isinstance(batch, dict):
                    model(**batch)
                else:
                    model(batch)
    finally:
        for h in hooks:
            h.remove()
    if not count:
        raise ValueError("calibrate: no batch was given; pass at least one input" + see("calibration-saw-nothing"))
    if not seen:
        raise ValueError("calibrate: no nn.Linear ran in the forward pass" + see("calibration-saw-nothing"))
    return seen


def static_scale(act: Activation, statistics: Statistics) -> float:
    """The scale of a static activation that just holds the largest magnitude seen.

    Raises:
        ValueError: the statistics are empty or not finite.
    """
    amax = statistics.amax
    if not statistics.tokens or amax != amax or amax == float("inf"):
        raise ValueError(
            f"cannot derive a static scale from amax = {amax} over {statistics.tokens} tokens"
            + see("calibration-saw-nothing")
        )
    element = act.format.element
    top = element.max if hasattr(element, "max") else ((1 << element.bits) - 1) / 2
    if isinstance(act.format, NVFP4Format):
        top *= E4M3.max
    return max(amax / top, 2.0**-126) if amax else 1.0
