"""lowbit as a quantization method of vLLM: a plugin, which vLLM finds by its entry point and calls in every process.

    LLM("small")                                       # a directory in lowbit's own convention
    LLM("small", quantization="lowbit")                # one of compressed-tensors, by lowbit's kernels
    LLM("model", hf_overrides={"quantization_config": {"quant_method": "lowbit", "config": "int4wo-128"}})

The last quantizes a float checkpoint while it is loaded. Nothing of vLLM is replaced: a directory of compressed-tensors
stays with vLLM's own kernels unless lowbit is asked for by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from lowbit.checkpoints import compressed_tensors as ct
from lowbit.checkpoints import leaves as own
from lowbit.checkpoints.config_groups import Section
from lowbit.checkpoints.files import CheckpointError
from lowbit.checkpoints.manifest import VERSION, Manifest, parse_spec
from lowbit.configs import Config, Scheme
from lowbit.errors import see
from lowbit.formats.base import registered
from lowbit.integrations.vllm_layers import FloatHead, LowbitMethod, LowbitOnlineMethod, LowbitStoredMethod
from lowbit.specs import parse_config

__all__ = ["LowbitConfig", "register"]

logger = init_logger(__name__)


class Plan(Protocol):
    """What is said of layers, by their names in the checkpoint as vLLM's model has them."""

    #: Layers that are named one by one; an embedding is quantized only if it is among them.
    named: list[str]

    def scheme(self, layer: str, kind: type[nn.Module]) -> Scheme | None:
        """What a layer of vLLM's class `kind` is, or becomes; None: it is not quantized."""

    def method(self, names: list[str], scheme: Scheme, exact: Mapping[str, Mapping[str, float]]) -> LowbitMethod:
        """How a layer that holds these layers of the checkpoint gets its weights."""

    def renamed(self, mapper: WeightsMapper) -> Plan:
        """The same in the names of vLLM's model."""


class Own:
    """A directory in lowbit's own convention: the format of each weight."""

    def __init__(self, weights: Mapping[str, str]) -> None:
        self.weights = dict(weights)
        self.schemes = {name: Scheme(*parse_spec(spec)) for name, spec in self.weights.items()}
        self.named = [name.removesuffix(".weight") for name in self.weights]

    def scheme(self, layer: str, kind: type[nn.Module]) -> Scheme | None:
        return self.schemes.get(f"{layer}.weight")

    def method(self, names: list[str], scheme: Scheme, exact: Mapping[str, Mapping[str, float]]) -> LowbitMethod:
        return LowbitStoredMethod(names, scheme, own.canonical_leaves)

    def renamed(self, mapper: WeightsMapper) -> Own:
        return Own(mapper.apply_dict(self.weights))


