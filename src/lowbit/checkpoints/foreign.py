"""Directories that other tools wrote: a reader per `quant_method`, and what the readers have in common.

A reader says which tensors belong to a layer's weight and what they mean, as leaves of a format of lowbit, so that the
weight stays packed. It is strict: a key, a dtype, a shape or a tensor that it does not know is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lowbit.checkpoints.files import Files, TensorInfo
from lowbit.checkpoints.leaves import Leaf
from lowbit.checkpoints.manifest import StoredWeight
from lowbit.formats.elements import unpack_bits

Infos = Mapping[str, TensorInfo]


class Stored(NamedTuple):
    """A weight, and the tensors that it is stored as."""

    weight: StoredWeight
    leaves: list[Leaf]


class Reader(Protocol):
    """Made of a `quantization_config`; raises ValueError for what it does not know."""

    #: A layer that has a tensor of one of these names is quantized.
    marks: frozenset[str]

    def split(self, name: str) -> tuple[str, str]:
        """A tensor's name as layer and the name within it."""

    def parameter(self, layer: str) -> str:
        """The name of a layer's weight."""

    def weight(self, layer: str, within: Infos, files: Files, dtype: torch.dtype) -> Stored:
        """The weight of a layer with tensors `within`; `dtype` is what the model computes in.

        Raises:
            ValueError: the tensors are not what the config says.
        """


class OneLayerOneModule:
    """Names where tensors are parameters of their layer: `<layer>.<name>`."""

    def split(self, name: str) -> tuple[str, str]:
        layer, _, leaf = name.rpartition(".")
        return layer, leaf

    def parameter(self, layer: str) -> str:
        return f"{layer}.weight"


def only(section: Mapping[str, Any], known: Mapping[str, Iterable[Any]], ignored: Iterable[str] = ()) -> None:
    """That a config has no key but `known`, with one of the values given there, and `ignored` ones, which only record
    how a writer worked.

    Raises:
        ValueError: naming the entry.
    """
    unknown = sorted(set(section) - set(known) - set(ignored) - {"quant_method"})
    if unknown:
        raise ValueError(f"unknown keys {unknown}")
    for key, values in known.items():
        allowed = list(values)
        if key in section and not any(type(v) is type(section[key]) and v == section[key] for v in allowed):
            raise ValueError(f"{key} is {section[key]!r}, lowbit reads {', '.join(map(repr, allowed))}")


def sized(within: Infos, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of one of a layer's tensors.

    Raises:
        ValueError: it is missing or has another number of dimensions.
    """
    info = within.get(name)
    if info is None or len(info.shape) != dimensions or 0 in info.shape:
        raise ValueError(f"needs {dimensions}-D {name}, found {info or 'none'}")
    return info.shape


def float_scales(layer: str, within: Infos) -> torch.dtype:
    """The dtype of a layer's `scales`; that they are missing is said when they are read.

    Raises:
        ValueError: it is no float.
    """
    info = within.get("scales", TensorInfo(torch.float16, ()))
    if info.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{layer}.scales is {info}, expected a float")
    return info.dtype


def words(t: Tensor, bits: int) -> Tensor:
    """Unsigned codes of int32 words `(R, C)`, least significant first: uint8 `(R, C * 32 / bits)`."""
    return unpack_bits(t.contiguous().view(torch.uint8), bits, t.shape[1] * 32 // bits)


def transposed(t: Tensor) -> Tensor:
    """A transposed copy. Flat in between: the stride of a dimension of size 1 is arbitrary, and views care about it."""
    return t.t().reshape(-1).view(t.shape[1], t.shape[0])


def constant(name: str, expected: Tensor) -> Leaf:
    """A tensor that has to hold `expected` and means nothing else."""
    return Leaf(name, None, TensorInfo(expected.dtype, tuple(expected.shape)), lambda _: expected)
