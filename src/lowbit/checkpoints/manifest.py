"""`lowbit_manifest.json`: what was written, exactly, so that a reader can prove it has the same.

It lists every file with its SHA-256, every tensor with its dtype, its shape and a CRC-32, which says what is damaged in
a file that is, and for every quantized weight what is needed to rebuild it bit by bit. Its own checksum covers all of
that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from lowbit.checkpoints.files import (
    DTYPE_NAMES,
    DTYPES,
    MANIFEST,
    CheckpointError,
    Digest,
    TensorInfo,
    is_plain_name,
    json_bytes,
)
from lowbit.formats.activation import Activation, parse_activation
from lowbit.formats.base import Format, parse_format
from lowbit.tensor import QuantizedTensor

VERSION = 1
T = TypeVar("T")
#: What a quantized weight may compute in.
LOGICAL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class StoredWeight(NamedTuple):
    """A quantized weight without its planes.

    `exact` holds one-element planes whose stored form does not give them back to the last bit.
    """

    format: Format
    act: Activation | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    exact: Mapping[str, float] = {}

    @classmethod
    def of(cls, w: QuantizedTensor, exact: Mapping[str, float] | None = None) -> StoredWeight:
        return cls(w.format, w.act, tuple(w.shape), w.dtype, exact or {})

    @property
    def n(self) -> int:
        return self.shape[0]

    @property
    def k(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def static(self) -> bool:
        return self.act is not None and self.act.static

    @property
    def spec(self) -> str:
        """`int8:row->int4:g32`: activation, arrow, weight; the weight alone when activations are not quantized."""
        return f"{self.act.spec}->{self.format.spec}" if self.act else self.format.spec


def parse_spec(spec: object) -> tuple[Format, Activation | None]:
    """Inverse of `StoredWeight.spec`.

    Raises:
        ValueError: unknown format or activation, or a spelling that lowbit does not write.
    """
    if not isinstance(spec, str):
        raise ValueError(f"a format is a string such as 'int4:g128', found {spec!r}")
    act_spec, _, weight_spec = spec.rpartition("->")
    weight, act = parse_format(weight_spec), parse_activation(act_spec)
    if weight.spec != weight_spec or (act.spec if act else "") != act_spec:
        raise ValueError(f"format {spec!r} is not in its canonical spelling")
    return weight, act


@dataclass
class Manifest:
    """The parsed file. `tied` maps further names of a weight to the name it is stored under; `checks` has the CRC-32 of
    the tensors, which files of the first days lack."""

    tool: str
    files: dict[str, Digest] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    checks: dict[str, int] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        data: dict[str, Any] = {
            "format_version": VERSION,
            "tool": self.tool,
            "files": {name: {"sha256": d.sha256, "bytes": d.size} for name, d in self.files.items()},
            "tensors": {
                name: {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape)}
                | ({"crc32": self.checks[name]} if name in self.checks else {})
                for name, info in self.tensors.items()
            },
            "weights": {name: _weight_to_json(w) for name, w in self.weights.items()},
            "tied": self.tied,
        }
        return json_bytes(data | {"sha256": hashlib.sha256(json_bytes(data)).hexdigest()})

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The directory's manifest, or None where there is none.

        Raises:
            CheckpointError: it was changed, or comes from a newer format version.
        """
        try:
            raw = (directory / MANIFEST).read_bytes()
        except FileNotFoundError:
            return None
        try:
            return cls._parse(raw)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(directory, [f"{MANIFEST} is damaged: {what}"]) from None

    @classmethod
    def _parse(cls, raw: bytes) -> Manifest:
        data = json.loads(raw)
        version = data["format_version"]
        if version != VERSION:
            raise ValueError(f"format version {version!r}, this lowbit reads {VERSION}; install a newer one")
        body = {key: value for key, value in data.items() if key != "sha256"}
        # Compared as bytes as well: a flipped bit in white space, or a key given twice, must not pass either.
        if hashlib.sha256(json_bytes(body)).hexdigest() != data["sha256"] or json_bytes(data) != raw:
            raise ValueError("its own checksum does not match its content")
        unknown = set(body) - {"format_version", "tool", "files", "tensors", "weights", "tied"}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        if not all(is_plain_name(name) for name in data["files"]):
            raise ValueError("it lists files outside its directory")
        return cls(
            tool=str(data["tool"]),
            files={name: Digest(_is(str, f["sha256"]), _is(int, f["bytes"])) for name, f in data["files"].items()},
            tensors={name: TensorInfo(DTYPES[t["dtype"]], _shape(t["shape"])) for name, t in data["tensors"].items()},
            weights={name: _weight_from_json(w) for name, w in data["weights"].items()},
            tied={name: _is(str, other) for name, other in data["tied"].items()},
            checks={name: _is(int, t["crc32"]) for name, t in data["tensors"].items() if "crc32" in t},
        )


class Record(NamedTuple):
    """The part of the manifest without which weights cannot be rebuilt, for the metadata of files that another program
    writes."""

    weights: Mapping[str, StoredWeight]
    tied: Mapping[str, str]

    def to_text(self) -> str:
        weights = {name: _weight_to_json(w) for name, w in self.weights.items()}
        return json.dumps({"format_version": VERSION, "weights": weights, "tied": dict(self.tied)}, sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> Record:
        """Inverse of `to_text`.

        Raises:
            ValueError: anything else.
        """
        try:
            data = json.loads(text)
            if data.pop("format_version") != VERSION:
                raise ValueError(f"its format version is not {VERSION}")
            weights = {name: _weight_from_json(w) for name, w in data.pop("weights").items()}
            tied = {name: _is(str, other) for name, other in data.pop("tied").items()}
            if data:
                raise ValueError(f"unknown keys {sorted(data)}")
        except (TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"it is damaged: {error!r}") from None
        return cls(weights, tied)


def _weight_to_json(w: StoredWeight) -> dict[str, Any]:
    out = {"format": w.spec, "shape": list(w.shape), "dtype": DTYPE_NAMES[w.dtype]}
    return out | ({"exact": {name: value.hex() for name, value in w.exact.items()}} if w.exact else {})


def _weight_from_json(data: dict[str, Any]) -> StoredWeight:
    weight, act = parse_spec(data["format"])
    shape, dtype = _shape(data["shape"]), DTYPES[data["dtype"]]
    if len(shape) < 2 or dtype not in LOGICAL_DTYPES:
        raise ValueError(f"a weight cannot be {data['dtype']} {data['shape']}")
    exact = {name: float.fromhex(value) for name, value in data.get("exact", {}).items()}
    return StoredWeight(weight, act, shape, dtype, exact)


def _is(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value  # type: ignore[no-any-return]


def _shape(sizes: Any) -> tuple[int, ...]:
    shape = tuple(_is(int, size) for size in _is(list, sizes))
    if not all(0 <= size < 2**63 for size in shape):
        raise ValueError(f"a tensor cannot have shape {sizes}")
    return shape
