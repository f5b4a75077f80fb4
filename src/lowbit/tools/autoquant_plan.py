"""What autoquant found, and the plans that follow from it: candidates of each group, sums, budgets, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowbit.algorithms.allocate import Front, least_loss_bound, pareto_front
from lowbit.errors import see
from lowbit.recipe import parse_recipe
from lowbit.specs import parse_config

#: The choice to leave a layer as it is.
FLOAT = "float"


@dataclass(frozen=True)
class Candidate:
    """One config and algorithm for one group: bytes of its weights and microseconds of its matmuls, both with what lies
    beside the weights, and nats of KL."""

    config: str
    bytes: int
    us: float
    kl: float
    algorithm: str = "rtn"

    @property
    def name(self) -> str:
        """What plans call it: "int4wo-128", "int4wo-128 awq+gptq"."""
        return candidate_name(self.config, self.algorithm)


def candidate_name(config: str, algorithm: str) -> str:
    return config if algorithm == "rtn" else f"{config} {algorithm}"


@dataclass(frozen=True)
class Group:
    """Linears that move together, and what they may become; `FLOAT` is among it."""

    layers: tuple[str, ...]
    candidates: tuple[Candidate, ...]

    def candidate(self, name: str) -> Candidate:
        """By its name. Raises ValueError: the group has no such candidate."""
        for c in self.candidates:
            if c.name == name:
                return c
        names = ", ".join(c.name for c in self.candidates)
        raise ValueError(f"autoquant: {self.layers[0]} has no candidate {name!r}; it has {names}" + see("bad-option"))


@dataclass(frozen=True)
class Plan:
    """A choice for every group, its predicted totals over the groups, and what was measured of it, if it was.

    `us` is the sum of the groups' measured times; `measured_us` is the time of all those layers called one after the
    other, as the plan has them.
    """

    choices: tuple[str, ...]
    bytes: int
    us: float
    kl: float
    measured_kl: float | None = None
    measured_us: float | None = None


@dataclass(frozen=True)
class Measurements:
    """All that was measured; everything else follows from it."""

    groups: tuple[Group, ...]
    tokens: int

    def plan(self, choices: Sequence[str]) -> Plan:
        """The totals of a choice; its parts are names of candidates."""
        chosen = [group.candidate(name) for group, name in zip(self.groups, choices, strict=True)]
        return Plan(tuple(choices), sum(c.bytes for c in chosen), sum(c.us for c in chosen), sum(c.kl for c in chosen))

    def uniform(self, choice: str) -> Plan:
        """Every group with one candidate."""
        return self.plan([choice] * len(self.groups))

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the candidates that all groups have."""
        shared = set.intersection(*({c.name for c in g.candidates} for g in self.groups))
        return tuple(c.name for c in self.groups[0].candidates if c.name in shared)

    def rules(self, plan: Plan) -> dict[str, str | None]:
        """Rules for `quantize_`: every layer by its name, None where it stays."""
        return {n: None if c.config == FLOAT else c.config for n, c in self._by_layer(plan)}

    def algorithms(self, plan: Plan) -> dict[str, str]:
        """The `algorithm` of `quantize_`: that of every layer that is quantized."""
        return {n: c.algorithm for n, c in self._by_layer(plan) if c.config != FLOAT}

    def takes_batches(self, plan: Plan) -> bool:
        """Whether `quantize_` has a use for inputs with the plan: those that `autoquant` was given, if any."""
        return any(parse_recipe(word).takes_batches for word in self.algorithms(plan).values())

    def _by_layer(self, plan: Plan) -> list[tuple[str, Candidate]]:
        chosen = [(g, g.candidate(name)) for g, name in zip(self.groups, plan.choices, strict=True)]
        return [(layer, c) for g, c in chosen for layer in g.layers]

    def front(self, by: str = "bytes") -> tuple[list[Plan], Front]:
        """The plans that no other beats in `by` ("bytes" or "us") and KL, by rising cost."""
        front = pareto_front(self._options(by))
        names = [[c.name for c in g.candidates] for g in self.groups]
        return [self.plan([n[i] for n, i in zip(names, row)]) for row in front.choices], front

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
            # Algorithms of one config that put nothing beside the weight take the same time, and the one that loses
            # least is taken; min takes the first of equals.
            first = [sorted(g.candidates, key=lambda c: c.config != FLOAT) for g in self.groups]
            return self.plan([min(c, key=lambda c: (c.us, c.kl)).name for c in first])
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


def save_plan(found: Measurements, plan: Plan, path: Path) -> None:
    """A JSON object of what `quantize_` takes, `config` and `algorithm`, which `lowbit quantize --rules` reads."""
    asked = {"config": found.rules(plan), "algorithm": found.algorithms(plan)}
    path.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def load_plan(path: Path) -> tuple[dict[str, str | None], dict[str, str]]:
    """`config` and `algorithm` of what `save_plan` wrote.

    Raises:
        ValueError: the file is no such object.
    """
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}" + see("bad-option")) from error
    config, algorithm = (asked.get(k) if isinstance(asked, dict) else None for k in ("config", "algorithm"))
    if not (
        isinstance(config, dict) and isinstance(algorithm, dict) and set(asked) == {"config", "algorithm"}
        and all(isinstance(c, str | None) for c in config.values())
        and all(isinstance(a, str) for a in algorithm.values())
    ):  # fmt: skip
        raise ValueError(
            f"{path}: expected one object of 'config' (layer names to config names or null) and 'algorithm' (layer "
            "names to words)" + see("bad-option")
        )
    return {name: None if c is None else parse_config(c).spec for name, c in config.items()}, algorithm
