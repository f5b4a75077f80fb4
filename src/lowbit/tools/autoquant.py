"""A config for every layer by measurement: what it costs in bytes and time, and how far it moves the model's output.

Linears that read the same input share a config and form a group; others stand alone. Of each group and config are
measured: bytes, the time of its matmuls here, and the KL divergence from the original model when this group alone is
quantized, rounded to nearest. Sums over groups predict the whole model: exactly for bytes, well for times, and for the
divergence as long as the errors of layers are small and independent. So the whole is measured in the end, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.algorithms.allocate import Front, least_loss_bound, pareto_front
from lowbit.errors import see
from lowbit.graph import decoder_graph
from lowbit.quantize import quantize_layer_
from lowbit.rules import why_not
from lowbit.specs import parse_config
from lowbit.tools.evaluate import Reference, evaluate, reference_of
from lowbit.tools.sources import variant
from lowbit.tools.timing import Call, copies_for, take_turns, turn_of, warm_up

#: The choice to leave a layer as it is.
FLOAT = "float"
Shape = tuple[int, int]
#: (N, K), config -> microseconds of one matmul
Times = Mapping[tuple[Shape, str], float]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Candidate:
    """One config for one group: bytes of its weights, microseconds of its matmuls, nats of KL divergence."""

    config: str
    bytes: int
    us: float
    kl: float


@dataclass(frozen=True)
class Group:
    """Linears that move together, and what they may become; `FLOAT` is among it."""

    layers: tuple[str, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Plan:
    """A choice for every group, its predicted totals over the groups, and what was measured of it, if it was."""

    configs: tuple[str, ...]
    bytes: int
    us: float
    kl: float
    measured_kl: float | None = None


@dataclass(frozen=True)
class Measurements:
    """All that was measured; everything else follows from it."""

    groups: tuple[Group, ...]
    tokens: int

    def plan(self, configs: Sequence[str]) -> Plan:
        """The totals of a choice."""
        chosen = [next(c for c in g.candidates if c.config == spec) for g, spec in zip(self.groups, configs)]
        return Plan(tuple(configs), sum(c.bytes for c in chosen), sum(c.us for c in chosen), sum(c.kl for c in chosen))

    def uniform(self, config: str) -> Plan:
        """Every group with one config."""
        return self.plan([config] * len(self.groups))

    def rules(self, plan: Plan) -> dict[str, str | None]:
        """Rules for `quantize_`: every layer by its name, None where it stays."""
        pairs = zip(self.groups, plan.configs)
        return {name: None if spec == FLOAT else spec for group, spec in pairs for name in group.layers}

    def front(self, by: str = "bytes") -> tuple[list[Plan], Front]:
        """The plans that no other beats in `by` ("bytes" or "us") and KL, by rising cost."""
        front = pareto_front(self._options(by))
        specs = [[c.config for c in g.candidates] for g in self.groups]
        return [self.plan([s[i] for s, i in zip(specs, row)]) for row in front.choices], front

    def within(self, *, max_bytes: int | None = None, max_us: float | None = None, max_kl: float | None = None) -> Plan:
        """The plan of least KL within bytes or microseconds, or of fewest bytes within KL; by speed alone if none is
        given: the fastest candidate of each group, its float weights unless something is faster.

        Raises:
            ValueError: more than one budget, or none of the plans keeps it.
        """
        given = {k: v for k, v in (("max_bytes", max_bytes), ("max_us", max_us), ("max_kl", max_kl)) if v is not None}
        if len(given) > 1:
            raise ValueError(f"autoquant: give one budget, not {' and '.join(given)}" + see("bad-option"))
        if not given:
            # min takes the first of equals
            first = [sorted(g.candidates, key=lambda c: c.config != FLOAT) for g in self.groups]
            return self.plan([min(c, key=lambda c: c.us).config for c in first])
        name, budget = next(iter(given.items()))
        plans, front = self.front("us" if name == "max_us" else "bytes")
        at = front.within_loss(budget) if name == "max_kl" else front.within_cost(budget)
        if at is None:
            least = f"{plans[-1].kl:.4g} nats" if name == "max_kl" else f"{front.cost[0]:.6g}"
            raise ValueError(
                f"autoquant: no choice keeps {name}={budget:g}; the least of these configs is {least}. Raise it or "
                "offer other configs" + see("bad-option")
            )
        return plans[at]

    def gap(self, plan: Plan, by: str = "bytes") -> float:
        """Nats by which a better plan of the same cost could at most beat this one, by Lagrange's bound."""
        return max(0.0, plan.kl - least_loss_bound(self._options(by), getattr(plan, by)))

    def _options(self, by: str) -> list[list[tuple[float, float]]]:
        # A measured divergence of nothing is rounding, and may be below zero by as much.
        return [[(float(getattr(c, by)), max(c.kl, 0.0)) for c in g.candidates] for g in self.groups]


