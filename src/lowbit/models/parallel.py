"""A `Llama` on several ranks, each with a part of every layer (tensor parallelism).

As in Megatron-LM (Shoeybi et al., arXiv:1909.08053, section 3): heads and the columns between gate, up and down are
dealt to the ranks, so that a decoder layer needs two sums over ranks and nothing else. Rows of the output projection
are dealt, too, and logits gathered. A rank's model is a `Llama` of its own with fewer heads: sessions, graphs and
kernels run it as any other. For training, quantized layers take `torch.distributed.tensor.parallel`.
"""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lowbit.errors import see
from lowbit.models.fuse import fuse_projections_, linear_of, unfuse_projections_
from lowbit.models.llama import DecoderLayer, Llama
from lowbit.models.ranks import Ranks


def parallelize_(model: Llama, ranks: DeviceMesh | dist.ProcessGroup | None = None) -> Llama:
    """Keep this rank's part of a float or quantized model that every rank has whole, in place.

    Weights keep their bits: what is cut are whole tiles of a format. Where activations are quantized with a scale per
    token, the inputs of o and down have one per token and rank.

    Args:
        ranks: the processes that share the model, as a mesh of one dimension or a group; the default is all of them.

    Raises:
        ValueError: heads, columns or rows of the vocabulary cannot be dealt evenly, or a cut would go through a tile;
            the model is as before.
        RuntimeError: there is no process group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "parallelize_: there is no process group; start with torchrun and call init_process_group"
            + see("bad-option")
        )
    group = ranks.get_group() if isinstance(ranks, DeviceMesh) else ranks or dist.group.WORLD
    assert group is not None
    world, rank, config = dist.get_world_size(group), dist.get_rank(group), model.config
    for name in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
        if (count := getattr(config, name)) % world:
            raise ValueError(f"parallelize_: {name} = {count} is no multiple of {world} ranks" + see("bad-option"))
    layers = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]
    fused = any(layer.mlp.gate_up_proj is not None for layer in layers)
    unfuse_projections_(model)
    try:
        parts = _parts(model, layers, rank, world)
        for owner, name, part in parts:
            setattr(owner, name, part)
        model.config = replace(
            config, num_heads=config.num_heads // world, num_kv_heads=config.num_kv_heads // world,
            intermediate_size=config.intermediate_size // world, tie_embeddings=False,
        )  # fmt: skip
        model.ranks = Ranks(group, config.hidden_size, model.model.norm.weight.device)
        for layer in layers:
            layer.self_attn.sizes = [size // world for size in layer.self_attn.sizes]
            layer.self_attn.ranks = layer.mlp.ranks = model.ranks
    finally:
        if fused:
            fuse_projections_(model)
    return model


def _parts(model: Llama, layers: list[DecoderLayer], rank: int, world: int) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Owner, name and part of every linear layer; all cuts are made before any is kept."""
    cuts: list[tuple[nn.Module, str, int]] = [(model, "lm_head", 0)]
    for layer in layers:
        cuts += [(layer.self_attn, name, 0) for name in ("q_proj", "k_proj", "v_proj")]
        cuts += [(layer.mlp, name, 0) for name in ("gate_proj", "up_proj")]
        cuts += [(layer.self_attn, "o_proj", 1), (layer.mlp, "down_proj", 1)]
    return [(owner, name, _part(owner.get_submodule(name), dim, rank, world)) for owner, name, dim in cuts]


def _part(layer: nn.Module, dim: int, rank: int, world: int) -> nn.Linear:
    """A rank's rows (0) or columns (1) of a layer, copied, so that the rest can be freed."""
    if type(layer) is not nn.Linear:
        raise ValueError(f"parallelize_: {type(layer).__name__} is more than a Linear" + see("op-not-defined"))
    weight: Tensor = layer.weight.detach()
    size = weight.shape[dim] // world
    part = slice(rank * size, (rank + 1) * size)
    bias: Tensor | None = None
    # Sums over ranks have the bias of one of them.
    if layer.bias is not None and (dim == 0 or rank == 0):
        bias = layer.bias.detach()[part if dim == 0 else slice(None)].clone()
    return linear_of((weight[part] if dim == 0 else weight[:, part]).clone(), bias).train(layer.training)
