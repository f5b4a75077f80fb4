"""`QuantizedLinear`: a Linear whose quantized weight is not all that it multiplies by.

    y = Wq x + B (A x) + bias

with A `(r, K)` and B `(N, r)` in the dtype of the activations: low-rank error correction (algorithms/lowrank.py). It is
an `nn.Linear` still, with a `.weight` that knows nothing of A and B, so rules, hooks and `explain` find what they look
for. What reads the weight alone (joined projections, kernels that take codes, parts on ranks) asks for
`type(module) is nn.Linear` and leaves these layers whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

#: Names of what may lie beside a weight, as attributes of the layer and as ends of names in checkpoints.
BESIDE = ("lowrank_a", "lowrank_b")


class QuantizedLinear(nn.Linear):
    """See the module. Made by `put_beside_`, never by its constructor."""

    lowrank_a: nn.Parameter
    lowrank_b: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return self.around(input, lambda x: F.linear(x, self.weight))

    def around(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """What the layer gives for `x (..., K)`, where `product` is that with its weight, `(..., N)`."""
        y = product(x) + F.linear(F.linear(x, self.lowrank_a.to(x.dtype)), self.lowrank_b.to(x.dtype))
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.describe()}"

    def describe(self) -> str:
        """What lies beside the weight, in words."""
        return f"low-rank term of rank {self.lowrank_a.shape[0]}"


def beside(module: nn.Module) -> dict[str, Tensor]:
    """What lies beside a layer's weight, by name; of other modules, nothing."""
    return {name: getattr(module, name) for name in BESIDE} if isinstance(module, QuantizedLinear) else {}


def why_nothing_beside(module: nn.Module) -> str | None:
    """Why a module cannot become a `QuantizedLinear`, or None if it can."""
    # A class of its own may compute anything, which ours would replace.
    known = type(module) is nn.Linear
    return None if known else f"only nn.Linear itself can have more than a weight, this is {type(module).__name__}"


def put_beside_(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make an `nn.Linear` a `QuantizedLinear` with these tensors beside its weight.

    The module stays the object that it was, as with `torch.nn.utils.parametrize`: whatever holds it or hooks into it
    goes on doing so.
    """
    assert type(module) is nn.Linear
    module.__class__ = QuantizedLinear
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def misfit_beside(n: int, k: int, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why tensors of these shapes cannot lie beside a weight `(n, k)`, or None if they can."""
    a, b = (shapes.get(name) for name in BESIDE)
    rank = a[0] if a else 0
    if a == (rank, k) and b == (n, rank) and rank:
        return None
    return f"a low-rank term of a weight [{n}, {k}] is lowrank_a [r, {k}] and lowrank_b [{n}, r], found {dict(shapes)}"


def nbytes_beside(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
