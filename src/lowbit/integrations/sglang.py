"""lowbit as a quantization method of SGLang: a plugin, which SGLang finds by its entry point and calls in each process.

    sglang.Engine(model_path="small")                            # a directory in lowbit's own convention
    sglang.Engine(model_path="other", quantization="lowbit")     # one of compressed-tensors, by lowbit's kernels

Nothing of SGLang is replaced: a directory of compressed-tensors stays with its own kernels unless lowbit is asked for
by name. SGLang reads all of a model before it lets a method quantize, so that a float model would have to fit:
quantizing while it loads is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES, add_quantization_method_choices
from sglang.srt.layers import parameter
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.runtime_context import get_model
from torch import nn

from lowbit.checkpoints import compressed_tensors as ct
from lowbit.checkpoints import leaves as own
from lowbit.checkpoints.files import CheckpointError
from lowbit.checkpoints.leaves import Leaf
from lowbit.checkpoints.manifest import Manifest
from lowbit.errors import see
from lowbit.integrations.engine_layers import Engine, PerPart, StoredWeights
from lowbit.integrations.engine_plans import Kind, Plan, has_experts, layers_of, one_scheme, plan_of_section

__all__ = ["LowbitConfig", "register"]

#: What SGLang adds to a `quantization_config` before it hands it over.
ADDED = ("packed_modules_mapping", "hf_config")
#: Merged layers of models that do not say what they merge, as most do not.
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class _PerPart(PerPart, parameter.PerTensorScaleParameter):  # type: ignore[misc]
    pass


class LowbitMethod(StoredWeights, LinearMethodBase):  # type: ignore[misc]
    """Weights that a checkpoint holds quantized."""

    engine = Engine("SGLang", parameter, _PerPart, VocabParallelEmbedding)
    #: Read from `layer.scheme`: this method's parameters know how to be cut.
    requires_weight_loader_v2 = True

    def attribute(self, leaf: Leaf) -> str:
        """Models of SGLang look names of tensors up among those of parameters, and pass over what they do not find."""
        return leaf.name

    def register(self, layer: nn.Module, name: str, param: nn.Parameter) -> None:
        layer._parameters[name] = param  # `register_parameter` takes no names with points

    def is_dummy(self) -> bool:
        return get_model().load_format == "dummy"  # type: ignore[no-any-return]


class LowbitConfig(QuantizationConfig):  # type: ignore[misc]
    """What SGLang makes of `quantization_config`.

    Attributes:
        plan: what is said of layers.
        exact: by quantized weight, what the manifest of a local directory knows better than the stored tensors; None
            where there is no manifest.
    """

    def __init__(self, plan: Plan, exact: Mapping[str, Mapping[str, float]] | None = None) -> None:
        super().__init__()
        self.plan, self.exact = plan, exact
        self.packed_modules_mapping = dict(MERGED)

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

    def get_scaled_act_names(self) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LowbitConfig:
        """The plan of a directory.

        Raises:
            CheckpointError: it is not what lowbit writes, there is something in it that lowbit does not read, or the
                manifest is damaged.
        """
        plan = plan_of_section(config, ADDED)
        if plan.stored([], {}) is None:
            what = (
                "in SGLang lowbit quantizes nothing while a model loads; run `lowbit quantize`, and serve its directory"
            )
            raise CheckpointError("quantization_config", [what])
        directory = Path(getattr(config.get("hf_config"), "_name_or_path", ""))
        manifest = Manifest.read(directory) if directory.is_dir() else None
        made = cls(plan, None if manifest is None else {name: w.exact for name, w in manifest.weights.items()})
        made.packed_modules_mapping |= config.get("packed_modules_mapping") or {}
        return made

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None) -> str | None:
        """lowbit reads directories of compressed-tensors, when the user says `quantization="lowbit"`."""
        asked = user_quant == own.METHOD and hf_quant_cfg.get("quant_method") == ct.METHOD
        return own.METHOD if asked else None

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Take over the names of SGLang's model."""
        self.plan = self.plan.renamed(lambda name: next(iter(hf_to_sglang_mapper.apply_list([name])), name))
        self.exact = self.exact and hf_to_sglang_mapper.apply_dict(dict(self.exact))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer holds and runs its weight; None: as if there were no quantization.

        Raises:
            ValueError: the parts of a merged layer are quantized differently, or experts are quantized.
        """
        kind = _kind_of(layer)
        if kind is None:
            from sglang.srt.layers.moe.fused_moe_triton import FusedMoE  # late, as in SGLang: it imports this package

            if isinstance(layer, FusedMoE) and has_experts(self.plan, prefix, self.exact):
                raise ValueError(
                    f"{prefix}: lowbit's plugin runs no quantized experts; leave out quantization='lowbit' where "
                    "SGLang reads the directory by itself, or do not quantize the experts"
                    + see("layer-not-quantizable")
                )
            return None
        names = layers_of(self.plan, prefix, kind, self.packed_modules_mapping, "SGLang")
        scheme = one_scheme(self.plan, prefix, names, kind, "SGLang")
        stored = self.plan.stored(names, self.exact or {})
        if scheme is None or stored is None:
            return UnquantizedLinearMethod() if kind == "linear" else None
        method = LowbitMethod(names, scheme, stored)
        if kind == "linear":
            layer.scheme = method  # by which the layer takes the loaders that know parameters
        return method


def _kind_of(layer: nn.Module) -> Kind | None:
    if isinstance(layer, ParallelLMHead):
        return "head"
    if isinstance(layer, VocabParallelEmbedding):
        return "embedding"
    return "linear" if isinstance(layer, LinearBase) else None


def register() -> None:
    """Make SGLang know the method `lowbit`. SGLang calls it in every process; doing so twice does nothing more."""
    QUANTIZATION_METHODS[own.METHOD] = LowbitConfig
    if own.METHOD not in QUANTIZATION_CHOICES:
        add_quantization_method_choices([own.METHOD])
