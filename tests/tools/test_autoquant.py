"""Choices per layer: what is measured, and what follows from it."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_ids, tiny_llama
from torch import Tensor, nn

import lowbit
from lowbit.graph import decoder_graph
from lowbit.models.fuse import fuse_projections_
from lowbit.recipe import parse_recipe
from lowbit.tools.autoquant import (
    autoquant,
    groups_of,
    layers_us,
    measure_times,
    measured,
    quantized_by,
    shape_of,
    timed_as,
)
from lowbit.tools.autoquant_plan import FLOAT, Candidate, Group, Measurements, candidate_name, load_plan, save_plan
from lowbit.tools.evaluate import evaluate, reference_of

CONFIGS = ["int8wo", "int4wo-16"]
IDS = tiny_ids(1, 40)[0]


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def table(model: nn.Module) -> dict[tuple[tuple[int, int], str], float]:
    speed = {FLOAT: 2.0, "int8wo": 1.0, "int4wo-16": 3.0}
    return {(shape_of(m), s): us for m in linears_of(model).values() for s, us in speed.items()}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def found(model: nn.Module) -> Measurements:
    return autoquant(model, IDS, CONFIGS, times=table(model), window=64)


BATCHES = [tiny_ids(1, 60, seed=s) for s in range(6)]
ALGORITHMS = ("rtn", "hqq", "gptq", "awq+gptq")


@pytest.fixture(scope="module")
def both(model: nn.Module) -> Measurements:
    """Configs and algorithms."""
    times = {key: us for key, us in table(model).items() if key[1] != "int8wo"}
    return autoquant(model, IDS, ["int4wo-16"], algorithms=ALGORITHMS, batches=BATCHES, times=times, window=64)


class Strange(nn.Module):
    """A language model whose parts have names of their own. `second` and `third` read one tensor, `fourth` the same
    memory after it was written to, `fifth` a view of what `second` reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(97, 48)
        self.first, self.second, self.third, self.fourth, self.fifth = (nn.Linear(48, 48, False) for _ in range(5))
        self.out = nn.Linear(48, 97, False)
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.table(ids))
        y = self.second(x) + self.third(x) + self.fifth(x.view(-1, 48)).view(x.shape)
        x.mul_(2)
        return self.out(y + self.fourth(x))


def test_readers_of_one_input_move_together(model: nn.Module) -> None:
    groups = groups_of(model, linears_of(model), IDS)
    assert groups == [stage for layer in decoder_graph(model).layers for stage in layer.stages]


def test_groups_are_seen_in_models_of_any_name() -> None:
    strange = Strange().eval()
    groups = groups_of(strange, linears_of(strange), IDS)
    assert groups == [("first",), ("second", "third", "fifth"), ("fourth",), ("out",)]
    found = autoquant(strange, IDS, CONFIGS, times=table(strange), window=64, skip=("out",))
    assert [g.layers for g in found.groups] == groups[:-1]


def test_what_cannot_be_seen_is_said() -> None:
    strange = Strange().eval()
    strange.sixth = nn.Linear(48, 48)
    with pytest.raises(ValueError, match="sixth did not run"):
        autoquant(strange, IDS, CONFIGS, times=table(strange), window=64)
    strange = Strange().eval()
    strange.third.weight = strange.first.weight
    with pytest.raises(ValueError, match="third shares its weight with first"):
        autoquant(strange, IDS, CONFIGS, times=table(strange), window=64)


# Algorithms ---------------------------------------------------------------------------------------


def test_every_algorithm_is_measured_and_the_model_stays(model: nn.Module, both: Measurements) -> None:
    assert both.choices == (FLOAT, "int4wo-16", *(f"int4wo-16 {a}" for a in ALGORITHMS[1:]))
    for group in both.groups:
        of = [c for c in group.candidates if c.config != FLOAT]
        assert len({c.bytes for c in of}) == len({c.us for c in of}) == 1
        assert len({c.kl for c in of}) == len(of)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_llama().parameters()))


