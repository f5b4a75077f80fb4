"""Folds rotations and scales into a float model, whose output stays what it was.

Every weight that changes becomes a new parameter: a copy that shared the old one keeps it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lowbit.algorithms.awq import awq_scale
from lowbit.algorithms.rotation import random_rotation, rotated_reader, rotated_writer
from lowbit.algorithms.smoothquant import GRID, least_error_scale, smooth_scale
from lowbit.calibrate import Moments, shortened
from lowbit.configs import Scheme
from lowbit.formats.base import Format
from lowbit.graph import DecoderGraph, Edge, Layer
from lowbit.models.config import LlamaConfig

Formats = dict[str, Format]
#: What the channels of an edge's source were divided by, fp32, by the source's name.
Scales = dict[str, Tensor]


def scale_(model: nn.Module, edge: Edge, s: Tensor) -> None:
    """Divide the channels of `edge.source` by `s`, fp32 with one entry per channel, and multiply its readers' columns.

    The weight of a norm is rounded to its dtype, and what it was really divided by is what the readers get, so that no
    channel is off by that rounding. Where `s` holds powers of two, the model's output stays bit by bit, short of
    underflow.
    """
    source = model.get_submodule(edge.source)
    old = _weight(source)
    _assign(source, "weight", old / (s if old.dim() == 1 else s[:, None]))
    if isinstance(source, nn.Linear) and source.bias is not None:
        _assign(source, "bias", source.bias.float() / s)
    elif old.dim() == 1:
        exact = old.float() / _weight(source).float()
        s = torch.where((old != 0) & exact.isfinite(), exact, s)
    for name in edge.readers:
        reader = model.get_submodule(name)
        _assign(reader, "weight", _weight(reader) * edge.to_readers(s))


def smooth_(
    model: nn.Module,
    layer: Layer,
    moments: dict[str, Moments],
    schemes: Mapping[str, Scheme],
    scales: Scales | None = None,
) -> dict[str, Moments]:
    """SmoothQuant on every edge of a layer, for those readers that will be quantized; moments of the scaled inputs.

    Its authors leave the inputs of o and down alone; here they are scaled where that lessens the error. Heads that
    share one head of v share its scales. `scales` gets what was folded.
    """
    for edge in layer.edges:
        readers = [(_weight(model.get_submodule(n)), *schemes[n]) for n in edge.readers if n in schemes]
        seen = moments[edge.readers[0]]
        if not readers or seen.rows is None or not bool(seen.amax.any()):
            continue
        weights = [w for w, _, _ in readers]
        sources = [edge.to_source(smooth_scale(weights, seen.amax, alpha)) for alpha in GRID]
        s = least_error_scale(readers, seen.rows, map(edge.to_readers, sources), shortened(seen.rows))
        scale_(model, edge, edge.to_source(s))
        if scales is not None:
            scales[edge.source] = edge.to_source(s)
        moments = _scaled(moments, edge.readers, s)
    return moments


def awq_(
    model: nn.Module, layer: Layer, moments: dict[str, Moments], formats: Formats, scales: Scales | None = None
) -> dict[str, Moments]:
    """AWQ on every edge of a layer, for those readers that will be quantized; moments of the scaled inputs.

    Heads that share one head of v share its scales, so these follow the mean square over the heads. `scales` gets what
    was folded.
    """
    for edge in layer.edges:
        readers = [(_weight(model.get_submodule(n)), formats[n]) for n in edge.readers if n in formats]
        if not readers or not bool(moments[edge.readers[0]].square.any()):
            continue
        square = moments[edge.readers[0]].square
        magnitude = edge.to_source(square.diagonal()).sqrt()
        s = awq_scale(readers, square, edge.to_readers(magnitude))
        scale_(model, edge, edge.to_source(s))
        if scales is not None:
            scales[edge.source] = edge.to_source(s)
        moments = _scaled(moments, edge.readers, s)
    return moments


def rescale_(model: nn.Module, layer: Layer, scales: Scales) -> None:
    """What `smooth_` or `awq_` did to a layer when it gave these `scales`, bit by bit."""
    for edge in layer.edges:
        if edge.source in scales:
            scale_(model, edge, scales[edge.source])


def rotate_(model: nn.Module, graph: DecoderGraph, seed: int = 0) -> None:
    """R1 and R2 of SpinQuant, from random rotations: the residual stream, and v and o within each head.

    Weights of norms go into what reads them. An output projection that shares the embedding's table gets its own: the
    last norm's weight is folded into one and not into the other. Computed in fp64 and rounded once to the weights'
    dtype.
    """
    head, embedding = model.get_submodule(graph.head), model.get_submodule(graph.embedding)
    q = random_rotation(_weight(embedding).shape[1], seed).to(_weight(embedding).device)
    tied = head.weight is embedding.weight
    _read(model, graph.norm, (graph.head,), q)
    _assign(embedding, "weight", rotated_reader(embedding.weight, q))  # type: ignore[arg-type]
    if tied:
        _untie(model)
    for layer in graph.layers:
        for edge in (layer.attention, layer.mlp):
            _read(model, edge.source, edge.readers, q)
        for name in (layer.at("self_attn.o_proj"), layer.at("mlp.down_proj")):
            _write(model.get_submodule(name), q)
        within = random_rotation(layer.head_dim, seed + 1).to(q.device)
        v, o = model.get_submodule(layer.at("self_attn.v_proj")), model.get_submodule(layer.at("self_attn.o_proj"))
        _write(v, within)
        _assign(o, "weight", rotated_reader(_weight(o), within))


def _read(model: nn.Module, norm: str, readers: Sequence[str], q: Tensor) -> None:
    module = model.get_submodule(norm)
    for name in readers:
        reader = model.get_submodule(name)
        _assign(reader, "weight", rotated_reader(_weight(reader), q, _weight(module)))
    _assign(module, "weight", torch.ones_like(_weight(module)))


def _write(linear: nn.Module, q: Tensor) -> None:
    _assign(linear, "weight", rotated_writer(_weight(linear), q))
    if isinstance(linear.bias, Tensor):
        _assign(linear, "bias", rotated_writer(linear.bias, q))


def _untie(model: nn.Module) -> None:
    """The configuration says so too, for whoever loads or saves the model by it."""
    config = getattr(model, "config", None)
    if isinstance(config, LlamaConfig):
        model.config = dataclasses.replace(config, tie_embeddings=False)  # type: ignore[assignment]
    elif hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False  # type: ignore[union-attr]


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.detach().to(old.dtype), requires_grad=old.requires_grad))


def _scaled(moments: dict[str, Moments], readers: Sequence[str], s: Tensor) -> dict[str, Moments]:
    scaled = moments[readers[0]].divided(s)
    return moments | dict.fromkeys(readers, scaled)
