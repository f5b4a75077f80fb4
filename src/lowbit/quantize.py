"""START HERE: `quantize_(model, config)` replaces the weights of a model's layers, one after the other, in place.

    import lowbit
    report = lowbit.quantize_(model, lowbit.Int4WeightOnlyConfig(group_size=128))

Rules by name choose a config per layer; the first match wins, in the order exact names, patterns, `_default`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.calibrate import KEEPS_NOTHING, Keeper, Moments, Statistics, run_blocks
from lowbit.configs import Config, Scheme
from lowbit.errors import see
from lowbit.fold import Scales, awq_, rotate_, smooth_
from lowbit.formats.base import Planes
from lowbit.graph import DecoderGraph, Layer, decoder_graph
from lowbit.journal import Journal
from lowbit.linear import put_beside_, why_nothing_beside
from lowbit.original import quantizing
from lowbit.quantize_layer import (
    Beside,
    Made,
    Work,
    quantize_weight,
    refuse_nonfinite,
    row_of,
    skipped,
    static_scale_of,
    why_not_beside,
)
from lowbit.recipe import Recipes, recipes_of
from lowbit.report import LayerReport, Report
from lowbit.resume import JournalKeeper
from lowbit.rules import FilterFn, FqnToConfig, Rule, plan_of, why_not
from lowbit.stages import run_stages
from lowbit.tensor import QuantizedTensor


def quantize_(
    model: nn.Module,
    config: Config | str | FqnToConfig | Mapping[str, Rule],
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    *,
    calibration: Mapping[str, Statistics] | None = None,
    algorithm: str | Mapping[str, str] = "rtn",
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    on_nonfinite: Literal["error", "zero"] = "error",
    on_unsupported: Literal["error", "skip"] = "error",
    measure: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
    restore: bool | None = None,
    journal: str | os.PathLike[str] | None = None,
) -> Report:
    """Quantize the weights of `model` in place and say what was done.

    Layers are converted one at a time and their float weights released at once. What is allocated on the way is the
    quantized weights plus at most the two largest layers (for layers of more than a few MB). With `device`, each
    weight is quantized there, so a model too large for the device in bf16 can still be quantized onto it.

    Args:
        model: any module. `nn.Linear` is quantized by default; `nn.Embedding` and `nn.Conv2d` when a rule or
            `filter_fn` names them.
        config: one config (or its short name, `"int4wo-128"`) for all layers that pass `filter_fn`, or rules by name.
        filter_fn: `filter_fn(module, name) -> bool`; the default takes every `nn.Linear`. Not with rules.
        device: where the quantized weights, and in the end the whole model, shall live.
        calibration: what `calibrate` returned, for configs with static activation scales.
        algorithm: how values are chosen. `"rtn"` rounds to nearest under the format's own scales; `"mse"` searches for
            the scales with the least squared error; `"hqq"` for those that leave outliers alone; `"gptq"` rounds each
            column of a weight so as to mend what the columns before it lost, for the inputs that `batches` bring.
            Before it may stand steps that change the float weights of a Llama-family model, joined by `+` in this
            order: `"rotation"`, `"smoothquant"` or `"awq"`, `"align"`, `"hadamard"` or `"incoherence"` (which any model
            takes); behind it, `"lowrank-8"` gives each layer a term of rank 8 beside its weight (docs/algorithms.md). A
            mapping of exact names, `re:` patterns and `_default` gives layers their own, as autoquant chooses them; of
            steps, they may differ in `"awq"` and `"incoherence"`.
        batches, forward: inputs for all but `"rtn"`, `"mse"`, `"hqq"`, `"rotation"`, `"hadamard"` and `"incoherence"`,
            as `calibrate` takes them; with `"lowrank"`, what mends outputs instead of weights. The model must consist
            of repeated blocks (an `nn.ModuleList`), which are gone through one after the other on the model's device.
        on_nonfinite: `"error"` names the layer and how many values are NaN or Inf; `"zero"` replaces them by 0.
        on_unsupported: `"error"`, or `"skip"` to leave layers that cannot be quantized alone and list them.
        measure: compute each layer's SQNR (signal to quantization noise in dB).
        progress: called with (layers done, layers in all, name) before each layer.
        restore: keep the float weights until all is done, and put them back if anything fails before, as when memory
            runs out. The default does so where it costs no memory of the device: where `device` is another than theirs.
        journal: a directory that keeps each block of a run with `batches` as it is finished. The same call on the same
            float model goes on behind the last one, and gives the bits of a run that was not interrupted.

    Raises:
        OSError: the journal cannot be written; blocks that are finished are in it.
        torch.OutOfMemoryError: memory ran out. The message says whether the model is as it was, or else which layers
            are quantized.
        ValueError: a rule matched nothing, no layer was selected, a layer cannot be quantized, needs a calibrated
            scale that is not there, or holds NaN or Inf; the model's parts are not known to a step that must know them;
            batches and algorithm do not go together; or the journal is of another run. Nothing has been quantized then,
            and a model that was rotated already still computes the same.
    """
    started = time.perf_counter()
    report, work = Report(), list[Work]()
    for name, module, chosen in plan_of(model, config, filter_fn):
        reason = "left as it is by a rule" if chosen is None else why_not(module, chosen.scheme)
        if reason is None and chosen is not None:
            work.append(Work(name, module, chosen.scheme, static_scale_of(name, chosen, calibration)))
        elif chosen is not None and on_unsupported == "error":
            raise ValueError(
                f"quantize_: {name} cannot be quantized to {chosen.spec}: {reason}. Exclude it with a rule "
                f"({{{name!r}: None}}) or pass on_unsupported='skip'" + see("layer-not-quantizable")
            )
        else:
            report.layers.append(skipped(name, module, reason or ""))
    recipes = _checked_recipes(algorithm, work, batches, on_nonfinite, journal is not None)
    if on_nonfinite != "zero":
        refuse_nonfinite(work)
    _refuse_stale_scales(work, recipes)
    looks = batches is not None and recipes.takes_batches
    # What is done to one layer alone needs to know of no other.
    graph = decoder_graph(model) if set(recipes.steps) - {"incoherence"} else None
    turned = set[str]()
    if graph is not None:
        _refuse_halved_inputs(graph, recipes)
        turned = _to_be_turned(graph, work, recipes)

    done: dict[tuple[int, Scheme, int, bool], tuple[nn.Parameter, Beside, str]] = {}
    finished, total = 0, len(work)

    def convert(item: Work, moments: Moments | None = None, kept: Made | None = None) -> None:
        nonlocal finished
        if progress is not None:
            progress(finished, total, item.name)
        finished += 1
        weight: nn.Parameter = item.module.weight  # type: ignore[assignment]
        recipe = recipes.by_layer[item.name]
        if not recipe.takes_batches:
            moments = None
        key = (id(weight), item.scheme, recipe.rank, recipe.incoherent)
        if key in done:
            parameter, beside, first = done[key]
            report.layers.append(replace(row_of(item, weight, 0, None), bytes_before=0, note=f"shares {first}"))
        else:
            if kept is None:
                sides = 2 if recipe.incoherent else int(item.name in turned)
                kept = quantize_weight(weight, item, device, on_nonfinite == "zero", measure, recipe, moments, sides)
                if recipe.rounding == "gptq" and moments is None:
                    row = replace(kept.row, note="no inputs seen: scales searched, rounded to nearest")
                    kept = kept._replace(row=row)
            report.layers.append(kept.row)
            parameter, beside = nn.Parameter(kept.weight, requires_grad=False), kept.beside
            # Only while another module still holds the float weight can its id come up again.
            if sum(m.weight is weight for m in model.modules() if hasattr(m, "weight")) > 1:
                done[key] = (parameter, beside, item.name)
        item.module.weight = parameter
        if beside:
            put_beside_(item.module, beside)

    if device is not None and (graph is not None or looks):
        model.to(device)
    if graph is not None and "rotation" in recipes.steps:
        rotate_(model, graph)
    # A rotated model computes the same, so this is what is put back.
    with quantizing(model, _keeps(restore, device, work), report):
        if looks:
            waiting = {item.name: item for item in work}

            def visit(moments: dict[str, Moments]) -> None:
                for name in [n for n in moments if n in waiting]:
                    # A layer that met only zeros tells nothing of what matters in it.
                    if bool(moments[name].amax.any()):
                        convert(waiting.pop(name), moments[name])

            def put(row: LayerReport, planes: Planes, act_scale: Tensor | None, beside: Beside) -> None:
                item = waiting.pop(row.name)
                weight, (fmt, act) = item.module.weight, item.scheme
                quantized = QuantizedTensor(planes, fmt, weight.shape, weight.dtype, act, act_scale)  # type: ignore[arg-type]
                convert(item, kept=Made(quantized, beside, row))

            keeper, scales = KEEPS_NOTHING, Scales()
            if journal is not None:
                run = _run_of(work, algorithm, recipes, on_nonfinite, measure)
                keeper = JournalKeeper(Journal(Path(journal)), model, graph, run, report, put, scales)
            schemes = {item.name: item.scheme for item in work}
            _visit_inputs(model, recipes, graph, schemes, batches or [], forward, visit, keeper, scales)
            work = list(waiting.values())
        for item in work:
            convert(item)
        if device is not None:
            model.to(device)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    report.layers.sort(key=lambda r: order[r.name])
    report.seconds = time.perf_counter() - started
    return report


def _visit_inputs(
    model: nn.Module, recipes: Recipes, graph: DecoderGraph | None, schemes: dict[str, Scheme], batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None, visit: Callable[[dict[str, Moments]], None], keeper: Keeper,
    scales: Scales,
) -> None:  # fmt: skip
    """Call `visit` with the moments of every Linear that runs, as they are after the scaling that a recipe asks for;
    `scales` gets that of the layer at hand. What `keeper` has is passed over."""

    scaled = {name: scheme for name, scheme in schemes.items() if recipes.by_layer[name].scaling}

    def scale(layer: Layer, moments: dict[str, Moments]) -> dict[str, Moments]:
        scales.clear()
        if recipes.scaling == "awq":
            return awq_(model, layer, moments, {n: s.weight for n, s in scaled.items()}, scales)
        return smooth_(model, layer, moments, schemes, scales) if recipes.scaling == "smoothquant" else moments

    if graph is None:
        run_blocks(model, batches, visit, forward, keeper)
    elif "align" in recipes.steps:
        prepare = scale if recipes.scaling else None
        run_stages(model, graph, batches, visit, forward, wanted=schemes.keys(), prepare=prepare, keeper=keeper)
    else:
        layers = {name: layer for layer in graph.layers for stage in layer.stages for name in stage}
        run_blocks(
            model, batches, lambda moments: visit(scale(layers[next(iter(moments))], moments)), forward, keeper
        )  # fmt: skip


def _run_of(
    work: list[Work], algorithm: str | Mapping[str, str], recipes: Recipes, on_nonfinite: str, measure: bool
) -> dict[str, Any]:
    """What this call asks for, as a journal compares it."""

    def spec(item: Work) -> str:
        word = item.scheme.spec if item.act_scale is None else f"{item.scheme.spec} at {item.act_scale!r}"
        return word if isinstance(algorithm, str) else f"{word} by {recipes.word_of(item.name)}"

    word = recipes.word_of(work[0].name) if isinstance(algorithm, str) else "by layer"
    asked = {"algorithm": word, "on_nonfinite": on_nonfinite, "measure": measure}
    return {**asked, "layers": {item.name: spec(item) for item in work}}


def _checked_recipes(
    algorithm: str | Mapping[str, str], work: list[Work], batches: Iterable[Any] | None, on_nonfinite: str,
    journal: bool,
) -> Recipes:  # fmt: skip
    recipes = recipes_of(algorithm, [item.name for item in work])
    if journal and batches is None:
        raise ValueError(
            f"quantize_: a journal keeps blocks, and algorithm {algorithm!r} goes by layers; leave journal=... out, or "
            "choose one with 'gptq', 'awq', 'smoothquant' or 'align'" + see("bad-option")
        )
    if work and (recipes.needs_batches if batches is None else not recipes.takes_batches):
        raise ValueError(
            f"quantize_: algorithm {algorithm!r} "
            + ("needs batches=..., typical inputs of the model" if batches is None else "takes no batches")
            + "; what chooses for inputs is 'gptq', 'awq', 'smoothquant', 'align' and 'lowrank'" + see("bad-option")
        )  # fmt: skip
    if recipes.steps and on_nonfinite == "zero":
        raise ValueError(
            f"quantize_: on_nonfinite='zero' repairs weights one by one, {algorithm!r} mixes them before; repair the "
            "model first" + see("bad-option")
        )
    for item in work:
        if (reason := why_not_beside(item.module, recipes.by_layer[item.name])) is not None:
            raise ValueError(
                f"quantize_: {item.name} {reason}. Give it an algorithm of its own (algorithm={{{item.name!r}: ...}})"
                + see("layer-not-quantizable")
            )
    return recipes


def _refuse_stale_scales(work: list[Work], recipes: Recipes) -> None:
    moving = [s for s in recipes.steps if s != "align"]
    static = [item.name for item in work if item.act_scale is not None]
    if moving and static:
        raise ValueError(
            f"quantize_: {static[0]} has a static activation scale, measured before {' and '.join(moving)} change its "
            "input; use a config with dynamic activations" + see("bad-option")
        )


def _to_be_turned(graph: DecoderGraph, work: list[Work], recipes: Recipes) -> set[str]:
    """The layers whose input a Hadamard transform turns: R4 of SpinQuant, that of the down projections."""
    if "hadamard" not in recipes.steps:
        return set()
    down = {layer.stages[-1][0] for layer in graph.layers}
    found = [item for item in work if item.name in down]
    for item in found or work[:1]:
        reason = why_nothing_beside(item.module) if found else "no down projection is quantized"
        if reason is not None:
            raise ValueError(
                f"quantize_: 'hadamard' turns the inputs of down projections, not that of {item.name}: {reason}. Leave "
                "the step out" + see("layer-not-quantizable")
            )
    return {item.name for item in found}


def _refuse_halved_inputs(graph: DecoderGraph, recipes: Recipes) -> None:
    """What is folded into a source meets all of its readers."""
    for edge in graph.edges():
        scaled = {n: recipes.by_layer[n].scaling for n in edge.readers if n in recipes.by_layer}
        if len(set(scaled.values())) > 1:
            raise ValueError(
                f"quantize_: {', '.join(scaled)} read one input, which awq scales for all of them; name it for all or "
                "for none" + see("bad-option")
            )


def _keeps(restore: bool | None, device: torch.device | str | None, work: list[Work]) -> bool:
    """Whether float weights are kept until the end."""
    if restore is not None or device is None:
        return bool(restore)
    return all(item.module.weight.device.type != torch.device(device).type for item in work)  # type: ignore[union-attr]