def autoquant(
    model: nn.Module,
    ids: Tensor,
    configs: Sequence[str],
    *,
    tokens: int = 1,
    window: int = 1024,
    times: Times | None = None,
    skip: Sequence[str] = ("lm_head",),
    progress: Progress | None = None,
) -> Measurements:
    """Measure every config in every group of Linears of a language model; its weights are as before afterwards.

    Args:
        model: as `evaluate` takes it; float weights. Divergences are measured on a copy of it in fp32.
        ids: `(tokens,)` text to measure divergences on; a few hundred tokens tell layers apart.
        configs: short names of configs without static activation scales.
        tokens: rows of the matmuls that are timed: the sequences that generate at once, or a prompt's length.
        window: tokens that the model sees at once.
        times: microseconds for every shape and config and `FLOAT`, instead of measuring them.
        skip: layers to leave alone.

    Raises:
        ValueError: no layer, an unknown config, or one that a layer cannot take.
    """
    specs = [parse_config(c).spec for c in configs]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in skip}
    groups = groups_of(model, linears)
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
    if not specs or not groups:
        raise ValueError("autoquant: needs a config and a layer that may take it" + see("no-layer-selected"))
    times = times if times is not None else measure_times(linears, specs, tokens)
    missing = {(shape_of(m), s) for m in linears.values() for s in (*specs, FLOAT)} - set(times)
    if missing:
        (n, k), spec = min(missing)
        raise ValueError(f"autoquant: the table of times lacks {spec} for {n}x{k}" + see("bad-option"))
    # In bf16, rounding alone moves the divergence by more than 8 bits do, and the sum over layers by a tenth of a nat.
    exact = deepcopy(model).float()
    inside = {n: m for n, m in exact.named_modules() if n in linears}
    reference, found, done = reference_of(exact, ids, window), list[Group](), 0
    for names in groups:
        modules = [linears[n] for n in names]
        float_bytes = sum(m.weight.numel() * m.weight.element_size() for m in modules)
        candidates = [Candidate(FLOAT, float_bytes, sum(times[shape_of(m), FLOAT] for m in modules), 0.0)]
        for spec in specs:
            if progress is not None:
                progress(done, len(groups) * len(specs), f"{names[0]} {spec}")
            done += 1
            with quantized(inside, names, spec) as size:
                kl = evaluate(exact, ids, reference, window).kl_mean
            assert kl is not None
            candidates.append(Candidate(spec, size, sum(times[shape_of(m), spec] for m in modules), kl))
        found.append(Group(names, tuple(candidates)))
    return Measurements(tuple(found), tokens)


def measured(model: nn.Module, found: Measurements, plan: Plan, reference: Reference) -> Plan:
    """The plan with the divergence of the whole model quantized by it, on the text of `reference`."""
    copy = variant(model)
    for name, spec in found.rules(plan).items():
        if spec is not None:
            quantize_layer_(name, copy.get_submodule(name), parse_config(spec))
    return replace(plan, measured_kl=evaluate(copy, reference.ids, reference, reference.window).kl_mean)


def groups_of(model: nn.Module, linears: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """Names of `linears` in groups with one input, where the model is of the Llama family; else each alone."""
    try:
        stages = [s for layer in decoder_graph(model).layers for s in layer.stages]
    except ValueError:  # no known decoder, or its projections are fused into one Linear already
        stages = []
    together = [tuple(n for n in stage if n in linears) for stage in stages]
    known = {n for names in together for n in names}
    return [names for names in together if names] + [(n,) for n in linears if n not in known]


@contextmanager
def quantized(linears: Mapping[str, nn.Module], names: Sequence[str], spec: str) -> Iterator[int]:
    """Inside, these layers hold weights quantized to `spec`; yields the bytes of those."""
    before = {name: linears[name].weight for name in names}
    try:
        yield sum(quantize_layer_(name, linears[name], parse_config(spec)).bytes_after for name in names)
    finally:
        for name, weight in before.items():
            linears[name].weight = weight


def shape_of(module: nn.Module) -> Shape:
    n, k = module.weight.shape  # type: ignore[misc, union-attr]
    return int(n), int(k)  # type: ignore[arg-type]


@torch.inference_mode()
def measure_times(
    linears: Mapping[str, nn.Module], specs: Sequence[str], tokens: int
) -> dict[tuple[Shape, str], float]:
    """Microseconds of each config's matmul per shape, in turns with the float one, weights out of the cache.

    Raises:
        RuntimeError: a config does not run.
    """
    out: dict[tuple[Shape, str], float] = {}
    for shape, module in {shape_of(m): m for m in linears.values()}.items():
        weight: Tensor = module.weight.detach()  # type: ignore[operator, union-attr, assignment]
        x = torch.randn(tokens, shape[1], device=weight.device).to(weight.dtype)
        turns = {}
        for spec in (FLOAT, *specs):
            calls = _calls(weight, x, spec)
            warm_up(calls, weight.device)
            turns[spec] = turn_of(calls, weight.device)
        for spec, timing in take_turns(turns, rounds=7, seconds=0.4).items():
            if isinstance(timing, Exception):
                raise RuntimeError(f"autoquant: {spec} does not run for {shape}: {timing}") from timing
            out[shape, spec] = timing.us
    return out


def _calls(weight: Tensor, x: Tensor, spec: str) -> list[Call]:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    size = weight.numel() * weight.element_size()
    if spec != FLOAT:
        size = quantize_layer_("layer", layer, parse_config(spec)).bytes_after
    held = layer.weight.detach()
    return [partial(F.linear, x, held.clone()) for _ in range(copies_for(size))]


def save_rules(rules: Mapping[str, str | None], path: Path) -> None:
    """One JSON object, layer to config or null, that `lowbit quantize --rules` reads."""
    path.write_text(json.dumps(rules, indent=1) + "\n", encoding="utf-8")


def load_rules(path: Path) -> dict[str, str | None]:
    """What `save_rules` wrote.

    Raises:
        ValueError: the file is no JSON object of names and configs.
    """
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}" + see("bad-option")) from error
    if not isinstance(rules, dict) or not all(isinstance(r, str | None) for r in rules.values()):
        raise ValueError(f"{path}: expected one object of layer names to config names or null" + see("bad-option"))
    return {name: None if r is None else parse_config(r).spec for name, r in rules.items()}
