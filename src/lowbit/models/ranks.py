"""What the ranks of a model that is cut exchange: sums over them, and the parts of its logits.

Few tokens go straight into the memory of the other GPUs where that is possible (`kernels.cuda.all_reduce`), everything
else through the process group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit import decoder_ops
from lowbit.errors import see
from lowbit.kernels.cuda.all_reduce import AllReduce, connect
from lowbit.kernels.problem import is_batch_invariant

#: Bytes of a tensor up to which the exchange is faster: measured on two GPUs (docs/measured.md).
MOST_BYTES = 4 << 20


class Ranks:
    """The processes that share a model.

    Attributes:
        group: their process group.
        direct: the exchange through the memory of the GPUs, or why there is none.
    """

    def __init__(self, group: dist.ProcessGroup, hidden_size: int, device: torch.device) -> None:
        self.group = group
        self.direct = connect(group, hidden_size, device)

    def add_up(self, y: Tensor) -> Tensor:
        """The sum of all ranks' `y (..., hidden_size)`, in its place."""
        if (direct := self._direct_for(y)) is not None:
            return direct.add_up(y)
        dist.all_reduce(y, group=self.group)
        return y

    def add_rms_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`decoder_ops.add_rms_norm` of `x` and the sum of all ranks' `y`, both `(..., hidden_size)`."""
        direct = self._direct_for(y)
        if direct is not None and y.dtype == x.dtype == weight.dtype:
            return direct.add_rms_norm(x, y, weight, eps)
        return decoder_ops.add_rms_norm(x, self.add_up(y), weight, eps)

    def gather(self, y: Tensor) -> Tensor:
        """The parts `(..., n)` that ranks have, side by side: `(..., ranks n)`."""
        if (direct := self._direct_for(y)) is not None:
            return direct.gather(y)
        parts = y.new_empty(dist.get_world_size(self.group), *y.shape)
        dist.all_gather(list(parts.unbind()), y.contiguous(), group=self.group)
        return parts.movedim(0, -2).flatten(-2)

    def _direct_for(self, y: Tensor) -> AllReduce | None:
        """The exchange, if it takes `y`; asked first, whatever is exchanged, and so the place to refuse gradients."""
        _check_no_gradient(y)
        if isinstance(self.direct, str) or not self.direct.takes(y):
            return None
        # How the group adds up depends on the size, which nothing may in `batch_invariant`.
        return self.direct if y.numel() * y.element_size() <= MOST_BYTES or is_batch_invariant() else None


def _check_no_gradient(y: Tensor) -> None:
    """What ranks exchange leaves autograd's graph: gradients would be wrong and look right."""
    if y.requires_grad:
        raise ValueError(
            "a model that is cut over ranks has no gradients; run it in torch.no_grad(), or train with "
            "torch.distributed.tensor.parallel" + see("op-not-defined")
        )
