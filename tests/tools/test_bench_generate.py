"""`bench generate`: what is measured in which order, what follows from the times, what is left when it is stopped."""

import dataclasses

import pytest
import torch
from tiny_llama import tiny_ids, tiny_llama

from lowbit.models.random import random_model
from lowbit.models.shapes import SHAPES
from lowbit.specs import parse_config
from lowbit.tools import bench_generate as bench
from lowbit.tools import timing
from lowbit.tools.bench_compiled import CompiledSession
from lowbit.tools.bench_generate import COMPILED, Plan, bench_generate, linear_bytes, linear_layers
from lowbit.tools.bench_plot import budget, write_budgets
from lowbit.tools.bench_rows import GenerateRow, Memory, document, write_json
from lowbit.tools.generate import generate

CPU = torch.device("cpu")


def plan(*configs, **changes):
    fixed = {"prompts": (5,), "new_tokens": 3, "rounds": 2}
    return Plan("tiny", {c: parse_config(c).scheme for c in configs}, **(fixed | changes))


@pytest.fixture(autouse=True)
def small_reads(monkeypatch):
    monkeypatch.setattr(timing, "COLD_BYTES", 1 << 20)


def test_a_row_holds_together():
    rows, left = bench_generate(plan("int4wo-128"))
    assert left == []
    assert [r.config for r in rows] == ["bf16", "int4wo-128"]
    for r in rows:
        assert r.error == ""
        assert r.tokens_per_second == pytest.approx(1e6 / r.step_us)
        assert r.step_us_min <= r.step_us <= r.step_us_max
        assert r.gb_s == pytest.approx(r.weight_bytes / r.step_us / 1e3)
        assert r.floor_share == pytest.approx(r.floor_us / r.step_us)
        assert r.other_us == pytest.approx(r.step_us - r.linears_us)
        assert r.first_token_ms > 0 < r.first_token_eager_ms
        assert (r.samples, r.peak_decode, r.graph_bytes) == (2, None, 0)
    plain, packed = rows
    assert (plain.speedup, plain.first_token_speedup) == (1, 1)
    assert packed.speedup == pytest.approx(plain.step_us / packed.step_us)
    assert plain.quantize_s == 0 < packed.quantize_s < packed.make_s


def test_bytes_are_those_of_the_linear_layers():
    config, scheme = SHAPES["tiny"], parse_config("int4wo-128").scheme
    shapes = 2 * [(512, 256), (256, 256), (1024, 256), (256, 512)] + [(512, 256)]
    assert linear_bytes(random_model(config).model) == sum(2 * n * k for n, k in shapes)
    packed = random_model(config, scheme).model
    assert linear_bytes(packed) == sum(scheme.weight.nbytes(n, k) for n, k in shapes)
    assert sorted((m.out_features, m.in_features) for m in linear_layers(packed)) == sorted(shapes)


def test_a_step_is_timed_over_whole_generations(monkeypatch):
    """Between the two looks at the clock are all steps and nothing else."""
    done = []

    class Steps:
        token = torch.zeros(1)

        def prefill(self, ids):
            done.append("prompt")

        def step(self):
            done.append("step")

    now = iter([10.0, 10.000_6])

    def clock():
        done.append("clock")
        return next(now)

    monkeypatch.setattr(bench.time, "perf_counter", clock)
    assert bench._step_us(plan(new_tokens=3), Steps(), torch.zeros(1, 5)) == pytest.approx(200)
    assert done == ["prompt", "clock", "step", "step", "step", "clock"]


def test_large_reads_are_scaled_up(monkeypatch):
    sizes = []
    monkeypatch.setattr(bench, "READ_BYTES", 1000)
    monkeypatch.setattr(timing, "read_calls", lambda nbytes, device: sizes.append(nbytes) or [lambda: None])
    monkeypatch.setattr(timing, "turn_of", lambda calls, device: lambda: 7.0)
    floors = bench._Floors(CPU)
    assert [floors(500), floors(1000), floors(3000), floors(4000)] == [7.0, 7.0, 21.0, 28.0]
    assert sizes == [500, 1000]


def test_order_and_comparison_with_bf16_of_the_same_row():
    chosen = plan("int8wo", batches=(1, 2), prompts=(4, 6), compiled=True)
    assert [name for name, _ in chosen.variants] == ["bf16", COMPILED, "int8wo"]
    rows, _ = bench_generate(dataclasses.replace(chosen, compiled=False))
    assert [(r.config, r.batch, r.prompt) for r in rows] == [
        (c, b, p) for c in ("bf16", "int8wo") for b in (1, 2) for p in (4, 6)
    ]
    for plain, packed in zip(rows[:4], rows[4:], strict=True):
        assert packed.speedup == pytest.approx(plain.step_us / packed.step_us)
        assert packed.tokens_per_second == pytest.approx(packed.batch * 1e6 / packed.step_us)


def test_whoever_stops_it_keeps_the_rows():
    seen = []

    def stop(row):
        seen.append(row)
        if len(seen) == 2:
            raise KeyboardInterrupt

    rows, left = bench_generate(plan("int8wo", prompts=(4, 6)), stop)
    assert rows == seen
    assert [(x.scheme, x.reason) for x in left] == [
        (f"int8wo, batch 1, prompt {p}", "interrupted") for p in (4, 6)
    ]  # fmt: skip


def test_no_row_begins_after_the_time_is_spent():
    now = iter(range(100))
    rows, left = bench_generate(plan("int8wo", seconds=2.5, clock=lambda: next(now)))
    assert [r.config for r in rows] == ["bf16"]
    assert [(x.scheme, x.reason) for x in left] == [("int8wo, batch 1, prompt 5", "2.5 s are spent")]


def test_plain_torch_says_the_same():
    """What stands beside lowbit in the table computes the same text."""
    model, ids = tiny_llama(), tiny_ids(2, 9)
    with torch.inference_mode():
        session = CompiledSession(model, 2, 20, backend="eager")
        session.prefill(ids)
        tokens = [session.token.clone()]
        for _ in range(8):
            session.step()
            tokens.append(session.token.clone())
    assert torch.equal(torch.stack(tokens, 1), generate(model, ids, 9).ids[:, 9:])


def test_memory_of_two_phases():
    assert Memory.larger(Memory(1, 5), Memory(2, 4)) == Memory(2, 5)
    assert Memory.larger(None, Memory(2, 4)) == Memory(2, 4)
    assert Memory.larger(None, None) is None


def row(**changes):
    fixed = {"step_us": 100.0, "linears_us": 80.0, "floor_us": 60.0, "tokens_per_second": 10_000.0}
    return GenerateRow("tiny", "int8wo", 1, 5, 3, **(fixed | changes))


def test_the_budget_adds_up_to_the_step():
    assert budget(row()) == (60, 20, 20)
    assert budget(row(linears_us=120.0)) == (60, 40, 0)
    assert budget(row(floor_us=90.0)) == (80, 0, 20)
    assert budget(row(floor_us=None, linears_us=None)) == (0, 0, 100)


def test_files(tmp_path):
    rows = [row(), row(step_us=None, error="no")]
    write_json(tmp_path / "a.json", document({"date": "today"}, rows, []))
    assert '"config": "int8wo"' in (tmp_path / "a.json").read_text()
    write_budgets(rows, tmp_path / "a.svg", "some machine")
    text = (tmp_path / "a.svg").read_text()
    assert "10000 tok/s" in text
    assert "some machine" in text
    with pytest.raises(ValueError, match="nothing was measured"):
        write_budgets(rows[1:], tmp_path / "b.svg", "")
