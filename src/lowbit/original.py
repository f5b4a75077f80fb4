"""A model as it was, so that work on it that fails half way can be undone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Original:
    """The parameters and buffers that a model holds now, and where their values lie. Nothing is copied."""

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
            (holder, name, tensor, tensor.detach())
            for module in model.modules()
            for holder in (module._parameters, module._buffers)
            for name, tensor in holder.items()
            if tensor is not None
        ]

    def put_back(self) -> None:
        """The same tensors in the same places, on the devices where they were."""
        for holder, name, tensor, values in self._held:
            holder[name] = tensor
            if tensor.device != values.device:  # moved in place by `Module.to`
                tensor.data = values


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