def test_measuring_from_a_block_on_gives_the_same_divergence(model: nn.Module, both: Measurements) -> None:
    """Without batches, every measurement runs the whole model."""
    alone = autoquant(model, IDS, ["int4wo-16"], algorithms=("rtn", "hqq"), times=table(model), window=64)
    for group, other in zip(both.groups, alone.groups, strict=True):
        assert group.layers == other.layers
        assert group.candidates[:3] == other.candidates
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


def test_divergence_of_a_group_is_that_of_quantize_with_its_algorithm(model: nn.Module, both: Measurements) -> None:
    """Of the last group, so that the blocks before it are as calibration saw them."""
    for word in ALGORITHMS:
        plan = both.plan([FLOAT] * (len(both.groups) - 1) + [candidate_name("int4wo-16", word)])
        assert both.algorithms(plan) == {both.groups[-1].layers[0]: word}
        copy = quantized_by(model, both, plan, BATCHES)
        assert evaluate(copy, IDS, reference_of(model, IDS, 64), 64).kl_mean == plan.kl


@pytest.mark.parametrize("word", ALGORITHMS)
def test_at_a_uniform_plans_size_the_choice_predicts_less(both: Measurements, word: str) -> None:
    uniform = both.uniform(candidate_name("int4wo-16", word))
    plan = both.within(max_bytes=uniform.bytes)
    assert plan.bytes == uniform.bytes
    assert plan.kl < uniform.kl
    assert len(set(both.algorithms(plan).values())) > 1


def test_by_speed_alone_the_algorithm_that_loses_least_is_taken(both: Measurements) -> None:
    fast = tuple(
        Group(g.layers, tuple(replace(c, us=1.0 + (c.config == FLOAT)) for c in g.candidates)) for g in both.groups
    )
    plan = Measurements(fast, 1).within()
    for group, name in zip(fast, plan.choices):
        assert group.candidate(name).kl == min(c.kl for c in group.candidates if c.config != FLOAT)


def test_a_whole_plan_is_measured_in_time_and_divergence(model: nn.Module, both: Measurements) -> None:
    plan = both.within(max_bytes=both.uniform("int4wo-16").bytes)
    assert both.takes_batches(plan)
    reference = reference_of(model, IDS, 64)
    whole = measured(model, both, plan, reference, BATCHES)
    assert whole.measured_us is not None
    assert whole.measured_us > 0
    assert whole.measured_kl == evaluate(quantized_by(model, both, plan, BATCHES), IDS, reference, 64).kl_mean
    with pytest.raises(ValueError, match="needs batches"):
        measured(model, both, plan, reference)


def test_time_of_layers_is_that_of_all_of_them() -> None:
    """Four layers take longer than one of them."""
    model = nn.ModuleDict({f"l{i}": nn.Linear(512, 512, False) for i in range(8)})
    names = list(model)
    assert layers_us({"m": model}, names, 64)["m"] > 2 * layers_us({"m": model}, names[:1], 64)["m"]


def test_groups_that_cannot_take_an_algorithm_are_named(model: nn.Module) -> None:
    names = [n for n in linears_of(model) if n.endswith(("layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"))]
    others = tuple(n for n in linears_of(model) if n not in names)
    times = table(model) | {(shape_of(model.lm_head), s): 1.0 for s in (FLOAT, "int8wo", "int4wo-16")}  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"layers\.1\.self_attn\.q_proj, lm_head \(2 of 2 groups\)"):
        found = autoquant(
            model,
            IDS,
            ["int4wo-16"],
            algorithms=("rtn", "gptq", "awq"),
            batches=BATCHES,
            times=times,
            window=64,
            skip=others,
        )
    assert [[c.name for c in g.candidates[1:]] for g in found.groups] == [
        ["int4wo-16", "int4wo-16 gptq"], ["int4wo-16"],
    ]  # fmt: skip
    assert found.choices == (FLOAT, "int4wo-16")


