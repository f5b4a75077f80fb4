"""For tests, yours and ours: `assert_no_dequant`, the memory contract as one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lowbit.errors import see
from lowbit.tools.profile.find import find_dequant
from lowbit.tools.profile.verdict import Verdict, Verdicts

__all__ = ["assert_no_dequant"]


def assert_no_dequant(
    model: nn.Module, *inputs: Any, run: Callable[[], Any] | None = None, **keywords: Any
) -> Verdicts:
    """Run `model(*inputs, **keywords)` and fail if a quantized weight is dequantized as a whole to be multiplied.

    Any model, library and device; what is followed are the tensors, not the names of layers. A weight that is
    dequantized in pieces of less than half of it, at most 64 MiB each, passes.

    Args:
        run: what to call instead of the model's forward; it must run the model.

    Returns:
        The verdict on every layer.

    Raises:
        AssertionError: a whole weight was dequantized, or no quantized layer ran; the message has the verdicts.
        ValueError: the model has no quantized layer, so that the assertion would say nothing.
    """
    verdicts = find_dequant(model, *inputs, run=run, **keywords)
    if not verdicts.quantized:
        raise ValueError(f"assert_no_dequant: {verdicts.summary}" + see("nothing-quantized"))
    unfused = verdicts.of(Verdict.UNFUSED)
    if unfused:
        raise AssertionError(
            f"{len(unfused)} of {len(verdicts.quantized)} quantized layers are dequantized:\n{verdicts}"
        )
    if len(verdicts.of(Verdict.NOT_RUN)) == len(verdicts.quantized):
        raise AssertionError(f"none of {len(verdicts.quantized)} quantized layers ran:\n{verdicts}")
    return verdicts
