"""Runs the original and the quantized model side by side through a decoder, one stage at a time.

`run_blocks` looks at a whole layer before any of it is quantized. Here a layer is quantized in four steps (q/k/v, o,
gate/up, down), each for the inputs that the steps before it make, and next to the inputs that the original makes of the
same tokens: what `align` needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibrate import KEEPS_NOTHING, Call, Keeper, Moments, added, first_inputs, following, moments_of
from lowbit.graph import DecoderGraph, Layer

Prepare = Callable[[Layer, dict[str, Moments]], object]


def run_stages(
    model: nn.Module,
    graph: DecoderGraph,
    batches: Iterable[Any],
    visit: Callable[[dict[str, Moments]], None],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    wanted: Set[str],
    prepare: Prepare | None = None,
    keeper: Keeper = KEEPS_NOTHING,
) -> None:
    """Go through the stages of `model` in order; for each, sum up moments with their drift and call `visit`.

    Held are, for all batches, the inputs of one layer and of its four stages in the original, and the inputs of one
    layer in the quantized model.

    Args:
        batches, forward: as for `calibrate`.
        visit: called with `{name of a Linear: its moments}` of one stage, which it shall quantize.
        wanted: names of the Linears whose moments are asked for; a stage with none of them is passed over.
        prepare: called with a layer and the moments of all its Linears before anything in it is quantized. It may fold
            scales into the layer, whose output must stay.
        keeper: layers that it has are not visited.

    Raises:
        ValueError: as `run_blocks` does.
    """
    _, blocks, calls = first_inputs(model, batches, forward)
    originals = list(calls)
    keeper.begin(calls)
    with torch.no_grad():
        for layer, block in zip(graph.layers, blocks, strict=True):
            finished = keeper.fold(layer.name)
            if prepare is not None and not finished:
                prepare(layer, moments_of(layer.name, block, calls))
            stages = [s for s in layer.stages if not finished and not wanted.isdisjoint(s)]
            leaders = [model.get_submodule(stage[0]) for stage in stages]
            seen = list[list[Tensor]]()
            for j, call in enumerate(originals):
                inputs, originals[j] = _watched(layer.name, block, call, leaders)
                seen.append(inputs)
            for i, stage in enumerate(stages):
                moments: Moments | None = None
                for call, inputs in zip(calls, seen, strict=True):
                    moments = added(moments, _input_of(block, call, leaders[i]), inputs[i])
                assert moments is not None
                visit(dict.fromkeys(stage, moments))
            if finished:
                keeper.fill(layer.name)
            else:
                keeper.keep(layer.name)
            for j, call in enumerate(calls):
                calls[j] = following(layer.name, block, call)


class _Reached(Exception):
    """Ends a forward pass where its input has been seen."""


def _watched(name: str, block: nn.Module, call: Call, leaders: list[nn.Module]) -> tuple[list[Tensor], Call]:
    """The input of each leader while a block runs, and how to call the next block."""
    inputs = list[Tensor]()
    hooks = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for m in leaders]
    try:
        after = following(name, block, call)
    finally:
        for h in hooks:
            h.remove()
    return inputs, after


def _input_of(block: nn.Module, call: Call, leader: nn.Module) -> Tensor:
    """The input of one linear; the block runs no further."""
    found = list[Tensor]()

    def reached(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Reached

    hook = leader.register_forward_pre_hook(reached)
    try:
        block(*call[0], **call[1])
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]
