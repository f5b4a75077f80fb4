"""`quantization_config` of compressed-tensors: written, and read strictly.

Anything in it that lowbit would not write itself, and that is no mere record of how a writer found its numbers, is an
error that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.compressed_tensors import METHOD, Args, Description, describe, expressible, leaves, resolve
from lowbit.checkpoints.files import Files, TensorInfo
from lowbit.checkpoints.foreign import Infos, OneLayerOneModule, Stored
from lowbit.checkpoints.manifest import StoredWeight
from lowbit.formats.activation import Activation
from lowbit.formats.base import Format
from lowbit.formats.int import SCALE_DTYPES, IntFormat


def section(weights: Mapping[str, StoredWeight], ignore: list[str], by_class: bool) -> Args:
    """`quantization_config` for weights that are all `expressible`.

    Args:
        ignore: names of linear layers that are not quantized.
        by_class: every quantized layer is plainly an `nn.Linear`, so that one group may name the class.
    """
    groups: dict[str, tuple[Description, list[str]]] = {}
    for name, w in weights.items():
        known = describe(w.format, w.act)
        assert known is not None
        groups.setdefault(json.dumps(known, sort_keys=True), (known, []))[1].append(name.removesuffix(".weight"))
    formats = sorted({known.format for known, _ in groups.values()})
    whole = len(groups) == 1 and by_class
    return {
        "quant_method": METHOD,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if whole else layers,
                "weights": known.weights,
                "input_activations": known.input_activations,
                "output_activations": None,
                "format": known.format,
            }
            for i, (known, layers) in enumerate(groups.values())
        },
    }


_DEFAULTS: Args = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
_ARGS = {*_DEFAULTS, "strategy", "group_size", "block_structure", "scale_dtype", "actorder"}
# How a writer found its numbers; the stored ones mean the same whatever it says.
_CALIBRATION = {"observer", "observer_kwargs", "zp_dtype"}
_SECTION = {"quant_method", "format", "quantization_status", "ignore", "config_groups"}
_MAY_BE_EMPTY = {"kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"}
_INFORMATION = {"global_compression_ratio", "version"}
_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}


def plain_args(args: Mapping[str, Any]) -> Args:
    """`weights` or `input_activations` of another writer with defaults filled in and empty entries left out.

    Raises:
        ValueError: an argument that is unknown, or that changes what the bits mean in a way that lowbit does not read.
    """
    if not isinstance(args, Mapping):
        raise ValueError(f"arguments must be an object, found {args!r}")
    unknown = set(args) - _ARGS - _CALIBRATION
    if unknown:
        raise ValueError(f"unknown arguments {sorted(unknown)}")
    out = {key: value for key, value in args.items() if key in _ARGS and value is not None}
    order = out.pop("actorder", None)
    if order not in (None, False, "weight", "static"):
        raise ValueError(f"actorder {order!r} permutes the columns, which is not supported")
    if out.get("group_size") == -1:
        del out["group_size"]
    size = out.get("group_size", 1)
    if type(size) is not int or size < 1:
        raise ValueError(f"group_size must be a positive number, found {size!r}")
    if "strategy" not in out:
        raise ValueError("no strategy")
    return _DEFAULTS | out


@dataclass(frozen=True)
class Group:
    """One entry of `config_groups`."""

    name: str
    targets: tuple[str, ...]
    description: Description
    weight: Format
    act: Activation | None

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.targets)

    def rank(self, layer: str) -> int | None:
        """How closely a target names the layer: 0 its name, 1 a pattern, 2 a class; None if none does."""
        if layer in self._names:
            return 0
        if any(_matches(target, layer) for target in self.targets):
            return 1
        return 2 if "Linear" in self._names else None


def _matches(target: str, layer: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], layer) is not None


class Section(OneLayerOneModule):
    """A parsed `quantization_config`; anything in it that is not understood is an error.

    Raises:
        ValueError: naming the entry.
    """

    marks = frozenset({"weight_packed", "weight_scale"})

    def __init__(self, config: Mapping[str, Any]) -> None:
        unknown = set(config) - _SECTION - _MAY_BE_EMPTY - _INFORMATION
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        for key in sorted(_MAY_BE_EMPTY & set(config)):
            if config[key] not in (None, {}, {"format": "dense"}):
                raise ValueError(f"{key} is set, which is not supported")
        if config.get("quantization_status") != "compressed":
            raise ValueError(f"quantization_status must be 'compressed', found {config.get('quantization_status')!r}")
        ignore, groups = config.get("ignore") or [], config.get("config_groups")
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ValueError(f"ignore must be a list of names, found {ignore!r}")
        if not isinstance(groups, Mapping):
            raise ValueError(f"config_groups must be an object, found {groups!r}")
        self.ignore = tuple(ignore)
        self.groups = [_parse_group(name, group, config.get("format")) for name, group in groups.items()]
        for pattern in (*self.ignore, *(t for g in self.groups for t in g.targets)):
            if pattern.startswith("re:"):
                _compile(pattern)

    def group_of(self, layer: str) -> Group | None:
        """The group whose target names the layer most closely, the first of equals; None if it is ignored."""
        if layer in self.ignore or any(_matches(i, layer) for i in self.ignore):
            return None
        ranked = [(rank, i) for i, g in enumerate(self.groups) if (rank := g.rank(layer)) is not None]
        return self.groups[min(ranked)[1]] if ranked else None

    def renamed(self, name_of: Callable[[str], str]) -> Section:
        """The same section for a model whose layers have other names; patterns stay as they are."""

        def names(targets: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(t if t.startswith("re:") else name_of(t) for t in targets)

        other = copy(self)
        other.ignore = names(self.ignore)
        other.groups = [replace(group, targets=names(group.targets)) for group in self.groups]
        return other

    def weight(self, layer: str, within: Infos, files: Files, dtype: torch.dtype) -> Stored:
        """A layer of a directory without a manifest."""
        group = self.group_of(layer)
        if group is None:
            raise ValueError(f"{layer} has quantized tensors, but no group of config.json names it")
        shape = files.get(f"{layer}.weight_shape") if "weight_shape" in within else None
        w = infer(layer, group, within, shape, dtype)
        if not expressible(w):
            raise ValueError(f"{layer}: {w.spec} does not fit a weight of shape {list(w.shape)}")
        return Stored(w, leaves(f"{layer}.weight", w))


def _compile(pattern: str) -> None:
    try:
        re.compile(pattern[3:])
    except re.error as error:
        raise ValueError(f"target {pattern!r} is not a pattern: {error}") from None


def _parse_group(name: str, group: Any, top_format: Any) -> Group:
    if not isinstance(group, Mapping):
        raise ValueError(f"config_groups.{name}: expected an object with weights, found {group!r}")
    unknown = set(group) - _GROUP
    if unknown:
        raise ValueError(f"config_groups.{name}: unknown keys {sorted(unknown)}")
    if group.get("output_activations") is not None:
        raise ValueError(f"config_groups.{name}: output_activations are not supported")
    targets = group.get("targets")
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"config_groups.{name}: targets must be a list of names, found {targets!r}")
    try:
        weights = plain_args(group.get("weights"))  # type: ignore[arg-type]
        acts = group.get("input_activations")
        found = Description(group.get("format") or top_format, weights, None if acts is None else plain_args(acts))
        if found.format == "naive-quantized" and weights["type"] == "float":
            found = found._replace(format="float-quantized")  # the same tensors under an older name
        scheme = resolve(found)
    except ValueError as error:
        raise ValueError(f"config_groups.{name}: {error}") from None
    if scheme is None:
        raise ValueError(
            f"config_groups.{name}: lowbit does not read format {found.format!r} with weights {found.weights} and "
            f"input_activations {found.input_activations}"
        )
    return Group(name, tuple(targets), found, *scheme)


def agrees(group: Group | None, w: StoredWeight) -> bool:
    """Whether a group of the config says the same as the manifest."""
    known = describe(w.format, w.act)
    if group is None or known is None:
        return False
    ours, theirs = describe(group.weight, group.act), known
    return ours == theirs


def infer(
    layer: str, group: Group, info: Mapping[str, TensorInfo], shape: Tensor | None, dtype: torch.dtype
) -> StoredWeight:
    """The weight that another writer's tensors `info` (by their names within the layer) stand for.

    Args:
        shape: the tensor `weight_shape`, where there is one.
        dtype: what the layer computes in.

    Raises:
        ValueError: tensors that every scheme has are missing.
    """
    codes = info.get("weight_packed") or info.get("weight")
    scale = info.get("weight_scale")
    if codes is None or scale is None or len(codes.shape) != 2:
        raise ValueError(f"{layer}: needs 2-D codes and weight_scale, found {', '.join(sorted(info)) or 'nothing'}")
    n, k = codes.shape
    weight = group.weight
    if group.description.format == "pack-quantized":
        if shape is None or shape.numel() != 2:
            raise ValueError(f"{layer}: weight_shape must hold two sizes")
        n, k = (int(size) for size in shape)
    elif "weight_packed" in info:
        k *= 2
    if isinstance(weight, IntFormat) and scale.dtype in SCALE_DTYPES.values():
        weight = replace(weight, scale_dtype=scale.dtype)
    if min(n, k) < 1:
        raise ValueError(f"{layer}: a weight cannot have shape {[n, k]}")
    return StoredWeight(weight, group.act, (n, k), dtype)
