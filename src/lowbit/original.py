"""A model as it was, so that what fails half way can be undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import see
from lowbit.report import Report


class Original:
    """The parameters and buffers that a model holds now, and where their values lie. Nothing is copied."""

    def __init__(self, model: nn.Module) -> None:
        # A Linear may become a `QuantizedLinear` on the way, with more parameters.
        self._kinds = [(module, type(module)) for module in model.modules()]
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (holder, dict(holder)) for module, _ in self._kinds for holder in (module._parameters, module._buffers)
        ]
        tensors: list[Tensor] = [t for _, held in self._held for t in held.values() if t is not None]
        self._values = [(tensor, tensor.detach()) for tensor in tensors]

    def put_back(self) -> None:
        """The same tensors in the same places, on the devices where they were."""
        for module, kind in self._kinds:
            if type(module) is not kind:
                module.__class__ = kind
        for holder, held in self._held:
            holder.clear()
            holder.update(held)
        for tensor, values in self._values:
            if tensor.device != values.device:  # moved in place by `Module.to`
                tensor.data = values


@contextmanager
def unharmed(model: nn.Module, keep: bool) -> Iterator[None]:
    """Around work that replaces a model's tensors. With `keep`, what the model has now is held, and put back if the
    work raises anything."""
    original = Original(model) if keep else None
    try:
        yield
    except BaseException:
        if original is not None:
            original.put_back()
        raise


@contextmanager
def quantizing(model: nn.Module, keep: bool, report: Report) -> Iterator[None]:
    """`unharmed`, around a quantization that lists in `report` what it has done.

    Raises:
        torch.OutOfMemoryError: memory ran out; the message says what became of the model.
    """
    try:
        with unharmed(model, keep):
            yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        state = "the model is as it was" if keep else _half_done(report)
        raise torch.OutOfMemoryError(f"quantize_: out of memory; {state}" + see("out-of-memory")) from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _half_done(report: Report) -> str:
    done = [layer.name for layer in report.quantized]
    names = ", ".join(done[:6]) + (f" and {len(done) - 6} more" if done[6:] else "")
    return (
        f"quantized are {names or 'no layers'}, all others are as they were. Once there is memory, "
        "on_unsupported='skip' quantizes the rest; restore=True puts back what was done"
    )
