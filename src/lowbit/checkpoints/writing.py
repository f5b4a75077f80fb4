"""What a model's tensors become on disk, and what keeps them from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoints import compressed_tensors as ct
from lowbit.checkpoints import leaves as own
from lowbit.checkpoints.config_groups import section
from lowbit.checkpoints.files import (
    CONFIG,
    DTYPE_NAMES,
    INDEX,
    MANIFEST,
    CheckpointError,
    Pending,
    TensorInfo,
    is_ours,
)
from lowbit.checkpoints.leaves import ACT_SCALE, Leaf
from lowbit.checkpoints.manifest import LOGICAL_DTYPES, Manifest, StoredWeight, parse_spec
from lowbit.linear import beside
from lowbit.tensor import QuantizedTensor


@dataclass
class Plan:
    """A checkpoint to be: its tensors, its quantized weights, further names of tied ones, and its config section."""

    tensors: dict[str, Pending]
    weights: dict[str, StoredWeight]
    tied: dict[str, str]
    section: dict[str, Any] | None


def plan(model: nn.Module, path: Path) -> Plan:
    """How to store a model. Nothing is converted or copied yet.

    Raises:
        CheckpointError: listing every tensor that cannot be stored.
    """
    state, tied = _untied(model)
    problems = [p for name, value in state.items() for p in _unfit(name, value)]
    if problems:
        raise CheckpointError(path, problems)
    weights = {n: StoredWeight.of(t) for n, t in state.items() if isinstance(t, QuantizedTensor)}
    layers = dict(model.named_modules())
    standard = all(_only_linear(layers, name, tied) and ct.expressible(w) for name, w in weights.items())
    tensors: dict[str, Pending] = {}
    for name, value in state.items():
        parts = {name: Pending(TensorInfo(value.dtype, tuple(value.shape)), lambda t=value: t)}  # type: ignore[misc]
        if isinstance(value, QuantizedTensor):
            leaves = ct.leaves(name, weights[name]) if standard else own.canonical_leaves(name, weights[name])
            weights[name] = StoredWeight.of(value, _inexact(leaves, value))
            parts = {leaf.name: Pending(leaf.info, lambda leaf=leaf, w=value: _stored(leaf, w)) for leaf in leaves}  # type: ignore[misc]
        clash = sorted(set(parts) & set(tensors))
        if clash:
            raise CheckpointError(path, [f"two tensors would be stored as {clash[0]}; rename one of the modules"])
        tensors |= parts
    if not weights:
        return Plan(tensors, weights, tied, None)
    if standard:
        names = [name.removesuffix(".weight") for name in weights]
        by_class = all(type(layers[name]) is nn.Linear for name in names) and not _has_experts(model)
        return Plan(tensors, weights, tied, section(weights, _plain_linears(model), by_class))
    return Plan(tensors, weights, tied, own.canonical_section(weights, tensors))


def replaceable(path: Path) -> list[str]:
    """Files of an older checkpoint of lowbit that a new one replaces.

    Raises:
        CheckpointError: there are weights of another origin, which are not lowbit's to delete.
    """
    if not path.is_dir():
        return []
    try:
        manifest = Manifest.read(path)
    except CheckpointError:
        manifest = None
    listed = set(manifest.files) if manifest else set()
    found = sorted(p for p in path.iterdir() if p.suffix == ".safetensors" or p.name == INDEX)
    foreign = [p.name for p in found if p.name not in listed and not is_ours(p)]
    if foreign:
        raise CheckpointError(path, [f"holds {', '.join(foreign)}, which is not lowbit's; save to another directory"])
    # An interrupted save may have left weights without a manifest.
    return [CONFIG, MANIFEST, *(p.name for p in found)] if found else []


def _untied(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The state dict with every tensor once, and the other names of those that have several."""
    state: dict[str, Any] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and first.setdefault(id(value), name) != name:
            tied[name] = first[id(value)]
        else:
            state[name] = value
    return state, tied


