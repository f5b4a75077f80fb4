"""Choices per layer: what is measured, and what follows from it."""

from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_ids, tiny_llama
from torch import nn

import lowbit
from lowbit.tools.autoquant import (
    FLOAT,
    Candidate,
    Group,
    Measurements,
    autoquant,
    groups_of,
    load_rules,
    measure_times,
    measured,
    save_rules,
    shape_of,
)
from lowbit.tools.evaluate import reference_of

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


def test_readers_of_one_input_move_together(model: nn.Module) -> None:
    groups = groups_of(model, linears_of(model))
    assert [[n.rpartition(".")[2] for n in g] for g in groups[:4]] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    assert sorted(n for g in groups for n in g) == sorted(linears_of(model))
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert groups_of(plain, linears_of(plain)) == [("0",), ("1",)]


def test_measuring_leaves_the_model_as_it_was(model: nn.Module, found: Measurements) -> None:
    fresh = tiny_llama()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))
    assert not any(isinstance(p, lowbit.QuantizedTensor) for p in model.parameters())


def test_predicted_bytes_are_those_of_quantize(found: Measurements) -> None:
    plan = found.within(max_bytes=(found.uniform("int8wo").bytes + found.uniform("int4wo-16").bytes) // 2)
    assert set(plan.configs) == set(CONFIGS)
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


def test_rules_survive_a_file(tmp_path: Path) -> None:
    rules = {"a.b": "int8wo-row", "c": None}
    save_rules(rules, tmp_path / "rules.json")
    assert load_rules(tmp_path / "rules.json") == {"a.b": lowbit.parse_config("int8wo-row").spec, "c": None}
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ValueError, match="one object"):
        load_rules(tmp_path / "bad.json")


def test_what_cannot_be_kept_is_refused(model: nn.Module, found: Measurements) -> None:
    with pytest.raises(ValueError, match="max_bytes=1; the least"):
        found.within(max_bytes=1)
    with pytest.raises(ValueError, match="one budget"):
        found.within(max_bytes=1, max_kl=1.0)
    with pytest.raises(ValueError, match="table of times lacks"):
        autoquant(model, IDS, ["int8wo"], times={}, window=64)
    with pytest.raises(ValueError, match="dynamic"):
        autoquant(model, IDS, ["int8sq"], times={}, window=64)
