"""`engine_layers` on vLLM's own classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor import parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing

from lowbit.integrations.engine_layers import Engine, OnlineWeights, PerPart, StoredWeights, Weights


class _PerPart(PerPart, parameter.PerTensorScaleParameter):  # type: ignore[misc]
    pass


VLLM = Engine("vLLM", parameter, _PerPart, VocabParallelEmbedding)


@register_weight_loader_v2_supported_method
class LowbitStoredMethod(StoredWeights, LinearMethodBase):  # type: ignore[misc]
    """Weights that a checkpoint holds quantized."""

    engine = VLLM

    def is_dummy(self) -> bool:
        config = get_current_vllm_config_or_none()
        return config is not None and config.load_config.load_format == "dummy"


@register_weight_loader_v2_supported_method
class LowbitOnlineMethod(OnlineWeights, LinearMethodBase):  # type: ignore[misc]
    """Float weights, which vLLM makes real and hands over when a layer is complete: of the float model, one layer
    exists at a time."""

    engine = VLLM
    float_device = "meta"
    uses_meta_device = True

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        initialize_online_processing(layer)


class FloatTable(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An embedding or output projection that is not quantized itself; the latter may be tied to one that is.

    Args:
        check_used: raises if there are rules that reached no layer; called when the model is whole.
    """

    def __init__(self, check_used: Callable[[], None]) -> None:
        super().__init__()
        self.check_used = check_used

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.check_used()
        super().process_weights_after_loading(layer)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """The embedding, where lowbit holds it; otherwise the layer with the embedding's weight, as ever."""
        tied = isinstance(embed_tokens.quant_method, Weights)
        return embed_tokens if tied else super().tie_weights(layer, embed_tokens)  # type: ignore[no-any-return]
