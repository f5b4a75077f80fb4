"""Joins projections that read the same input: query, key and value into `qkv_proj`, gate and up into `gate_up_proj`.

One large layer reads its weights at a higher share of the memory's speed than two or three small ones, and a token has
fewer launches. Nothing is rounded again: rows of planes are put below each other, so every weight keeps its bits. Where
that is not possible (formats with one scale or one codebook for a whole tensor, parts in different formats), the
projections stay apart, and the result says why; a model that is fused before it is quantized has no such layers.

Checkpoints hold the separate projections, under Hugging Face's names: call `unfuse_projections_` before `save`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.errors import see
from lowbit.models.llama import Attention, Llama
from lowbit.tensor import QuantizedTensor

#: Joint projections and what they consist of, in the order of their rows.
ATTENTION, MLP = ("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Fusion:
    """What became of one group of projections.

    Attributes:
        name: of the joint projection.
        parts: names of the separate ones.
        reason: why they stay apart; empty where they were joined.
    """

    name: str
    parts: tuple[str, ...]
    reason: str = ""


def fuse_projections_(model: Llama) -> list[Fusion]:
    """Join the projections of every layer of a float or quantized model, in place. Done twice, it does nothing.

    Returns:
        what was joined and what was not, in the model's order.
    """
    done = []
    for prefix, owner, joint, parts in _groups(model):
        if getattr(owner, joint) is not None:
            continue
        layers = [owner.get_submodule(part) for part in parts]
        try:
            fused = _joined(layers)
        except ValueError as problem:
            done.append(Fusion(f"{prefix}.{joint}", parts, str(problem)))
            continue
        setattr(owner, joint, fused.train(owner.training))
        for part in parts:
            delattr(owner, part)
        done.append(Fusion(f"{prefix}.{joint}", parts))
    return done


def unfuse_projections_(model: Llama) -> None:
    """Take the joint projections apart again, in place: the model of before, with every bit.

    Raises:
        ValueError: a joint weight was quantized in tiles of rows that reach over the end of a part, or has a low-rank
            term.
    """
    for name, owner, joint, parts in _groups(model):
        fused = getattr(owner, joint)
        if fused is None:
            continue
        if type(fused) is not nn.Linear:
            raise ValueError(
                f"unfuse_projections_: {name}.{joint} is more than a Linear ({type(fused).__name__}); quantize the "
                "model before its projections are fused" + see("op-not-defined")
            )
        sizes = owner.sizes if isinstance(owner, Attention) else [fused.out_features // 2] * 2
        weights = fused.weight.detach().split(sizes)
        biases = [None] * len(parts) if fused.bias is None else fused.bias.detach().split(sizes)
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            setattr(owner, part, linear_of(weight, bias).train(owner.training))
        setattr(owner, joint, None)


def _groups(model: Llama) -> list[tuple[str, nn.Module, str, tuple[str, ...]]]:
    found: list[tuple[str, nn.Module, str, tuple[str, ...]]] = []
    for i, layer in enumerate(model.model.layers):
        found.append((f"model.layers.{i}.self_attn", layer.self_attn, *ATTENTION))  # type: ignore[arg-type]
        found.append((f"model.layers.{i}.mlp", layer.mlp, *MLP))  # type: ignore[arg-type]
    return found


def _joined(layers: list[nn.Module]) -> nn.Linear:
    """One layer for all of these; a ValueError says what they do not have in common."""
    for layer in layers:
        if type(layer) is not nn.Linear:
            raise ValueError(f"{type(layer).__name__} is more than a Linear" + see("op-not-defined"))
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len({layer.bias is None for layer in linears}) > 1:
        raise ValueError("some have a bias, others have none" + see("format-mismatch"))
    bias = None if linears[0].bias is None else torch.cat([layer.bias.detach() for layer in linears])
    return linear_of(join_weights([layer.weight.detach() for layer in linears]), bias)


def join_weights(weights: list[Tensor]) -> Tensor:
    """Weights `(N_i, K)` as one `(sum N_i, K)`, plain or quantized, with the same values.

    Raises:
        ValueError: they have different formats, or one scale or codebook each where the format has one per tensor.
    """
    first = weights[0]
    kinds = {_kind(w) for w in weights}
    if len(kinds) > 1:
        raise ValueError(f"they have different formats: {', '.join(sorted(kinds))}" + see("format-mismatch"))
    if not isinstance(first, QuantizedTensor):
        return torch.cat(weights)
    packed = [w for w in weights if isinstance(w, QuantizedTensor)]
    scales = [w.act_scale for w in packed if w.act_scale is not None]
    if any(not torch.equal(scales[0], scale) for scale in scales[1:]):
        raise ValueError("their inputs have different calibrated scales" + see("format-mismatch"))
    rows = [w.out_features for w in packed]
    planes = first.format.join_planes([w.planes for w in packed], rows)
    return first.with_planes(planes, (sum(rows), first.in_features))


def _kind(w: Tensor) -> str:
    return f"{w.format.spec}+{w.act_spec} {w.dtype}" if isinstance(w, QuantizedTensor) else str(w.dtype)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer around tensors that exist, without gradients."""
    n, k = weight.shape
    with torch.device("meta"):
        layer = nn.Linear(k, n, bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
