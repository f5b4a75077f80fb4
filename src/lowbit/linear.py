"""`QuantizedLinear`: a Linear whose quantized weight is not all that it multiplies by.

    y = (Wq h + B (A h)) S^T + bias,    h = x R

R and S turn input and output: randomized Hadamard transforms (`decoder_ops.hadamard`), the weight being S^T W R (with
vectors as rows, as everywhere here). No channel of h stands out then, and no weight. A `(r, K)` and B `(N, r)` are
low-rank error correction (algorithms/lowrank.py). Each of the three may be missing, not all.

It is an `nn.Linear` still, with a `.weight` that knows nothing of this, so rules, hooks and `explain` find what they
look for. What reads the weight alone (joined projections, kernels that take codes, parts on ranks) asks for
`type(module) is nn.Linear` and leaves these layers whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.decoder_ops import hadamard

#: Names of what may lie beside a weight, as attributes of the layer and as ends of names in checkpoints.
LOW_RANK, SIGNS = ("lowrank_a", "lowrank_b"), ("input_signs", "output_signs")
BESIDE = (*LOW_RANK, *SIGNS)


class QuantizedLinear(nn.Linear):
    """See the module. Made by `put_beside_`, never by its constructor.

    Attributes:
        lowrank_a, lowrank_b: A and B in the dtype of the weight, or None.
        input_signs, output_signs: int8 `(K,)` and `(N,)` of 1 and -1, those of R and S, or None.
    """

    lowrank_a: nn.Parameter | None
    lowrank_b: nn.Parameter | None
    input_signs: Tensor | None
    output_signs: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return self.around(input, lambda x: F.linear(x, self.weight))

    def around(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """What the layer gives for `x (..., K)`, where `product` is that with its weight, `(..., N)`."""
        if self.input_signs is not None:
            x = hadamard(x, self.input_signs)
        y = product(x)
        if self.lowrank_a is not None and self.lowrank_b is not None:
            y = y + F.linear(F.linear(x, self.lowrank_a.to(x.dtype)), self.lowrank_b.to(x.dtype))
        if self.output_signs is not None:
            y = hadamard(y, self.output_signs, True)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.describe()}"

    def describe(self) -> str:
        """What lies beside the weight, in words."""
        sides = [name.removesuffix("_signs") for name in SIGNS if getattr(self, name) is not None]
        words = [f"a Hadamard transform of its {' and its '.join(sides)}"] if sides else []
        if self.lowrank_a is not None:
            words.append(f"a low-rank term of rank {self.lowrank_a.shape[0]}")
        return " and ".join(words)


def random_signs(k: int, seed: int = 0, device: torch.device | None = None) -> Tensor:
    """int8 `(k,)`, each 1 or -1."""
    signs = torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8) * 2 - 1
    return signs.to(device)


def turned_weight(w: Tensor, input_signs: Tensor, output_signs: Tensor | None = None) -> Tensor:
    """fp64 `(N, K)`: what reads `x R` as `w (N, K)` reads x, and gives `y S` where that gives y."""
    turned = hadamard(w.double(), input_signs)
    return turned if output_signs is None else hadamard(turned.T, output_signs).T.contiguous()


def turned_moment(square: Tensor, input_signs: Tensor) -> Tensor:
    """`(K, K)`: `X^T X` of the inputs `x R`, from that of x."""
    return hadamard(hadamard(square, input_signs).T, input_signs)


def beside(module: nn.Module) -> dict[str, Tensor]:
    """What lies beside a layer's weight, by name; of other modules, nothing."""
    if not isinstance(module, QuantizedLinear):
        return {}
    found = {name: getattr(module, name) for name in BESIDE}
    return {name: t for name, t in found.items() if t is not None}


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
    for name in LOW_RANK:
        tensor = tensors.get(name)
        module.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
    for name in SIGNS:
        module.register_buffer(name, tensors.get(name))


def misfit_beside(n: int, k: int, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str | None:
    """Why tensors of these dtypes and shapes cannot lie beside a weight `(n, k)`, or None if they can."""
    shapes = {name: shape for name, (_, shape) in found.items()}
    a, b = (shapes.get(name) for name in LOW_RANK)
    rank = a[0] if a else 0
    if (a or b) and not (a == (rank, k) and b == (n, rank) and rank):
        return f"a low-rank term of a weight [{n}, {k}] is lowrank_a [r, {k}] and lowrank_b [{n}, r], found {shapes}"
    for name, size in zip(SIGNS, (k, n)):
        if found.get(name, (torch.int8, (size,))) != (torch.int8, (size,)):
            return f"{name} of a weight [{n}, {k}] are int8 [{size}], found {found[name]}"
    return None


def nbytes_beside(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