class Standard:
    """A directory of compressed-tensors: groups of layers by name, pattern or class."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self.named = [t for group in section.groups for t in group.targets if not t.startswith("re:")]

    def scheme(self, layer: str, kind: type[nn.Module]) -> Scheme | None:
        group = self.section.group_of(layer)
        if group is None or (kind is VocabParallelEmbedding and layer not in group.targets):
            return None
        return Scheme(group.weight, group.act)

    def method(self, names: list[str], scheme: Scheme, exact: Mapping[str, Mapping[str, float]]) -> LowbitMethod:
        known = [exact.get(f"{name}.weight", {}) for name in names]
        return LowbitStoredMethod(names, scheme, ct.leaves, any_scale=True, exact=known)

    def renamed(self, mapper: WeightsMapper) -> Standard:
        def names(targets: Iterable[str]) -> tuple[str, ...]:
            return tuple(t if t.startswith("re:") else mapper.map_name(t) or t for t in targets)

        section = object.__new__(Section)
        section.ignore = names(self.section.ignore)
        section.groups = [replace(group, targets=names(group.targets)) for group in self.section.groups]
        return Standard(section)


class Asked:
    """A float checkpoint, to be quantized by one config, or by rules as `quantize_` takes them."""

    def __init__(self, config: str | Mapping[str, str | None]) -> None:
        self.config = config
        self.everywhere: Config | None = parse_config(config) if isinstance(config, str) else None
        rules: Mapping[str, str | None] = {} if isinstance(config, str) else config
        self.rules = {name: None if rule is None else parse_config(rule) for name, rule in rules.items()}
        self.named = [name for name in self.rules if not name.startswith("re:")]
        for rule in [self.everywhere, *self.rules.values()]:
            if rule is not None and rule.scheme.act is not None and rule.scheme.act.static:
                raise ValueError(
                    f"quantization_config: {rule.spec} needs calibrated activation scales, which loading cannot find; "
                    "calibrate, quantize and save the model with lowbit, and serve that" + see("missing-calibration")
                )

    def scheme(self, layer: str, kind: type[nn.Module]) -> Scheme | None:
        config = self._rule(layer, kind)
        if config is not None and config.scheme.act is not None and kind is VocabParallelEmbedding:
            raise ValueError(
                f"{layer}: an embedding has no activations to quantize, got {config.spec}; use a weight-only config"
                + see("layer-not-quantizable")
            )
        return None if config is None else config.scheme

    def _rule(self, layer: str, kind: type[nn.Module]) -> Config | None:
        if kind is LinearBase and self.everywhere is not None:
            return self.everywhere
        if layer in self.rules:
            return self.rules[layer]
        if kind is VocabParallelEmbedding:
            return None
        patterns = (rule for rule in self.rules if rule.startswith("re:") and re.fullmatch(rule[3:], layer))
        return self.rules.get(next(patterns, "_default"))

    def method(self, names: list[str], scheme: Scheme, exact: Mapping[str, Mapping[str, float]]) -> LowbitMethod:
        return LowbitOnlineMethod(names, scheme)

    def renamed(self, mapper: WeightsMapper) -> Asked:
        if isinstance(self.config, str):
            return self
        fixed = {name: rule for name, rule in self.config.items() if name.startswith("re:") or name == "_default"}
        rest = {name: rule for name, rule in self.config.items() if name not in fixed}
        return Asked(mapper.apply_dict(rest) | fixed)


class LowbitConfig(QuantizationConfig):  # type: ignore[misc]
    """What vLLM makes of `quantization_config`.

    Attributes:
        plan: what is said of layers.
        exact: by quantized weight, what the manifest of a local directory knows better than the stored tensors; None
            where there is no manifest.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.exact: dict[str, Mapping[str, float]] | None = None

    # What it is ------------------------------------------------------------------------------------------------------

    def get_name(self) -> str:
        return own.METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it stands in config.json

    # Where it comes from ---------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LowbitConfig:
        """The plan of a directory, or of `hf_overrides`.

        Raises:
            CheckpointError: it is neither what lowbit writes nor `{"quant_method": "lowbit", "config": ...}`, or there
                is something in it that lowbit does not read.
            ValueError: an unknown config, or one that needs calibration.
        """
        method, rest = config.get("quant_method"), {k: v for k, v in config.items() if k != "quant_method"}
        if method == own.METHOD and rest.keys() == {"config"} and isinstance(rest["config"], (str, Mapping)):
            return cls(Asked(rest["config"]))
        try:
            if method == ct.METHOD:
                added = ("total_num_heads", "total_num_kv_heads")  # by vLLM
                return cls(Standard(Section({k: v for k, v in rest.items() if k not in added})))
            known = rest.keys() == {"format_version", "weights"} and rest["format_version"] == VERSION
            if method == own.METHOD and known:
                return cls(Own(rest["weights"]))
        except (ValueError, TypeError) as error:
            raise CheckpointError("quantization_config", [str(error)]) from None
        expected = f"what lowbit (version {VERSION}) or compressed-tensors writes, or a config to quantize by"
        raise CheckpointError("quantization_config", [f"expected {expected}, found {dict(config)}"])

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """lowbit reads directories of compressed-tensors, when the user says `quantization="lowbit"`."""
        asked = user_quant == own.METHOD and hf_quant_cfg.get("quant_method") == ct.METHOD
        return own.METHOD if asked else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the manifest of a local directory: a reciprocal of a scale does not give back its last bit.

        Raises:
            CheckpointError: the manifest is damaged.
        """
        if Path(model_name).is_dir() and (manifest := Manifest.read(Path(model_name))) is not None:
            self.exact = {name: w.exact for name, w in manifest.weights.items()}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.plan = self.plan.renamed(hf_to_vllm_mapper)
        self.exact = self.exact and hf_to_vllm_mapper.apply_dict(self.exact)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Parameters have no points in their names: `weight.qdata` of a file is `weight_qdata` of a layer."""
        planes = {p.name for fmt in registered() for p in fmt.planes} | {"input_scale"}
        ours = WeightsMapper(orig_to_new_suffix={f".weight.{p}": f".weight_{p}" for p in sorted(planes)})
        return super().get_checkpoint_weight_mapper() | ours

    # What layers do --------------------------------------------------------------------------------------------------

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer holds and runs its weight; None: as if there were no quantization.

        Raises:
            ValueError: the parts of a merged layer are quantized differently, or experts are quantized.
        """
        kinds = (ParallelLMHead, VocabParallelEmbedding, LinearBase)
        kind = next((k for k in kinds if isinstance(layer, k)), None)
        if kind is None:
            if isinstance(layer, RoutedExperts):
                self._refuse_experts(prefix)
            return None
        names = self._names(prefix, kind)
        schemes = {name: self.plan.scheme(name, kind) for name in names}
        first = next(iter(schemes.values()), None)
        if any(scheme != first for scheme in schemes.values()):
            found = ", ".join(f"{name} is {scheme.spec if scheme else 'float'}" for name, scheme in schemes.items())
            raise ValueError(
                f"{prefix}: vLLM holds these in one layer, and they are quantized differently: {found}; give them the "
                "same config" + see("format-mismatch")
            )
        if first is None:
            if kind is LinearBase:
                return UnquantizedLinearMethod()
            return FloatHead() if kind is ParallelLMHead else None
        return self.plan.method(names, first, self.exact or {})

    def _names(self, prefix: str, kind: type[nn.Module]) -> list[str]:
        """The layers of the checkpoint that a layer of vLLM holds."""
        owner, _, last = prefix.rpartition(".")
        if kind is VocabParallelEmbedding and not prefix:
            # Several models of vLLM do not tell their embedding its name.
            found = [name for name in self.plan.named if name.rpartition(".")[2] == "embed_tokens"]
            if len(found) > 1:
                raise ValueError(
                    f"vLLM's model does not name its embedding, which may be each of {', '.join(found)}"
                    + see("layer-not-quantizable")
                )
            return found
        if last in self.packed_modules_mapping and prefix not in self.plan.named:
            return [f"{owner}.{part}" if owner else part for part in self.packed_modules_mapping[last]]
        return [prefix]

    def _refuse_experts(self, prefix: str) -> None:
        quantized = [*self.plan.named, *(self.exact or ())]
        found = any(name.startswith(f"{prefix}.") for name in quantized)
        if self.exact is None and isinstance(self.plan, Standard):
            # A group for every Linear means experts, too, unless a manifest says that it met none.
            found |= self.plan.scheme(f"{prefix}.0.up_proj", LinearBase) is not None
        if found:
            raise ValueError(
                f"{prefix}: lowbit's plugin runs no quantized experts; leave out quantization='lowbit' where vLLM "
                "reads the directory by itself, or do not quantize the experts" + see("layer-not-quantizable")
            )
        if isinstance(self.plan, Asked):
            logger.warning("lowbit: %s stays as it is: the plugin quantizes no experts", prefix)


def register() -> None:
    """Make vLLM know the method `lowbit`. vLLM calls it in every process; doing so twice does nothing more."""
    register_quantization_config(own.METHOD)(LowbitConfig)