def _unfit(name: str, value: Any) -> list[str]:
    """Why a value cannot be stored; empty if it can."""
    if not isinstance(value, Tensor):
        return [f"{name} is a {type(value).__name__}; only tensors can be stored"]
    if value.is_meta:
        return [f"{name} is on the meta device and has no values; load the model first"]
    if not isinstance(value, QuantizedTensor):
        known = value.dtype in DTYPE_NAMES and value.layout == torch.strided
        return [] if known else [f"{name} is a {value.layout} tensor of {value.dtype}, which safetensors cannot hold"]
    if value.transposed:
        return [f"{name} is a transposed view; store the weight itself"]
    try:
        known = parse_spec(StoredWeight.of(value).spec) == (value.format, value.act)
    except ValueError:
        known = False
    if not known:
        return [f"{name} has format {value.format.spec}, which is not registered, so that nothing could load it"]
    if value.dtype not in LOGICAL_DTYPES:
        return [f"{name} computes in {value.dtype}; quantized weights compute in bf16, fp16 or fp32: use .to(dtype)"]
    return _bad_scales(name, value)


def _bad_scales(name: str, w: QuantizedTensor) -> list[str]:
    """NaN, Inf and zero scales. Zero is allowed where codes cannot say it: one bit, symmetric."""
    problems = []
    has_zero = getattr(w.format.element, "step", 1) == 1
    named = {p.name: w.planes[p.name] for p in w.format.scale_planes}
    if w.act_scale is not None:
        named[ACT_SCALE] = w.act_scale
    elif w.act is not None and w.act.static:
        problems.append(f"{name}: {w.act.spec} needs a calibrated activation scale, found none")
    for plane, t in named.items():
        if not t.is_floating_point():
            continue
        values = t.detach().float()
        bad = int((~values.isfinite()).sum())
        if bad:
            problems.append(f"{name}: {plane} ({w.format.spec}) holds {bad} NaN or Inf of {t.numel()} values")
        zero = int((values == 0).sum()) if plane in ("scale", "outer_scale", ACT_SCALE) and has_zero else 0
        if zero:
            problems.append(f"{name}: {plane} ({w.format.spec}) holds {zero} zeros of {t.numel()} values")
    return problems


def _only_linear(layers: Mapping[str, nn.Module], parameter: str, tied: Mapping[str, str]) -> bool:
    """Whether a parameter is the weight of one Linear and nothing else, the only place where engines look for codes,
    and all that the layer multiplies by."""
    layer, _, leaf = parameter.rpartition(".")
    if not layer or leaf != "weight" or parameter in tied.values():
        return False
    return isinstance(layers[layer], nn.Linear) and not beside(layers[layer])


def _source(leaf: Leaf, w: QuantizedTensor) -> Tensor:
    if leaf.plane == ACT_SCALE:
        assert w.act_scale is not None
        return w.act_scale.detach().float().reshape(1, 1)
    return w.planes[leaf.plane].detach() if leaf.plane is not None else torch.empty(0)


def _stored(leaf: Leaf, w: QuantizedTensor) -> Tensor:
    return leaf.to_disk(_source(leaf, w))


def _inexact(leaves: list[Leaf], w: QuantizedTensor) -> dict[str, float]:
    """Planes of one element that their stored form would give back with another last bit."""
    out = {}
    for leaf in leaves:
        if leaf.inexact and leaf.plane is not None:
            value = _source(leaf, w)
            if not torch.equal(leaf.from_disk(leaf.to_disk(value)), value):
                out[leaf.plane] = float(value)
    return out


def _has_experts(model: nn.Module) -> bool:
    """Whether there are weights of several matrices in one tensor, which readers that split them up take for linear
    layers: a group that names the class would then include them."""
    return any(
        p.dim() == 3 and not isinstance(p, QuantizedTensor)
        for module in model.modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for p in module.parameters(recurse=False)
    )


def _plain_linears(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module.weight, QuantizedTensor)
    ]
