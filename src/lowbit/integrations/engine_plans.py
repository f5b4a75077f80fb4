"""What a serving engine is told of a model's layers, by any engine: which layer is what, or becomes what.

The names of layers are those of the checkpoint, as the engine's model has them. An engine holds some of them in one
layer of its own (query, key and value); `Plan.parts` says whether it can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from lowbit.checkpoints import compressed_tensors as ct
from lowbit.checkpoints import leaves as own
from lowbit.checkpoints.config_groups import Section
from lowbit.checkpoints.files import CheckpointError
from lowbit.checkpoints.leaves import Leaf
from lowbit.checkpoints.manifest import VERSION, StoredWeight, parse_spec
from lowbit.configs import Config, Scheme
from lowbit.errors import see
from lowbit.specs import parse_config

#: What a layer does: "head" is an output projection, which multiplies by a table of the vocabulary.
Kind = Literal["linear", "head", "embedding"]
Exact = Mapping[str, Mapping[str, float]]


class Stored(NamedTuple):
    """How a checkpoint holds the weights of one layer of an engine.

    Attributes:
        leaves: the convention: what a weight consists of.
        any_scale: whether scales in fp32 may be stored in 16 bits, and the other way round.
        exact: for each layer of the checkpoint, what the manifest knows better than the stored tensors.
    """

    leaves: Callable[[str, StoredWeight], list[Leaf]]
    any_scale: bool = False
    exact: Sequence[Mapping[str, float]] = ()


class Plan(Protocol):
    """What is said of layers."""

    #: Layers that are named one by one; an embedding is quantized only if it is among them.
    named: list[str]

    def scheme(self, layer: str, kind: Kind) -> Scheme | None:
        """What a layer is, or becomes; None: it is not quantized."""

    def stored(self, names: Sequence[str], exact: Exact) -> Stored | None:
        """How the checkpoint holds these layers; None: as floats, which are quantized while they are loaded."""

    def renamed(self, name_of: Callable[[str], str]) -> Plan:
        """The same under the engine's names; patterns stay as they are."""


class Own:
    """A directory in lowbit's own convention: the format of each weight."""

    def __init__(self, weights: Mapping[str, str]) -> None:
        self.weights = dict(weights)
        self.schemes = {name: Scheme(*parse_spec(spec)) for name, spec in self.weights.items()}
        self.named = [name.removesuffix(".weight") for name in self.weights]

    def scheme(self, layer: str, kind: Kind) -> Scheme | None:
        return self.schemes.get(f"{layer}.weight")

    def stored(self, names: Sequence[str], exact: Exact) -> Stored | None:
        return Stored(own.canonical_leaves)

    def renamed(self, name_of: Callable[[str], str]) -> Own:
        return Own({name_of(name): spec for name, spec in self.weights.items()})