def test_algorithms_that_change_more_than_a_group_are_refused(model: nn.Module) -> None:
    for words, batches, match in (
        (("rotation",), None, "'rotation' has rotation, which all layers of a model have or none"),
        (("awq+align+hadamard+gptq+lowrank-4",), BATCHES, "has align and hadamard, which all.*Offer rtn, .*-RANK"),
        (("gptq",), None, "needs batches"), (("incoherence+gptq",), None, "needs batches"),
        (("rtn", "incoherence+rtn"), BATCHES, "none of the algorithms"), (("best",), None, "unknown algorithm"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            autoquant(model, IDS, ["int4wo-16"], algorithms=words, batches=batches, times=table(model), window=64)


# Beside the weight --------------------------------------------------------------------------------

BESIDE = (
    "gptq", "gptq+lowrank-4", "rtn+lowrank-2", "awq+gptq+lowrank-2", "incoherence+gptq", "awq+incoherence+rtn",
    "incoherence+gptq+lowrank-4",
)  # fmt: skip


def beside_of(model: nn.Module, algorithms: Sequence[str] = BESIDE, **options: Any) -> Measurements:
    kinds = {timed_as("int4wo-16", parse_recipe(word)): i + 1.0 for i, word in enumerate(algorithms)}
    times = {(shape_of(m), s): us for m in linears_of(model).values() for s, us in {FLOAT: 0.0, **kinds}.items()}
    given = {"batches": BATCHES, "times": times, "window": 64, **options}
    return autoquant(model, IDS, ["int4wo-16"], algorithms=algorithms, **given)


@pytest.fixture(scope="module")
def beside(model: nn.Module) -> Measurements:
    """What algorithms put beside a weight."""
    return beside_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_include_what_lies_beside_the_weight(dtype: torch.dtype) -> None:
    """To the byte those of `quantize_`, a mixed plan's too, in the dtype of the model and not of the copy in fp32."""
    found = beside_of(tiny_llama(dtype=dtype))
    mixed = [FLOAT, *(candidate_name("int4wo-16", word) for word in BESIDE)]
    for plan in (*map(found.uniform, found.choices), found.plan(mixed)):
        model = tiny_llama(dtype=dtype)
        batches = BATCHES if found.takes_batches(plan) else None
        report = lowbit.quantize_(model, found.rules(plan), algorithm=found.algorithms(plan), batches=batches)
        assert sum(layer.bytes_after for layer in report.layers) == plan.bytes
    for group in found.groups:
        sizes = sum(sum(shape_of(model.get_submodule(n))) for n in group.layers)
        plain, term, turned = (
            group.candidate(f"int4wo-16 {word}").bytes for word in ("gptq", "gptq+lowrank-4", "incoherence+gptq")
        )
        assert (term - plain, turned - plain) == (dtype.itemsize * 4 * sizes, sizes)


@pytest.mark.parametrize("word", BESIDE)
def test_divergence_with_something_beside_is_that_of_quantize(
    model: nn.Module, beside: Measurements, word: str
) -> None:
    """Of the last group, so that the blocks before it are as calibration saw them; and each was put back."""
    plan = beside.plan([FLOAT] * (len(beside.groups) - 1) + [candidate_name("int4wo-16", word)])
    whole = measured(model, beside, plan, reference_of(model, IDS, 64), BATCHES)
    assert whole.measured_kl == plan.kl > 0


@pytest.mark.parametrize("word", ["rtn+lowrank-2", "incoherence+rtn", "incoherence+hqq+lowrank-2"])
def test_without_inputs_every_group_gives_what_quantize_gives(model: nn.Module, word: str) -> None:
    """A low-rank term then mends weights, not outputs, and no layer's choice depends on another's."""
    found = beside_of(model, (word,), batches=None)
    reference, choice = reference_of(model, IDS, 64), candidate_name("int4wo-16", word)
    for i in range(len(found.groups)):
        plan = found.plan([choice if i == j else FLOAT for j in range(len(found.groups))])
        copy = tiny_llama()
        lowbit.quantize_(copy, found.rules(plan), algorithm=found.algorithms(plan))
        assert evaluate(copy, IDS, reference, 64).kl_mean == plan.kl


def test_a_term_is_worth_its_bytes_where_the_budget_has_them(model: nn.Module) -> None:
    """What is offered more is never worse, and a budget between two uniform plans buys terms for some groups."""
    less, more = beside_of(model, ("gptq",)), beside_of(model, ("gptq", "gptq+lowrank-4"))
    for plan in less.front()[0]:
        assert more.within(max_bytes=plan.bytes).kl <= plan.kl
    small, large = more.uniform("int4wo-16 gptq"), more.uniform("int4wo-16 gptq+lowrank-4")
    plan = more.within(max_bytes=(small.bytes + large.bytes) // 2)
    assert plan.kl < less.within(max_bytes=plan.bytes).kl
    assert set(more.algorithms(plan).values()) == {"gptq", "gptq+lowrank-4"}


def test_a_plan_with_terms_survives_a_file(model: nn.Module, beside: Measurements, tmp_path: Path) -> None:
    plan = beside.plan([FLOAT, *(candidate_name("int4wo-16", word) for word in BESIDE)])
    save_plan(beside, plan, tmp_path / "rules.json")
    rules, algorithms = load_plan(tmp_path / "rules.json")
    assert set(algorithms.values()) == set(BESIDE)
    copies = [tiny_llama(), quantized_by(model, beside, plan, BATCHES)]
    lowbit.quantize_(copies[0], rules, algorithm=algorithms, batches=BATCHES)
    assert torch.equal(copies[0](IDS[None]), copies[1](IDS[None]))


def test_time_is_that_of_the_layer_with_all_of_it(model: nn.Module, beside: Measurements) -> None:
    """Keyed by what is beside the weight, whatever chose the values."""
    order = [timed_as("int4wo-16", parse_recipe(word)) for word in BESIDE]
    assert order == [
        "int4wo-16", "int4wo-16 rtn+lowrank-4", "int4wo-16 rtn+lowrank-2", "int4wo-16 rtn+lowrank-2",
        "int4wo-16 incoherence+rtn", "int4wo-16 incoherence+rtn", "int4wo-16 incoherence+rtn+lowrank-4",
    ]  # fmt: skip
    for group in beside.groups:
        us = [c.us / len(group.layers) for c in group.candidates[1:]]
        assert us == [1.0, 2.0, 4.0, 4.0, 6.0, 6.0, 7.0]
    old = {key: us for key, us in table(model).items() if key[1] != "int8wo"}
    with pytest.raises(ValueError, match=r"times lacks 'int4wo-16 rtn\+lowrank-2' for .*leave times= out"):
        beside_of(model, ("rtn", "rtn+lowrank-2"), times=old)


def test_a_layer_takes_longer_with_something_beside_its_weight() -> None:
    """For one token, A and B of full rank are eight times the bytes of the weight, in parts and as a whole."""
    linears = {"a": nn.Linear(512, 512, False).requires_grad_(False)}
    recipes = [parse_recipe(word) for word in ("gptq", "rtn+lowrank-512", "incoherence+rtn+lowrank-512")]
    times = measure_times(linears, ["int8wo"], 1, recipes)
    assert set(times) == {((512, 512), name) for name in (FLOAT, *(timed_as("int8wo", r) for r in recipes))}
    plain = times[(512, 512), "int8wo"]
    assert min(times[(512, 512), timed_as("int8wo", r)] for r in recipes[1:]) > 2 * plain
    models = {}
    for word in ("rtn", "rtn+lowrank-512"):
        models[word] = nn.ModuleDict({str(i): deepcopy(linears["a"]) for i in range(8)})
        lowbit.quantize_(models[word], "int8wo", algorithm=word)
    whole = layers_us(models, list(models["rtn"]), 1)
    assert whole["rtn+lowrank-512"] > 2 * whole["rtn"]


def test_transforms_and_terms_need_no_known_architecture() -> None:
    strange = Strange().eval()
    words = ("rtn", "rtn+lowrank-3", "incoherence+rtn")
    found = beside_of(strange, words, batches=None, times=None, skip=("out",))
    assert found.choices == (FLOAT, *(candidate_name("int4wo-16", word) for word in words))
    plan = found.uniform("int4wo-16 incoherence+rtn")
    report = lowbit.quantize_(strange, found.rules(plan), algorithm=found.algorithms(plan))
    assert sum(layer.bytes_after for layer in report.layers) == plan.bytes


def test_joined_projections_stay_whole() -> None:
    """One layer with one term, as `quantize_` gives it."""
    model = tiny_llama()
    fuse_projections_(model)
    found = beside_of(model, ("rtn", "rtn+lowrank-4", "incoherence+rtn"), batches=None)
    assert {len(g.layers) for g in found.groups} == {1}
    plan = found.within(max_bytes=found.uniform("int4wo-16 rtn+lowrank-4").bytes)
    report = lowbit.quantize_(model, found.rules(plan), algorithm=found.algorithms(plan))
    assert sum(layer.bytes_after for layer in report.layers) == plan.bytes


def test_layers_that_cannot_have_it_are_named(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"k_proj cannot have lowrank-17: the rank .* at most 16. Leave it out"):
        beside_of(model, ("rtn+lowrank-17",), batches=None)


# Plans --------------------------------------------------------------------------------------------


def test_measuring_leaves_the_model_as_it_was(model: nn.Module, found: Measurements) -> None:
    fresh = tiny_llama()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))
    assert not any(isinstance(p, lowbit.QuantizedTensor) for p in model.parameters())


def test_predicted_bytes_are_those_of_quantize(found: Measurements) -> None:
    plan = found.within(max_bytes=(found.uniform("int8wo").bytes + found.uniform("int4wo-16").bytes) // 2)
    assert set(plan.choices) == set(CONFIGS)
    report = lowbit.quantize_(tiny_llama(), found.rules(plan))
    assert sum(layer.bytes_after for layer in report.layers) == plan.bytes


def test_divergence_of_one_group_is_that_of_the_model_with_it_quantized(model: nn.Module, found: Measurements) -> None:
    one = found.plan(["int4wo-16"] + [FLOAT] * (len(found.groups) - 1))
    assert one.kl > 0
    assert measured(model, found, one, reference_of(model, IDS, 64)).measured_kl == one.kl


@pytest.mark.parametrize("config", CONFIGS)
def test_no_uniform_config_beats_the_plan_of_its_size(found: Measurements, config: str) -> None:
    uniform = found.uniform(config)
    plan = found.within(max_bytes=uniform.bytes)
    assert plan.bytes <= uniform.bytes
    assert plan.kl <= uniform.kl
    assert found.within(max_kl=uniform.kl).bytes <= uniform.bytes
    assert found.gap(plan) <= plan.kl


def test_by_speed_alone_nothing_is_slower_than_float() -> None:
    fast, slow, same = Candidate("int8wo", 2, 1.0, 9.0), Candidate("int8wo", 2, 5.0, 0.0), Candidate("int8wo", 2, 3, 0)
    groups = tuple(Group((str(i),), (Candidate(FLOAT, 4, 3.0, 0.0), c)) for i, c in enumerate((fast, slow, same)))
    found = Measurements(groups, 1)
    plan = found.within()
    assert found.rules(plan) == {"0": "int8wo", "1": None, "2": None}
    assert plan.us == 7.0
    assert found.within(max_us=8.0).us <= 8.0


def test_times_are_measured_once_per_shape_and_positive(model: nn.Module) -> None:
    times = measure_times(linears_of(model), ["int8wo"], 1)
    shapes = {shape_of(m) for m in linears_of(model).values()}
    assert set(times) == {(s, c) for s in shapes for c in (FLOAT, "int8wo")}
    assert min(times.values()) > 0


def test_a_plan_survives_a_file(both: Measurements, tmp_path: Path) -> None:
    plan = both.plan([FLOAT, *["int4wo-16 gptq"] * (len(both.groups) - 1)])
    save_plan(both, plan, tmp_path / "rules.json")
    assert load_plan(tmp_path / "rules.json") == (both.rules(plan), both.algorithms(plan))
    for text in ("[1]", "{}", '{"a": "int8wo"}', '{"config": {"a": 1}, "algorithm": {}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="one object"):
            load_plan(tmp_path / "bad.json")


def test_what_cannot_be_kept_is_refused(model: nn.Module, found: Measurements) -> None:
    with pytest.raises(ValueError, match="max_bytes=1; the least"):
        found.within(max_bytes=1)
    with pytest.raises(ValueError, match="one budget"):
        found.within(max_bytes=1, max_kl=1.0)
    with pytest.raises(ValueError, match="table of times lacks"):
        autoquant(model, IDS, ["int8wo"], times={}, window=64)
    with pytest.raises(ValueError, match="dynamic"):
        autoquant(model, IDS, ["int8sq"], times={}, window=64)
