"""A config and an algorithm for every layer by measurement: bytes, time, and how far they move the model's output.

Linears that read the same input form a group and move together; which do is seen while the model runs. Of each group,
config and algorithm are measured: bytes, the time of its matmuls here, and the KL divergence from the original model
when this group alone is quantized. Sums over groups predict the whole model: exactly for bytes, well for times, and for
the divergence as long as the errors of layers are small and independent. So the whole is measured in the end, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import count, product
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibrate import Moments, blocks_of, run_blocks
from lowbit.errors import see
from lowbit.fold import awq_
from lowbit.graph import Layer, decoder_graph
from lowbit.linear import beside, nbytes_beside
from lowbit.original import Original
from lowbit.quantize import quantize_
from lowbit.quantize_layer import quantize_layer_, why_not_beside
from lowbit.recipe import BY_LAYER, LOWRANK, ROUNDINGS, TO_NEAREST, Recipe, parse_recipe
from lowbit.rules import why_not
from lowbit.specs import parse_config
from lowbit.tools.autoquant_plan import FLOAT, Candidate, Group, Measurements, Plan, candidate_name
from lowbit.tools.evaluate import Reference, evaluate, reference_of
from lowbit.tools.sources import variant
from lowbit.tools.timing import Call, copies_for, take_turns, turn_of, warm_up

Shape = tuple[int, int]
#: (N, K), name of a candidate that is rounded to nearest (`timed_as`) -> microseconds of one layer
Times = Mapping[tuple[Shape, str], float]
Progress = Callable[[int, int, str], None]


def autoquant(
    model: nn.Module,
    ids: Tensor,
    configs: Sequence[str],
    *,
    algorithms: Sequence[str] = ("rtn",),
    batches: Sequence[Tensor] | None = None,
    tokens: int = 1,
    window: int = 1024,
    times: Times | None = None,
    skip: Sequence[str] = ("lm_head",),
    progress: Progress | None = None,
) -> Measurements:
    """Measure every config and algorithm in every group of Linears of a language model, which stays as it is.

    Args:
        model: as `evaluate` takes it; float weights. Divergences are measured on a copy of it in fp32.
        ids: `(tokens,)` text to measure divergences on; a few hundred tokens tell layers apart.
        configs: short names of configs without static activation scales.
        algorithms: words as `quantize_` takes them, with the steps `awq` and `incoherence` alone: all layers have the
            others or none. Groups that cannot take one are offered the rest, and a warning names them.
        batches: ids `(1, T)` that algorithms see which need inputs, or have a use for them as low-rank terms have.
        tokens: rows of the matmuls that are timed: the sequences that generate at once, or a prompt's length.
        window: tokens that the model sees at once.
        times: microseconds of every shape, `(N, K)`, and config and `FLOAT`, instead of measuring them. With what lies
            beside a weight, the algorithm that has it and rounds to nearest stands behind the config, such as
            "int4wo-128 rtn+lowrank-8" and "int4wo-128 incoherence+rtn".
        skip: layers to leave alone.

    Raises:
        ValueError: no layer, an unknown config or algorithm, or one that a layer cannot take; `times` lacks a time; a
            layer does not run for `ids`, so that nothing would be known of it.
    """
    specs, recipes = [parse_config(c).spec for c in configs], _checked_recipes(algorithms, batches)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in skip}
    _check_layers(linears, specs, recipes.values())
    groups = groups_of(model, linears, ids[:window])
    times = times if times is not None else measure_times(linears, specs, tokens, recipes.values())
    needed = {FLOAT, *(timed_as(spec, recipe) for spec, recipe in product(specs, recipes.values()))}
    missing = {(shape_of(m), name) for m in linears.values() for name in needed} - set(times)
    if missing:
        (n, k), name = min(missing)
        raise ValueError(
            f"autoquant: the table of times lacks {name!r} for {n}x{k}; add it, or leave times= out to measure all"
            + see("bad-option")
        )
    # In bf16, rounding alone moves the divergence by more than 8 bits do, and the sum over layers by a tenth of a nat.
    exact = deepcopy(model).float()
    graph = decoder_graph(exact) if any(r.scaling for r in recipes.values()) else None
    edges = {e.readers: (layer, e.source) for layer in graph.layers for e in layer.edges} if graph is not None else {}
    reference, found, done = reference_of(exact, ids, window), dict[tuple[str, ...], Group](), 0

    def measure(names: tuple[str, ...], moments: dict[str, Moments] | None) -> None:
        nonlocal done
        modules = [linears[n] for n in names]
        float_bytes = sum(m.weight.numel() * m.weight.element_size() for m in modules)
        candidates = [Candidate(FLOAT, float_bytes, sum(times[shape_of(m), FLOAT] for m in modules), 0.0)]
        for spec, (word, recipe) in product(specs, recipes.items()):
            if progress is not None:
                progress(done, len(groups) * len(specs) * len(recipes), f"{names[0]} {candidate_name(spec, word)}")
            done += 1
            if (recipe.needs_batches and moments is None) or (recipe.scaling and names not in edges):
                continue
            layer, source = edges[names] if recipe.scaling else (None, names[0])
            held = {n: exact.get_submodule(n) for n in (source, *names)}
            dtypes = {n: linears[n].weight.dtype for n in names}
            with quantized(exact, held, dtypes, spec, recipe, layer, moments) as size:
                kl = evaluate(exact, ids, reference, window).kl_mean
            assert kl is not None
            us = sum(times[shape_of(m), timed_as(spec, recipe)] for m in modules)
            candidates.append(Candidate(spec, size, us, kl, word))
        found[names] = Group(names, tuple(candidates))

    def visit(moments: dict[str, Moments]) -> None:
        inside = [names for names in groups if names[0] in moments]
        if inside:
            # What `run_blocks` visits has been seen to pass each block's output to the next, and nothing else.
            with starting_at(exact, inside[0][0], lambda: evaluate(exact, ids, reference, window)):
                for names in inside:
                    measure(names, moments)

    if batches is not None:
        run_blocks(exact, batches, visit)
    for names in groups:
        if names not in found:
            measure(names, None)
    every = {candidate_name(spec, word) for spec in specs for word in recipes}
    if lacking := [g.layers[0] for g in found.values() if every - {c.name for c in g.candidates}]:
        warnings.warn(
            f"autoquant: {', '.join(lacking[:4])}{', ...' if len(lacking) > 4 else ''} ({len(lacking)} of {len(found)} "
            "groups) lie outside the blocks or read an input together with layers that are skipped, and are offered "
            "only algorithms that need neither", stacklevel=2,
        )  # fmt: skip
    return Measurements(tuple(found[names] for names in groups), tokens)


def quantized_by(
    model: nn.Module, found: Measurements, plan: Plan, batches: Sequence[Tensor] | None = None
) -> nn.Module:
    """A copy of the model quantized by the plan; what stays float is shared with the original. `batches` are those that
    `autoquant` was given.

    Raises:
        ValueError: the plan's algorithms need batches.
    """
    copy = variant(model)
    seen = batches if found.takes_batches(plan) else None
    quantize_(copy, found.rules(plan), algorithm=found.algorithms(plan), batches=seen, measure=False)
    return copy


def measured(
    model: nn.Module, found: Measurements, plan: Plan, reference: Reference, batches: Sequence[Tensor] | None = None
) -> Plan:
    """The plan with the divergence of the whole model quantized by it, on the text of `reference`, and the time of all
    its layers, one after the other."""
    copy = quantized_by(model, found, plan, batches)
    us = layers_us({"plan": copy}, list(found.rules(plan)), found.tokens)["plan"]
    kl = evaluate(copy, reference.ids, reference, reference.window).kl_mean
    return replace(plan, measured_kl=kl, measured_us=us)


def layers_us(models: Mapping[str, nn.Module], layers: Sequence[str], tokens: int) -> dict[str, float]:
    """Microseconds of the named Linears of each model, called one after the other with `tokens` rows; models in turns.
    What lies beside a weight runs with it, and so does a bias.

    Each layer is called once per turn: together they exceed the cache, as in a model that runs.

    Raises:
        RuntimeError: a layer does not run.
    """
    turns = {}
    for name, model in models.items():
        calls = list[Call]()
        for layer in layers:
            module = model.get_submodule(layer)
            weight: Tensor = module.weight  # type: ignore[assignment]
            x = torch.randn(tokens, weight.shape[1], device=weight.device).to(weight.dtype)
            calls.append(partial(module.forward, x))
        with torch.inference_mode():
            warm_up(calls, x.device)
        turns[name] = turn_of(calls, x.device)
    out: dict[str, float] = {}
    with torch.inference_mode():
        for name, timing in take_turns(turns, rounds=9, seconds=2.0).items():
            if isinstance(timing, Exception):
                raise RuntimeError(f"autoquant: the layers of {name} do not run: {timing}") from timing
            out[name] = timing.us * len(layers)
    return out


@torch.no_grad()
def groups_of(model: nn.Module, linears: Mapping[str, nn.Module], ids: Tensor) -> list[tuple[str, ...]]:
    """Names of `linears` in groups that are given the same values, in the order in which they first run.

    That is seen in a run over `ids (T,)`, whatever the model is called: an input is known by its memory, and by how
    often it has been written to since.

    Raises:
        ValueError: a layer does not run for these ids, or two share a weight.
    """
    inputs = dict[str, list[tuple[int, ...]]]()
    kept: list[Tensor] = []  # so that no memory is used twice

    def see_input(name: str, x: Tensor) -> None:
        kept.append(x)
        place = (x.untyped_storage().data_ptr(), int(x.storage_offset()), x.numel(), x._version)
        inputs.setdefault(name, []).append(place)

    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: see_input(name, args[0])) for name, m in linears.items()
    ]
    try:
        model(ids[None])
    finally:
        for h in hooks:
            h.remove()
    if silent := [n for n in linears if n not in inputs]:
        raise ValueError(
            f"autoquant: {', '.join(silent[:4])}{', ...' if len(silent) > 4 else ''} did not run for these "
            f"{ids.numel()} tokens, so nothing would be known of {len(silent)} layers; give a longer text, or leave "
            "them out with skip=" + see("calibration-saw-nothing")
        )
    owner: dict[int, str] = {}
    for name in inputs:
        first = owner.setdefault(id(linears[name].weight), name)
        if first != name:
            raise ValueError(
                f"autoquant: {name} shares its weight with {first}, and cannot be chosen apart; leave both out "
                "with skip=" + see("bad-option")
            )
    groups = dict[tuple[tuple[int, ...], ...], list[str]]()
    for name, places in inputs.items():
        groups.setdefault(tuple(places), []).append(name)
    return [tuple(names) for names in groups.values()]


@contextmanager
def starting_at(model: nn.Module, layer: str, run: Callable[[], object]) -> Iterator[None]:
    """Inside, `run` does not compute again what comes before the block of a layer: that block is given what it was
    given when `run` was called first, and those before it pass on what they are given."""
    prefix, blocks = blocks_of(model)
    at = int(layer.removeprefix(f"{prefix}.").split(".")[0])
    inputs, tuples, calls = list[Tensor](), list[bool](), count()
    hooks = [
        blocks[at].register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        blocks[at].register_forward_hook(lambda _, args, out: tuples.append(isinstance(out, tuple))),
    ]
    try:
        run()
    finally:
        for h in hooks:
            h.remove()

    def passed(x: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor]:
        return (x,) if any(tuples) else x

    def given(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[next(calls) % len(inputs)], *args[1:])

    hook = blocks[at].register_forward_pre_hook(given)
    for block in blocks[:at]:
        block.forward = passed
    try:
        yield
    finally:
        hook.remove()
        for block in blocks[:at]:
            del block.forward


@contextmanager
def quantized(
    model: nn.Module, held: Mapping[str, nn.Module], dtypes: Mapping[str, torch.dtype], spec: str, recipe: Recipe,
    layer: Layer | None, moments: dict[str, Moments] | None,
) -> Iterator[int]:  # fmt: skip
    """Inside, the layers of a group are quantized to `spec`; yields the bytes of their weights and what lies beside.

    `held` are all modules that the recipe changes, to be put back as they were, and `dtypes` those of the original's
    weights by layer. `moments` are those of the layers' inputs; a recipe of no use for them sees none, as in
    `quantize_`.
    """
    before = [Original(module) for module in held.values()]
    config = parse_config(spec)
    try:
        if layer is not None and moments is not None:
            moments = awq_(model, layer, moments, dict.fromkeys(dtypes, config.scheme.weight))
        size = 0
        for name, dtype in dtypes.items():
            module, seen = held[name], moments[name] if moments is not None and recipe.takes_batches else None
            quantize_layer_(name, module, config, recipe, seen)
            # A low-rank term has the dtype of the model's own weights, which this copy in fp32 does not know.
            for part in beside(module).values():
                if part.is_floating_point():
                    part.data = part.data.to(dtype)
            size += module.weight.nbytes_packed + nbytes_beside(beside(module).values())  # type: ignore[operator, union-attr, assignment]
        yield size
    finally:
        for original in before:
            original.put_back()


def _checked_recipes(algorithms: Sequence[str], batches: Sequence[Tensor] | None) -> dict[str, Recipe]:
    recipes = {word: parse_recipe(word) for word in algorithms}
    for word, recipe in recipes.items():
        if wide := [step for step in recipe.steps if step not in BY_LAYER]:
            raise ValueError(
                f"autoquant: {word!r} has {' and '.join(wide)}, which all layers of a model have or none, and groups "
                f"choose apart. Offer {', '.join(ROUNDINGS)}, with {' or '.join(sorted(BY_LAYER))} before and "
                f"{LOWRANK}-RANK behind, or give it to all layers with quantize_" + see("bad-option")
            )
    needy = [w for w, r in recipes.items() if r.needs_batches]
    if needy and batches is None:
        raise ValueError(
            f"autoquant: algorithm {needy[0]!r} needs batches=..., ids (1, T) of typical text" + see("bad-option")
        )
    if batches is not None and not any(r.takes_batches for r in recipes.values()):
        raise ValueError(f"autoquant: none of the algorithms {list(recipes)} takes batches" + see("bad-option"))
    return recipes


def _check_layers(linears: Mapping[str, nn.Module], specs: Sequence[str], recipes: Collection[Recipe]) -> None:
    if not specs or not linears:
        raise ValueError("autoquant: needs a config and a layer that may take it" + see("no-layer-selected"))
    for spec in specs:
        config = parse_config(spec)
        for name, module in linears.items():
            if (reason := why_not(module, config.scheme)) is not None:
                raise ValueError(f"autoquant: {name} cannot take {spec}: {reason}" + see("layer-not-quantizable"))
            if config.scheme.act is not None and config.scheme.act.static:
                raise ValueError(
                    f"autoquant: {spec} needs calibrated scales; offer configs with dynamic activations"
                    + see("bad-option")
                )
    for (name, module), recipe in product(linears.items(), recipes):
        if (reason := why_not_beside(module, recipe)) is not None:
            raise ValueError(
                f"autoquant: {name} {reason}. Leave it out with skip=, or offer other algorithms"
                + see("layer-not-quantizable")
            )


def timed_as(spec: str, recipe: Recipe) -> str:
    """Under what name a table has the time of a config with an algorithm: which one chose the values does not matter to
    it, what it puts beside the weight does."""
    return candidate_name(spec, str(recipe.to_nearest))


def shape_of(module: nn.Module) -> Shape:
    n, k = module.weight.shape  # type: ignore[misc, union-attr]
    return int(n), int(k)  # type: ignore[arg-type]


@torch.inference_mode()
def measure_times(
    linears: Mapping[str, nn.Module], specs: Sequence[str], tokens: int, recipes: Collection[Recipe] = (TO_NEAREST,)
) -> dict[tuple[Shape, str], float]:
    """Microseconds per shape of the matmul of each config, by `timed_as` with what each recipe puts beside the weight,
    in turns with the float one, weights out of the cache.

    Raises:
        RuntimeError: a config does not run.
    """
    kinds = {timed_as(s, r): (s, r.to_nearest) for s, r in product(specs, recipes)}
    out: dict[tuple[Shape, str], float] = {}
    for shape, module in {shape_of(m): m for m in linears.values()}.items():
        weight: Tensor = module.weight.detach()  # type: ignore[operator, union-attr, assignment]
        x = torch.randn(tokens, shape[1], device=weight.device).to(weight.dtype)
        turns = {}
        for name, kind in {FLOAT: None, **kinds}.items():
            calls = _calls(weight, x, kind)
            warm_up(calls, weight.device)
            turns[name] = turn_of(calls, weight.device)
        for name, timing in take_turns(turns, rounds=7, seconds=0.4).items():
            if isinstance(timing, Exception):
                raise RuntimeError(f"autoquant: {name} does not run for {shape}: {timing}") from timing
            out[shape, name] = timing.us
    return out


def _calls(weight: Tensor, x: Tensor, kind: tuple[str, Recipe] | None) -> list[Call]:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    size = weight.numel() * weight.element_size()
    if kind is not None:
        spec, recipe = kind
        size = quantize_layer_("layer", layer, parse_config(spec), recipe).bytes_after
    return [partial(deepcopy(layer).forward, x) for _ in range(copies_for(size))]
