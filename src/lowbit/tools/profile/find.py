"""`find_dequant(model, *inputs)`: run a model once and say of each layer whether its quantized weight stays packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowbit.tools.profile.taint import DequantTracer
from lowbit.tools.profile.verdict import Verdicts, judge


def find_dequant(
    model: nn.Module, *inputs: Any, run: Callable[[], Any] | None = None, **keywords: Any
) -> Verdicts:  # fmt: skip
    """Run `model(*inputs, **keywords)` without gradients and judge every layer.

    Works for any library's quantized tensors and modules, on any device. Compiled parts run uncompiled.

    Args:
        run: what to call instead, for models whose forward is not all that is done.
    """
    tracer = DequantTracer(model)
    with torch.no_grad(), tracer:
        if run is not None:
            run()
        else:
            model(*inputs, **keywords)
    return judge(tracer.found.layers, tracer.reads, tracer.written, tracer.ran, tracer.caches)
