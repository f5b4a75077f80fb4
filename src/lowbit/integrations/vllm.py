"""lowbit as a quantization method of vLLM: a plugin, which vLLM finds by its entry point and calls in every process.

    LLM("small")                                       # a directory in lowbit's own convention
    LLM("small", quantization="lowbit")                # one of compressed-tensors, by lowbit's kernels
    LLM("model", hf_overrides={"quantization_config": {"quant_method": "lowbit", "config": "int4wo-128"}})

The last quantizes a float checkpoint while it is loaded. Nothing of vLLM is replaced: a directory of compressed-tensors
stays with vLLM's own kernels unless lowbit is asked for by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from lowbit.checkpoints import compressed_tensors as ct
from lowbit.checkpoints import leaves as own
from lowbit.checkpoints.manifest import Manifest
from lowbit.errors import see
from lowbit.formats.base import registered
from lowbit.integrations.engine_plans import Asked, Kind, Plan, has_experts, layers_of, one_scheme, plan_of_section
from lowbit.integrations.vllm_layers import FloatTable, LowbitOnlineMethod, LowbitStoredMethod

__all__ = ["LowbitConfig", "register"]

logger = init_logger(__name__)


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
        return cls(plan_of_section(config, added=("total_num_heads", "total_num_kv_heads")))

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
        self.plan = self.plan.renamed(lambda name: hf_to_vllm_mapper.map_name(name) or name)
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
        kind = _kind_of(layer)
        if kind is None:
            if isinstance(layer, RoutedExperts):
                self._refuse_experts(prefix)
            return None
        names = layers_of(self.plan, prefix, kind, self.packed_modules_mapping, "vLLM")
        scheme = one_scheme(self.plan, prefix, names, kind, "vLLM")
        if scheme is None:
            return UnquantizedLinearMethod() if kind == "linear" else FloatTable(self._check_rules)
        stored = self.plan.stored(names, self.exact or {})
        if stored is None:
            return LowbitOnlineMethod(names, scheme, self._check_rules)
        return LowbitStoredMethod(names, scheme, stored)

    def _check_rules(self) -> None:
        # With pipeline parallelism a rule may be for a layer that another process has.
        if isinstance(self.plan, Asked) and get_pp_group().world_size == 1:
            self.plan.check_used()

    def _refuse_experts(self, prefix: str) -> None:
        if has_experts(self.plan, prefix, self.exact):
            raise ValueError(
                f"{prefix}: lowbit's plugin runs no quantized experts; leave out quantization='lowbit' where vLLM "
                "reads the directory by itself, or do not quantize the experts" + see("layer-not-quantizable")
            )
        if isinstance(self.plan, Asked):
            logger.warning("lowbit: %s stays as it is: the plugin quantizes no experts", prefix)


def _kind_of(layer: nn.Module) -> Kind | None:
    if isinstance(layer, ParallelLMHead):
        return "head"
    if isinstance(layer, VocabParallelEmbedding):
        return "embedding"
    return "linear" if isinstance(layer, LinearBase) else None


def register() -> None:
    """Make vLLM know the method `lowbit`. vLLM calls it in every process; doing so twice does nothing more."""
    register_quantization_config(own.METHOD)(LowbitConfig)
