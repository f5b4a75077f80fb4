"""Choices per layer: what is measured, and what follows from it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_ids, tiny_llama
from torch import Tensor, nn

import lowbit
from lowbit.graph import decoder_graph
from lowbit.tools.autoquant import autoquant, groups_of, layers_us, measure_times, measured, quantized_by, shape_of
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
    assert both.needs_batches(plan)
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
        (("rotation",), None, "changes whole blocks"), (("gptq",), None, "needs batches"),
        (("rtn",), BATCHES, "none of the algorithms"), (("best",), None, "unknown algorithm"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            autoquant(model, IDS, ["int4wo-16"], algorithms=words, batches=batches, times=table(model), window=64)


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
