"""Which tensors of a model are quantized weights, whoever quantized them.

Two ways of storing one are known: a tensor subclass that flattens to fewer bytes than a float tensor of its shape
(lowbit's, torchao's, either inside a DTensor), and a module that holds integer or float8 tensors next to their scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowbit.tensor import QuantizedTensor

#: Dtypes of stored codes. int64 and bool are indices and masks.
CODES = {torch.int8, torch.uint8, torch.int16, torch.int32}
_NAMES = [name for name in dir(torch) if name.startswith(("float8_", "float4_"))]
FLOAT_CODES = {dtype for name in _NAMES if isinstance(dtype := getattr(torch, name), torch.dtype)}
_SIZES = (("out_features", "in_features"), ("outfeatures", "infeatures"), ("num_embeddings", "embedding_dim"))
#: Fewer codes than this are a table or a counter, no weight.
_FEWEST = 64


@dataclass(frozen=True)
class Layer:
    """A module that has a weight.

    Attributes:
        name: of the module.
        kind: class of the module.
        scheme: how the weight is stored, in words; its dtype if it is not quantized.
        elements: number of weights; of packed codes whose module does not tell its sizes, the least it can be.
        stored_bytes: bytes of everything that is stored for the weight, scales included.
        quantized: whether it is.
        also: other names of a shared weight.
        lookups: those of its names that are embeddings, which read only the rows that are asked for.
    """

    name: str
    kind: str
    scheme: str
    elements: int
    stored_bytes: int
    quantized: bool
    also: tuple[str, ...] = ()
    lookups: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name, then the others."""
        return (self.name, *self.also)

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.stored_bytes / self.elements


@dataclass
class Found:
    """The layers of a model, and the tensors to follow: `codes` of each quantized layer."""

    layers: list[Layer] = field(default_factory=list)
    codes: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def quantized(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.quantized]


def find_layers(model: nn.Module) -> Found:
    """Every module with a weight of two or more dimensions, or with codes."""
    found, owners = Found(), dict[int, int]()
    for name, module in model.named_modules():
        tensors = dict(_direct(module))
        layer, codes = _examine(name, module, tensors)
        if layer is None:
            continue
        if isinstance(module, nn.Embedding):
            layer = replace(layer, lookups=(name,))
        key = codes[0].untyped_storage()._cdata if codes else id(tensors["weight"])
        if key in owners:
            first = found.layers[owners[key]]
            both = replace(first, also=(*first.also, name), lookups=first.lookups + layer.lookups)
            found.layers[owners[key]] = both
            continue
        owners[key] = len(found.layers)
        found.layers.append(layer)
        if layer.quantized:
            found.codes[name] = codes
    return found


def state_tensors(model: nn.Module) -> Iterator[Tensor]:
    """All plain tensors that a model is made of: parameters, buffers and attributes, subclasses taken apart."""
    for module in model.modules():
        for _, tensor in _direct(module):
            yield from leaves(tensor)


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors inside a tensor."""
    if is_traceable_wrapper_subclass(tensor):
        for attribute in tensor.__tensor_flatten__()[0]:
            yield from leaves(getattr(tensor, attribute))
    else:
        yield tensor


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _direct(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors by name; also those that a library hung there without registering them."""
    for names in (module._parameters, module._buffers, vars(module)):
        for name, value in names.items():
            if isinstance(value, Tensor):
                yield name, value


def _examine(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> tuple[Layer | None, list[Tensor]]:
    kind = type(module).__name__
    for tensor in tensors.values():
        if is_traceable_wrapper_subclass(tensor) and tensor.is_floating_point():
            parts = list(leaves(tensor))
            stored = sum(nbytes(p) for p in parts)
            codes = [p for p in parts if _is_code(p)]
            if codes and stored < nbytes(tensor):
                return Layer(name, kind, _scheme(tensor), tensor.numel(), stored, True), codes
    plain = {n: t for n, t in tensors.items() if not is_traceable_wrapper_subclass(t)}
    codes = [t for t in plain.values() if _is_code(t) and t.numel() >= _FEWEST]
    codes.sort(key=nbytes, reverse=True)
    scales = {n: t for n, t in plain.items() if t.is_floating_point() and not _is_code(t) and n != "bias"}
    sizes, elements = _sizes(module), 0
    if codes:
        elements = math.prod(sizes) if sizes else codes[0].numel() * codes[0].element_size()
    # Codes without a known size, a scale or a dtype of their own may be anything; next to a whole weight in floating
    # point they are a mask.
    known = bool(sizes or scales) or (bool(codes) and codes[0].dtype in FLOAT_CODES)
    if codes and known and not any(t.numel() >= elements for t in scales.values()):
        stored = sum(nbytes(t) for t in (*codes, *scales.values()))
        dtype = str(codes[0].dtype).removeprefix("torch.")
        return Layer(name, kind, f"{dtype} tensors", elements, stored, True), codes
    weight = tensors.get("weight")
    if weight is not None and weight.dim() >= 2:
        dtype = str(weight.dtype).removeprefix("torch.")
        return Layer(name, kind, dtype, weight.numel(), nbytes(weight), False), []
    return None, []


def _is_code(tensor: Tensor) -> bool:
    return tensor.dtype in CODES or tensor.dtype in FLOAT_CODES


def _scheme(tensor: Tensor) -> str:
    if isinstance(tensor, QuantizedTensor):
        return tensor.format.spec + (f" + {tensor.act.spec}" if tensor.act else "")
    inner = tensor
    while type(inner).__name__ == "DTensor":
        inner = getattr(inner, inner.__tensor_flatten__()[0][0])  # type: ignore[attr-defined]
    return _scheme(inner) if isinstance(inner, QuantizedTensor) else type(inner).__name__


def _sizes(module: nn.Module) -> tuple[int, ...]:
    """N and K, where the module says them."""
    for n, k in _SIZES:
        sizes = getattr(module, n, None), getattr(module, k, None)
        if all(isinstance(s, int) for s in sizes):
            return sizes  # type: ignore[return-value]
    return ()
