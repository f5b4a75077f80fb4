"""What the word `algorithm` of `quantize_` means: steps that change the float model, one way to round it, and a term
of low rank that mends what rounding lost.

    "gptq"    "awq"    "rotation+awq+align+gptq"    "awq+gptq+lowrank-8"

Steps are named in the order in which they are done. Each may stand with every rounding; a word without a rounding ends
in the one that its paper has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lowbit.algorithms.gptq import gptq
from lowbit.algorithms.hqq import hqq_params
from lowbit.algorithms.search import search_params
from lowbit.errors import see
from lowbit.formats.base import Format, Planes

ROUNDINGS = ("rtn", "mse", "hqq", "gptq")
#: Steps before the rounding, in the order in which they are possible, and the rounding that follows if none is named.
STEPS = {
    "rotation": "rtn",
    "smoothquant": "rtn",
    "awq": "mse",
    "align": "gptq",
    "hadamard": "rtn",
    "incoherence": "gptq",
}
#: Those that turn a model by random signs and look at nothing.
BLIND = frozenset(("rotation", "hadamard", "incoherence"))
#: Those that leave an op in the model that runs.
AT_RUN_TIME = frozenset(("hadamard", "incoherence"))
#: Those that layers of one block may have or not, and pairs that do not go together.
BY_LAYER, RIVALS = frozenset(("awq", "incoherence")), ({"smoothquant", "awq"}, {"hadamard", "incoherence"})
# More than the 0.01 of the paper, which calibrates with eight times as much text: 0.231 nats instead of 0.245 for int4
# in groups of 128 and 32768 tokens (docs/algorithms.md).
DAMP = 0.05
#: What follows the rounding, and its rank where no number is named: that of LQER's tables for 4-bit weights.
LOWRANK, RANK = "lowrank", 32


@dataclass(frozen=True)
class Recipe:
    """A parsed `algorithm`. `rank` is that of the low-rank term, 0 without one."""

    steps: tuple[str, ...]
    rounding: str
    rank: int = 0

    def __str__(self) -> str:
        return "+".join((*self.steps, self.rounding, *([f"{LOWRANK}-{self.rank}"] if self.rank else [])))

    @property
    def scaling(self) -> str | None:
        """The step that scales channels."""
        return next((s for s in self.steps if s in ("smoothquant", "awq")), None)

    @property
    def incoherent(self) -> bool:
        """Whether inputs and outputs of the layer are turned."""
        return "incoherence" in self.steps

    @property
    def to_nearest(self) -> Recipe:
        """Without all that only changes values. What remains at run time is the same, so bytes and time are."""
        return Recipe(tuple(s for s in self.steps if s in AT_RUN_TIME), "rtn", self.rank)

    @property
    def needs_batches(self) -> bool:
        """Whether anything is chosen for inputs."""
        return self.rounding == "gptq" or bool({*self.steps} - BLIND)

    @property
    def takes_batches(self) -> bool:
        """Whether inputs are of use: a low-rank term mends the output for them, and the weight without them."""
        return self.needs_batches or self.rank > 0


TO_NEAREST = Recipe((), "rtn")


@dataclass(frozen=True)
class Recipes:
    """The recipe of every layer. `steps` are those that any of them has, and `scaling` is that of all that scale."""

    by_layer: Mapping[str, Recipe]

    @property
    def steps(self) -> tuple[str, ...]:
        return tuple(s for s in STEPS if any(s in r.steps for r in self.by_layer.values()))

    @property
    def scaling(self) -> str | None:
        return next((r.scaling for r in self.by_layer.values() if r.scaling), None)

    @property
    def needs_batches(self) -> bool:
        return any(r.needs_batches for r in self.by_layer.values())

    @property
    def takes_batches(self) -> bool:
        return any(r.takes_batches for r in self.by_layer.values())

    def word_of(self, layer: str) -> str:
        return str(self.by_layer[layer])


def recipes_of(algorithm: str | Mapping[str, str], layers: Sequence[str]) -> Recipes:
    """The recipe of each of `layers`: one for all, or by name. Keys are exact names, `re:` patterns or `_default`, as
    in the rules of configs; a layer that none of them names is rounded to nearest.

    Raises:
        ValueError: as `parse_recipe` does; a key matched nothing; or layers differ in a step that is done to whole
            blocks, which is every one but `awq` and `incoherence`.
    """
    if isinstance(algorithm, str):
        return Recipes(dict.fromkeys(layers, parse_recipe(algorithm)))
    words = {key: parse_recipe(word) for key, word in algorithm.items()}
    found, used = dict[str, Recipe](), {"_default"}
    for layer in layers:
        key = layer if layer in words else next(
            (k for k in words if k.startswith("re:") and re.fullmatch(k[3:], layer)), "_default"
        )  # fmt: skip
        used.add(key)
        found[layer] = words.get(key, TO_NEAREST)
    if unmatched := sorted(set(words) - used):
        raise ValueError(
            f"quantize_: algorithms for names that match no layer to be quantized: {unmatched}"
            + see("rule-without-match")
        )
    shared = {tuple(s for s in r.steps if s not in BY_LAYER): layer for layer, r in found.items()}
    if len(shared) > 1:
        (a, first), (b, second), *_ = shared.items()
        raise ValueError(
            f"quantize_: {first} has the steps {list(a)} and {second} has {list(b)}; of steps, layers may differ in "
            "'awq' and 'incoherence' alone, because the others change whole blocks. Give the others to all layers"
            + see("bad-option")
        )
    return Recipes(found)


def parse_recipe(algorithm: str) -> Recipe:
    """The steps, the rounding and the rank that a word such as `"awq+gptq+lowrank-8"` names.

    Raises:
        ValueError: a name is unknown, repeated or out of order, or two of them scale channels.
    """
    before, plus, end = algorithm.rpartition("+")
    found = re.fullmatch(rf"{LOWRANK}(?:-([1-9]\d*))?", end)
    if found is not None:
        recipe = parse_recipe(before) if plus else TO_NEAREST
        if recipe.rank:
            raise ValueError(
                f"quantize_: algorithm {algorithm!r} names {LOWRANK} twice; once is enough" + see("bad-option")
            )
        return replace(recipe, rank=int(found[1] or RANK))
    *steps, last = algorithm.split("+")
    if last not in ROUNDINGS:
        steps.append(last)
    unknown = [s for s in steps if s not in STEPS]
    if unknown:
        raise ValueError(
            f"quantize_: unknown algorithm {algorithm!r}; it is any of {', '.join(STEPS)} in this order, then one of "
            f"{', '.join(ROUNDINGS)}, then {LOWRANK} or {LOWRANK}-RANK, joined by +" + see("bad-option")
        )
    if steps != [s for s in STEPS if s in steps] or any(pair <= {*steps} for pair in RIVALS):
        raise ValueError(
            f"quantize_: algorithm {algorithm!r} is out of order; {' < '.join(STEPS)}, each at most once, and neither "
            f"{' nor '.join(' with '.join(sorted(pair)) for pair in RIVALS)}" + see("bad-option")
        )
    return Recipe(tuple(steps), last if last in ROUNDINGS else STEPS[last])


def round_weight(w: Tensor, fmt: Format, rounding: str, hessian: Tensor | None) -> Planes:
    """All planes of `w (N, K)`, finite. `hessian (K, K)` is `X^T X` of its inputs, None where none were seen; GPTQ then
    is the search of scales that it begins with."""
    if rounding == "rtn":
        return fmt.quantize(w, check_finite=False)
    if rounding == "hqq":
        return fmt.quantize(w, hqq_params(w, fmt), check_finite=False)
    if rounding == "gptq" and hessian is not None and fmt.element.vector > 2:
        # The search tries 256 vectors for every four weights dozens of times: ten times as long as all else, for 2 to
        # 4 % of the output's error.
        return gptq(w, hessian, fmt, fmt.choose_params(w), damp=DAMP, act_order=True)
    params = search_params(w, fmt, None if hessian is None else hessian.diagonal())
    if rounding == "mse" or hessian is None:
        return fmt.quantize(w, params, check_finite=False)
    # Scales are chosen beforehand, so that the order costs nothing (docs/algorithms.md).
    return gptq(w, hessian, fmt, params, damp=DAMP, act_order=True)