class Standard:
    """A directory of compressed-tensors: groups of layers by name, pattern or class."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self.named = [t for group in section.groups for t in group.targets if not t.startswith("re:")]

    def scheme(self, layer: str, kind: Kind) -> Scheme | None:
        group = self.section.group_of(layer)
        if group is None or (kind == "embedding" and layer not in group.targets):
            return None
        return Scheme(group.weight, group.act)

    def stored(self, names: Sequence[str], exact: Exact) -> Stored | None:
        return Stored(ct.leaves, True, [exact.get(f"{name}.weight", {}) for name in names])

    def renamed(self, name_of: Callable[[str], str]) -> Standard:
        return Standard(self.section.renamed(name_of))


class Asked:
    """A float checkpoint, to be quantized by one config, or by rules as `quantize_` takes them."""

    def __init__(self, config: str | Mapping[str, str | None]) -> None:
        self.everywhere: Config | None = parse_config(config) if isinstance(config, str) else None
        rules: Mapping[str, str | None] = {} if isinstance(config, str) else config
        self.rules = {name: None if rule is None else parse_config(rule) for name, rule in rules.items()}
        self.named = [name for name in self.rules if _is_name(name)]
        self._used: set[str] = {"_default"}  # it may have nothing left to do
        self._seen: list[str] = []
        for rule in [self.everywhere, *self.rules.values()]:
            if rule is not None and rule.scheme.act is not None and rule.scheme.act.static:
                raise ValueError(
                    f"quantization_config: {rule.spec} needs calibrated activation scales, which loading cannot find; "
                    "calibrate, quantize and save the model with lowbit, and serve that" + see("missing-calibration")
                )

    def scheme(self, layer: str, kind: Kind) -> Scheme | None:
        config = self._rule(layer, kind)
        if config is not None and config.scheme.act is not None and kind == "embedding":
            raise ValueError(
                f"{layer}: an embedding has no activations to quantize, got {config.spec}; use a weight-only config"
                + see("layer-not-quantizable")
            )
        return None if config is None else config.scheme

    def _rule(self, layer: str, kind: Kind) -> Config | None:
        self._seen.append(layer)
        if kind == "linear" and self.everywhere is not None:
            return self.everywhere
        patterns = (rule for rule in self.rules if rule.startswith("re:") and re.fullmatch(rule[3:], layer))
        if layer in self.rules:
            key = layer
        elif kind == "embedding":
            return None
        else:
            key = next(patterns, "_default")
        self._used.add(key)
        return self.rules.get(key)

    def check_used(self) -> None:
        """After every layer of the model was asked for.

        Raises:
            ValueError: naming the rules that reached no layer.
        """
        if unmatched := [rule for rule in self.rules if rule not in self._used]:
            shown = ", ".join(self._seen[:6]) + (", ..." if len(self._seen) > 6 else "")
            raise ValueError(
                f"quantization_config: rules that match no layer: {unmatched}; layers are named {shown}"
                + see("rule-without-match")
            )

    def stored(self, names: Sequence[str], exact: Exact) -> Stored | None:
        return None

    def renamed(self, name_of: Callable[[str], str]) -> Asked:
        other = Asked({})
        other.everywhere = self.everywhere
        other.rules = {name_of(rule) if _is_name(rule) else rule: config for rule, config in self.rules.items()}
        other.named = [name for name in other.rules if _is_name(name)]
        return other


def _is_name(rule: str) -> bool:
    return not rule.startswith("re:") and rule != "_default"


def plan_of_section(config: Mapping[str, Any], added: Iterable[str] = ()) -> Plan:
    """The plan that a `quantization_config` means.

    Args:
        added: keys that the engine adds to it.

    Raises:
        CheckpointError: it is neither what lowbit or compressed-tensors writes nor
            `{"quant_method": "lowbit", "config": ...}`, or there is something in it that lowbit does not read.
        ValueError: an unknown config, or one that needs calibration.
    """
    said = {key: value for key, value in config.items() if key not in added}
    method, rest = said.get("quant_method"), {key: value for key, value in said.items() if key != "quant_method"}
    if method == own.METHOD and rest.keys() == {"config"} and isinstance(rest["config"], (str, Mapping)):
        return Asked(rest["config"])
    try:
        if method == ct.METHOD:
            return Standard(Section(rest))
        if method == own.METHOD and (more := rest.get("beside")):
            layer, ends = next(iter(more.items()))
            raise ValueError(f"{layer} has {', '.join(ends)} beside its weight, which engines do not run")
        if method == own.METHOD and rest.keys() == {"format_version", "weights"} and rest["format_version"] == VERSION:
            return Own(rest["weights"])
    except (ValueError, TypeError) as error:
        raise CheckpointError("quantization_config", [str(error)]) from None
    expected = f"what lowbit (version {VERSION}) or compressed-tensors writes, or a config to quantize by"
    raise CheckpointError("quantization_config", [f"expected {expected}, found {said}"])


def layers_of(plan: Plan, prefix: str, kind: Kind, merged: Mapping[str, Sequence[str]], engine: str) -> list[str]:
    """The layers of the checkpoint that the engine's layer `prefix` holds.

    Args:
        merged: the last part of a merged layer's name -> those of its parts.
        engine: its name, for errors.

    Raises:
        ValueError: the engine does not name its embedding, and several of the plan's might be meant.
    """
    owner, _, last = prefix.rpartition(".")
    if kind == "embedding" and not prefix:
        # Several models do not tell their embedding its name.
        found = [name for name in plan.named if name.rpartition(".")[2] == "embed_tokens"]
        if len(found) > 1:
            raise ValueError(
                f"{engine}'s model does not name its embedding, which may be each of {', '.join(found)}"
                + see("layer-not-quantizable")
            )
        return found
    if last in merged and prefix not in plan.named:
        return [f"{owner}.{part}" if owner else part for part in merged[last]]
    return [prefix]


def one_scheme(plan: Plan, prefix: str, names: Sequence[str], kind: Kind, engine: str) -> Scheme | None:
    """The scheme of one layer of the engine; None: it is not quantized.

    Raises:
        ValueError: its parts have different ones.
    """
    schemes = {name: plan.scheme(name, kind) for name in names}
    first = next(iter(schemes.values()), None)
    if any(scheme != first for scheme in schemes.values()):
        found = ", ".join(f"{name} is {scheme.spec if scheme else 'float'}" for name, scheme in schemes.items())
        raise ValueError(
            f"{prefix}: {engine} holds these in one layer, and they are quantized differently: {found}; give them the "
            "same config" + see("format-mismatch")
        )
    return first


def has_experts(plan: Plan, prefix: str, exact: Exact | None) -> bool:
    """Whether the plan quantizes experts below `prefix`."""
    if any(name.startswith(f"{prefix}.") for name in [*plan.named, *(exact or ())]):
        return True
    # A group for every Linear means experts, too, unless a manifest says that it met none.
    return exact is None and isinstance(plan, Standard) and plan.scheme(f"{prefix}.0.up_proj", "linear") is not None
