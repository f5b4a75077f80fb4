"""The roofline: the model with numbers worked out by hand, and a run of the benchmark on the CPU."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from lowbit import ops
from lowbit.cli.app import app
from lowbit.cli.roofline import parse_shape
from lowbit.kernels.cpu import packed
from lowbit.tools import bench_roofline as bench
from lowbit.tools import timing
from lowbit.tools.bench_linear import LAYERS, parse_scheme
from lowbit.tools.bench_plot import write_roofline
from lowbit.tools.roofline import SQUARES, Ceilings, Shape, expected, expected_bf16, llama_shapes, row_of, unit_of

US = 1e-6
# 1 kB in 1 us, 100 kB in 10 us, 1 MB in 100 us: launches of 2 us are in these times.
CEILINGS = Ceilings(
    ((1000, 3 * US), (100_000, 12 * US), (1_000_000, 102 * US)),
    {"bf16": 1e12, "float8": 2e12, "int8": 4e12},
    2 * US,
    {},
)
ROW = parse_scheme("float8dq-row")


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(timing, "MOST_COPIES", 3)
    monkeypatch.setitem(bench.SIDE, "cpu", 64)
    monkeypatch.setitem(bench.READS, "cpu", (1 << 12, 1 << 16))


def test_times_of_reads_lie_on_lines_between_the_measured_ones():
    assert CEILINGS.move_s(1000) == pytest.approx(1 * US)
    assert CEILINGS.move_s(1) == pytest.approx(1 * US), "below the smallest, its time"
    assert CEILINGS.move_s(100_000) == pytest.approx(10 * US)
    assert CEILINGS.move_s(10_000) == pytest.approx(10**0.5 * US), "half way, in logarithms"
    assert CEILINGS.move_s(4_000_000) == pytest.approx(400 * US), "beyond the largest, its bandwidth"
    assert CEILINGS.bandwidth == pytest.approx(1e10)


def test_a_read_that_is_all_launch_takes_no_time_beyond_it():
    flat = dataclasses.replace(CEILINGS, reads=((10, 1.5 * US), (1000, 2 * US), (100_000, 4 * US)))
    assert flat.move_s(10) == flat.move_s(500) == 0
    assert flat.move_s(10_000) == pytest.approx(1 * US), "from nothing, in a straight line over the logarithm"


def test_a_layer_bound_by_operations():
    """M = K = N = 1000: 2e9 operations; x, W and y are 2 MB each in bf16, codes 1 MB and 4 kB of scales."""
    shape = Shape(1000, 1000, 1000)
    bf16 = expected_bf16(shape, CEILINGS)
    assert bf16.gemm_s == pytest.approx(2 * US + 2e9 / 1e12)
    assert bf16.ovhd_s == pytest.approx(2 * US + 4e6 / 1e10)
    assert (bf16.nbytes, bf16.kernels) == (10_000_000, 2)
    q = expected(shape, ROW, CEILINGS)
    assert q.gemm_s == pytest.approx(2 * US + 2e9 / 2e12)
    assert q.ovhd_s == pytest.approx(2 * US + 3.004e6 / 1e10)
    assert (q.nbytes, q.kernels) == (3_004_000 + 4_008_000, 2)
    assert expected(shape, parse_scheme("int8dq"), CEILINGS).gemm_s == pytest.approx(
        2 * US + max(2e9 / 4e12, 4.008e6 / 1e10)
    )


def test_a_layer_bound_by_bytes():
    """M = 1, K = N = 1000 in int8: 1 MB and 4 kB of weights, 2 kB each of x and y."""
    q = expected(Shape(1, 1000, 1000), parse_scheme("int8wo"), CEILINGS)
    assert q.gemm_s == pytest.approx(2 * US + 1_008_000 / 1e10)
    assert q.ovhd_s == pytest.approx(2 * US + CEILINGS.move_s(4000))
    assert expected_bf16(Shape(1, 1000, 1000), CEILINGS).gemm_s == pytest.approx(2 * US + 2_004_000 / 1e10)


def test_a_scale_of_the_whole_input_costs_another_pass():
    shape = Shape(1000, 1000, 1000)
    whole, row = expected(shape, parse_scheme("float8dq"), CEILINGS), expected(shape, ROW, CEILINGS)
    assert whole.kernels == 3
    assert whole.ovhd_s == pytest.approx(4 * US + (2 * 2e6 + 1e6 + 4) / 1e10)
    assert whole.gemm_s == pytest.approx(row.gemm_s)


def test_units():
    def unit(recipe, ceilings=CEILINGS):
        return unit_of(parse_scheme(recipe), ceilings)

    assert {r: unit(r) for r in ("float8dq-row", "float8dq-block", "int8dq", "float8wo", "int8dq-int4-32", "mxfp8dq",
                                 "int8dq-int4-32-sym", "int4:g128+float8_e4m3:row", "nf4:g64+int8:row")} == {
        "float8dq-row": "float8", "float8dq-block": "float8", "int8dq": "int8", "float8wo": "bf16",
        "int8dq-int4-32": "bf16", "mxfp8dq": "bf16", "int8dq-int4-32-sym": "int8",
        "int4:g128+float8_e4m3:row": "float8", "nf4:g64+int8:row": "bf16",
    }  # fmt: skip
    assert unit("float8dq-row", dataclasses.replace(CEILINGS, peaks={"bf16": 1.0})) == "bf16"


def test_what_follows_from_the_observed_times():
    shape = Shape(1000, 1000, 1000)
    bf16, q = expected_bf16(shape, CEILINGS), expected(shape, ROW, CEILINGS)
    observed = {
        "b_bf16_gemm_s": 2 * bf16.gemm_s, "b_bf16_ovhd_s": 500 * US, "b_bf16_e2e_s": 5000 * US, "b_q_gemm_s": 1500 * US,
        "b_q_ovhd_s": 400 * US, "b_q_quant_s": 390 * US, "b_q_e2e_s": 2000 * US,
    }  # fmt: skip
    row = row_of(shape, "float8dq-row", ROW, CEILINGS, "some_kernel", True, observed)
    assert row.r_q_gemm_and_ovhd_s == pytest.approx(q.gemm_s + q.ovhd_s)
    assert row.r_q_gemm_and_ovhd_spdp == pytest.approx(bf16.e2e_s / q.e2e_s)
    assert row.b_q_e2e_spdp == pytest.approx(2.5)
    assert row.spdp_ratio == pytest.approx(2.5 / row.r_q_gemm_and_ovhd_spdp)
    assert (row.rb_bf16_gemm_ratio, row.rb_q_gemm_ratio) == (pytest.approx(0.5), pytest.approx(q.gemm_s / (1500 * US)))
    assert row.gap_rest_s == pytest.approx(100 * US)
    assert row.gap_gemm_s + row.gap_ovhd_s + row.gap_rest_s == pytest.approx(2000 * US - q.e2e_s)
    assert row.launch_share == pytest.approx(4 / 2000)
    assert (row.unit, row.kernel, row.fused) == ("float8", "some_kernel", True)
    assert row.intensity == pytest.approx(2e9 / 7_012_000)


def test_shapes():
    assert parse_shape("16x4096x28672") == Shape(16, 4096, 28672)
    assert [(s.m, s.k, s.n) for s in SQUARES] == [(1024 << i,) * 3 for i in range(5)]
    assert llama_shapes({"down": LAYERS["down"]}, [1, 16]) == [
        Shape(1, 14336, 4096, "down"), Shape(16, 14336, 4096, "down")
    ]  # fmt: skip
    for word in ("1x2", "0x2x3", "axbxc", "1x2x3x4"):
        with pytest.raises(ValueError, match="MxKxN"):
            parse_shape(word)


# A run -------------------------------------------------------------------------------------------


def plan(recipes, **changes):
    shapes = [Shape(3, 256, 64), Shape(1, 64, 96, "small")]
    return bench.Plan(shapes, {r: parse_scheme(r) for r in recipes}, rounds=3, **changes)


def test_ceilings_of_a_cpu():
    found = bench.measure_ceilings(torch.device("cpu"))
    assert [size for size, _ in found.reads] == [1 << 12, 1 << 16]
    units = {"bf16", "int8"} if packed.multiplies_int8() else {"bf16"}
    assert set(found.peaks) == units
    assert set(found.missing) == {"float8", "int8"} - units
    assert 0 < found.launch_s < 1e-3
    assert found.peaks["bf16"] > 1e6


def test_a_run_measures_every_row():
    seen = []
    recipes = ("float8dq-row", "int8dq", "int4wo-32", "mxfp8dq", "float8dq", "float8dq-block", "nvfp4dq")
    rows, left = bench.bench_roofline(plan(recipes), CEILINGS, seen.append)
    assert rows == seen
    assert left == []
    assert [(r.name, r.recipe) for r in rows] == [(name, r) for name in ("", "small") for r in recipes]
    for r in rows:
        assert r.error == ""
        assert r.fused == (r.recipe in ("float8dq-row", "int8dq", "mxfp8dq"))
        assert (r.b_q_quant_s is None) == (r.act == "")
        assert min(r.b_bf16_gemm_s, r.b_bf16_ovhd_s, r.b_bf16_e2e_s, r.b_q_gemm_s, r.b_q_ovhd_s, r.b_q_e2e_s) > 0
        assert r.b_q_e2e_spdp == pytest.approx(r.b_bf16_e2e_s / r.b_q_e2e_s)


def test_codes_that_are_handed_over_give_the_layer():
    """What is timed in two parts is ReLU and the layer, to the bit."""
    from lowbit.kernels.problem import Problem
    from lowbit.tensor import QuantizedTensor

    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for recipe in ("int8dq", "float8dq", "int4wo-32"):
        weight, act = parse_scheme(recipe)
        w = QuantizedTensor.from_float(torch.randn(64, 256).bfloat16(), weight, act)
        problem = Problem(5, 64, 256, weight.spec, act.spec if act else "", x.dtype, "cpu")
        got = bench._Layer(problem, ops.operand_dtype(problem))(x, w)
        assert torch.equal(got, torch.nn.functional.linear(x.relu(), w))


def test_what_fails_is_a_row_and_the_rest_goes_on(monkeypatch):
    real = ops.linear_of_operand

    def broken(*args):
        raise RuntimeError("no such unit")

    monkeypatch.setattr(bench.ops, "linear_of_operand", broken)
    rows, _ = bench.bench_roofline(plan(("int8dq", "int8wo")), CEILINGS)
    monkeypatch.setattr(bench.ops, "linear_of_operand", real)
    assert [r.error for r in rows] == ["RuntimeError: no such unit", ""] * 2
    assert rows[0].b_q_e2e_s is None
    assert rows[0].r_q_gemm_and_ovhd_spdp > 0


def test_nothing_new_is_started_when_the_time_is_spent():
    now = [0.0]

    def later(row):
        now[0] += 60

    rows, left = bench.bench_roofline(plan(("int8dq", "int8wo"), seconds=50, clock=lambda: now[0]), CEILINGS, later)
    assert len(rows) == 1
    assert [(x.layer, x.scheme) for x in left] == [("3x256x64", "int8wo"), ("1x64x96", "int8dq"), ("1x64x96", "int8wo")]
    assert {x.reason for x in left} == {"50 s are spent"}


def test_the_command_writes_a_file_and_a_plot(tmp_path):
    out, plot = tmp_path / "r.json", tmp_path / "r.svg"
    words = ["roofline", "-r", "int8dq,int4wo-32", "-s", "3x256x64", "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, [*words, "--out", str(out), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    content = json.loads(out.read_text())
    assert json.loads(done.stdout)["records"] == content["records"]
    assert [r["recipe"] for r in content["records"]] == ["int8dq", "int4wo-32"]
    assert content["ceilings"]["peaks"]["bf16"] > 0
    for text in ("ceiling of bf16", "int8dq", "int4wo-32"):
        assert text in plot.read_text()


def test_bad_words_are_said(tmp_path):
    for words, message in ((["-s", "3x4"], "MxKxN"), (["-r", "float8sq"], "static"), (["-r", ","], "at least one"),
                           (["--plot", "x.gif"], ".svg")):  # fmt: skip
        done = CliRunner().invoke(app, ["roofline", *words])
        assert done.exit_code == 2
        assert message in done.output
    with pytest.raises(ValueError, match="nothing was measured"):
        write_roofline([row_of(Shape(1, 2, 3), "x", ROW, CEILINGS)], CEILINGS, tmp_path / "x.svg", "")
