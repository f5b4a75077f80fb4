"""`bench linear`: who is timed when, what is computed from the times, and what is said about all that has no time."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from lowbit.formats import parse_format
from lowbit.kernels.select import KERNELS
from lowbit.tools import bench_linear as bench
from lowbit.tools import bench_rows, timing
from lowbit.tools import peers as peers_module
from lowbit.tools.bench_linear import Plan, parse_layer, parse_scheme
from lowbit.tools.bench_plot import write_plot
from lowbit.tools.bench_rows import Record, Row, document, finished, read_rows, write_json
from lowbit.tools.peers import NoCounterpart, Peer, choose_peers, humming_configs, unsigned_codes
from lowbit.tools.timing import Timing

CPU = torch.device("cpu")
LAYER = parse_layer("64x256")


def timed(us, spread=0.1):
    return Timing(us, us - spread, us + spread, 15)


def record(provider, **changes):
    fixed = {"nbytes": 2 * 64 * 256 if provider == "bf16" else 8448, "sqnr_dense_db": 20.0}
    return Record("o", 64, 256, 4, "int4:g128", "", provider, **(fixed | changes))


def row(**times):
    """A row with these microseconds by provider; `floor` is one of them."""
    records = [record(p) for p in times if p != "floor"]
    return Row(tuple(finished(records, {p: timed(us) for p, us in times.items()})))


def plan(*peers, tokens=(2,), schemes=("int4:g128",), **changes):
    return Plan([LAYER], [parse_scheme(s) for s in schemes], tokens, peers, rounds=3, **changes)


def peer(name, adapter):
    return Peer(name, "torch", ("torch",), adapter)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(timing, "MOST_COPIES", 3)


# Timing ------------------------------------------------------------------------------------------


def test_the_median_and_the_spread():
    assert timing.summarize([3.0, 1.0, 9.0, 2.0]) == Timing(2.5, 1.0, 9.0, 4)


def test_copies_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "MOST_COPIES", 64)
    for nbytes in (1, 3 << 20, 8 << 20, 60 << 20, 1 << 30):
        count = timing.copies_for(nbytes)
        assert 2 <= count <= 64
        assert count * nbytes >= timing.COLD_BYTES or count == 64


def test_variants_take_turns():
    order = []
    turns = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    got = timing.take_turns(turns, rounds=4)
    assert order == list("abc") * 4
    assert got["b"] == timing.summarize([2, 5, 8, 11])


def test_a_slow_variant_gets_fewer_turns_and_a_broken_one_none():
    now = [0.0]
    order = []

    def lasting(name, seconds):
        def turn():
            order.append(name)
            now[0] += seconds
            return seconds * 1e6

        return turn

    def broken():
        order.append("broken")
        raise RuntimeError("no")

    turns = {"slow": lasting("slow", 10), "broken": broken, "quick": lasting("quick", 0.01)}
    got = timing.take_turns(turns, rounds=6, seconds=1.0, clock=lambda: now[0])
    assert order.count("slow") == timing.FEWEST_ROUNDS
    assert order.count("quick") == 6
    assert order.count("broken") == 1
    assert isinstance(got["broken"], RuntimeError)
    assert got["slow"] == timing.summarize([1e7] * 3)


def test_a_variant_that_is_held_has_run_by_itself():
    now, order = [0.0], []

    def lasting(name, seconds):
        def turn():
            order.append(name)
            now[0] += seconds
            return now[0]

        return turn

    turns = {"long": lasting("long", 0.25), "short": lasting("short", 0.125)}
    got = timing.take_turns(turns, rounds=15, hold=0.5, clock=lambda: now[0])
    assert order == (["long"] * 3 + ["short"] * 5) * timing.FEWEST_ROUNDS
    assert got["long"].samples == got["short"].samples == timing.FEWEST_ROUNDS
    assert timing.hold_for(timing.HELD_FROM, torch.device("cuda")) == timing.HOLD_SECONDS
    assert timing.hold_for(timing.HELD_FROM - 1, torch.device("cuda")) == timing.hold_for(4096, CPU) == 0


def test_a_turn_runs_every_copy_and_counts_one_call(monkeypatch):
    called = []
    now = iter([1.0, 1.000_040])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    turn = timing.turn_of([lambda i=i: called.append(i) for i in range(4)], CPU)
    assert turn() == pytest.approx(10.0)
    assert called == [0, 1, 2, 3]


def test_a_turn_on_a_gpu_times_the_second_replay(monkeypatch):
    """CUDA by name only: what is captured, and what happens between the two events."""
    done = []

    class Graph:
        def replay(self):
            done.append("replay")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.name = f"event {len(events)}"
            events.append(self)

        def record(self):
            done.append(self.name)

        def synchronize(self):
            done.append(f"wait {self.name}")

        def elapsed_time(self, end):
            return 0.9  # milliseconds, of three calls

    events = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    turn = timing.turn_of([lambda i=i: done.append(i) for i in range(3)], torch.device("cuda"))
    assert done == [0, 1, 2]
    assert turn() == pytest.approx(300.0)
    assert done[3:] == ["replay", "event 0", "replay", "event 1", "wait event 1"]


def test_the_floor_reads_as_many_bytes(monkeypatch):
    monkeypatch.setattr(timing, "MOST_COPIES", 64)
    calls = timing.read_calls(1 << 20, CPU)
    buffers = [call.__self__ for call in calls]
    assert {b.nbytes for b in buffers} == {1 << 20}
    assert len({b.data_ptr() for b in buffers}) == 64, "every buffer is its own"


# What follows from the times ---------------------------------------------------------------------


def test_the_numbers_of_a_record():
    got = row(floor=5.0, bf16=40.0, lowbit=10.0, humming=20.0, gemlite=15.0)
    ours = got.of("lowbit")
    assert (ours.us, ours.us_min, ours.us_max, ours.samples) == (10.0, 9.9, 10.1, 15)
    assert ours.speedup == pytest.approx(4.0)
    assert ours.gb_s == pytest.approx(8448 / 10e-6 / 1e9)
    assert ours.tflop_s == pytest.approx(2 * 4 * 64 * 256 / 10e-6 / 1e12)
    assert (ours.floor_us, ours.floor_share) == (5.0, pytest.approx(0.5))
    assert got.of("humming").speedup == pytest.approx(2.0)
    bf16 = got.of("bf16")
    assert (bf16.speedup, bf16.floor_us) == (1.0, None), "the floor is that of the packed weight"
    assert bf16.gb_s == pytest.approx(2 * 64 * 256 / 40e-6 / 1e9)


def test_the_best_peer_and_the_ratio():
    slower = row(floor=5.0, bf16=40.0, lowbit=10.0, humming=20.0, gemlite=15.0)
    assert slower.best_peer.provider == "gemlite"
    assert slower.ratio == pytest.approx(1.5)
    faster = row(floor=5.0, bf16=40.0, lowbit=10.0, humming=8.0)
    assert faster.ratio == pytest.approx(0.8)
    assert row(floor=5.0, bf16=40.0, lowbit=10.0).ratio is None


def test_a_wrong_result_does_not_count_as_the_best():
    records = [record("bf16"), record("lowbit"), record("a", sqnr_dense_db=0.3), record("b", sqnr_dense_db=18.0),
               record("c", sqnr_dense_db=math.nan)]  # fmt: skip
    times = {"floor": timed(1), "bf16": timed(9), "lowbit": timed(4), "a": timed(2), "b": timed(8), "c": timed(1)}
    got = Row(tuple(finished(records, times)))
    assert "wrong result" in got.of("a").error
    assert "wrong result" in got.of("c").error
    assert got.of("a").us == 2, "its time is kept"
    assert got.best_peer.provider == "b"


def test_a_failed_turn_is_an_error_and_the_rest_has_its_numbers():
    records = [record("bf16"), record("lowbit"), record("a")]
    got = Row(tuple(finished(records, {"floor": timed(1), "bf16": ValueError("x"), "lowbit": timed(4), "a": timed(2)})))
    assert got.of("bf16").error == "ValueError: x"
    assert got.of("lowbit").speedup is None
    assert got.of("lowbit").floor_share == pytest.approx(0.25)


def test_an_error_names_the_one_that_it_hides():
    hidden, shown = ValueError("the\n  cause"), RuntimeError("capture ended")
    shown.__context__ = hidden
    assert bench_rows.reason_of(shown) == "RuntimeError: capture ended; before that ValueError: the cause"
    shown.__suppress_context__ = True
    assert bench_rows.reason_of(shown) == "RuntimeError: capture ended"


# What is asked for -------------------------------------------------------------------------------


def test_layers_and_schemes():
    assert dataclasses.astuple(parse_layer("down")) == ("down", 4096, 14336)
    assert dataclasses.astuple(parse_layer("96x256")) == ("96x256", 96, 256)
    for word in ("up", "0x4", "12", "4x", "4x5x6"):
        with pytest.raises(ValueError, match="NxK"):
            parse_layer(word)
    for word in ("int4:g128", "float8_e4m3:row+float8_e4m3:row", "nvfp4"):
        assert bench.name_of(parse_scheme(word)) == word
    assert bench.name_of(parse_scheme("int8dq")) == "int8:row+int8:row"
    with pytest.raises(ValueError, match="static"):
        parse_scheme("float8sq")


def test_peers_are_chosen_by_name():
    here, absent = peer("here", None), Peer("absent", "no_such_module_anywhere", ("no-such-package",), None)
    known = (here, absent)
    assert choose_peers(None, known) == ([here], ["absent"])
    assert choose_peers(["none"], known) == ([], [])
    assert choose_peers(["here", "here"], known) == ([here], [])
    assert here.versions() == {"torch": importlib.metadata.version("torch")}
    assert absent.versions() == {}
    with pytest.raises(ValueError, match="pip install no-such-package"):
        choose_peers(["absent"], known)
    with pytest.raises(ValueError, match="known are here, absent"):
        choose_peers(["other"], known)


# A run -------------------------------------------------------------------------------------------


def test_a_run_measures_every_row():
    seen = []
    rows, left_out = bench.bench_linear(plan(tokens=(1, 5), schemes=("int4:g128", "int8:row+int8:row")), seen.append)
    assert left_out == []
    assert rows == seen
    assert [(r.of("lowbit").scheme, r.of("lowbit").m) for r in rows] == [
        ("int4:g128", 1), ("int4:g128", 5), ("int8:row+int8:row", 1), ("int8:row+int8:row", 5),
    ]  # fmt: skip
    for r in rows:
        ours, bf16 = r.of("lowbit"), r.of("bf16")
        assert ours.us_min <= ours.us <= ours.us_max
        assert ours.nbytes == parse_format(ours.weight).nbytes(64, 256)
        assert (ours.samples, ours.copies) == (3, 3)
        assert ours.kernel in {k.name for k in KERNELS if not k.by_name_only}
        assert ours.sqnr_db > ours.sqnr_limit_db
        assert 10 < ours.sqnr_dense_db < ours.sqnr_db, "quantization costs more than the kernel"
        assert bf16.sqnr_dense_db > 45
        assert ours.speedup == pytest.approx(bf16.us / ours.us)


def test_what_a_peer_raises_is_its_result(monkeypatch):
    def unknown(scheme):
        raise NoCounterpart("nothing for this")

    def no_weight(scheme):
        def make(w):
            raise AssertionError("this GPU is too old")

        return make

    def no_call(scheme):
        def call(x):
            raise TypeError("refuses M = 2")

        return lambda w: call

    monkeypatch.setattr(timing, "take_turns", lambda turns, rounds, **_: {name: timed(7.0) for name in turns})
    all_peers = [
        peer("unknown", unknown), peer("no_weight", no_weight), peer("no_call", no_call),
        peer("zeros", lambda scheme: lambda w: lambda x: x.new_zeros(x.shape[0], w.shape[0])),
        peer("transposed", lambda scheme: lambda w: lambda x: (x @ w.T).T),
        peer("good", lambda scheme: lambda w: lambda x: F.linear(x, w)),
    ]  # fmt: skip
    rows, left_out = bench.bench_linear(plan(*all_peers))
    errors = {r.provider: r.error for r in rows[0].records}
    assert errors["unknown"] == "nothing for this"
    assert errors["no_weight"] == "AssertionError: this GPU is too old"
    assert errors["no_call"] == "TypeError: refuses M = 2"
    assert "wrong result: 0.0 dB" in errors["zeros"]
    assert "(64, 2)" in errors["transposed"]
    assert errors["good"] == errors["bf16"] == errors["lowbit"] == ""
    assert rows[0].best_peer.provider == "good"
    assert rows[0].of("no_call").us is None
    assert left_out == []


def test_a_peer_may_reuse_the_memory_of_its_results():
    def shared(scheme):
        out = torch.empty(2, 64, dtype=torch.bfloat16)
        calls = []

        def call(x, w):
            calls.append(0)
            return out.copy_(F.linear(x, w)) if len(calls) == 1 else out.zero_()

        return lambda w: lambda x: call(x, w)

    rows, _ = bench.bench_linear(plan(peer("shared", shared)))
    assert rows[0].of("shared").error == ""


def test_a_faster_peer_is_said_to_be_faster(monkeypatch):
    """Times by name, whatever the machine: everything between the clock and the ratio is real."""
    us = {"floor": 5.0, "bf16": 30.0, "lowbit": 12.0, "quick": 9.0}
    monkeypatch.setattr(timing, "take_turns", lambda turns, rounds, **_: {name: timed(us[name]) for name in turns})
    quick = peer("quick", lambda scheme: lambda w: lambda x: F.linear(x, w))
    (got,), _ = bench.bench_linear(plan(quick))
    assert got.ratio == pytest.approx(0.75)
    assert got.best_peer.speedup == pytest.approx(30 / 9)


def test_nothing_new_is_started_when_the_time_is_spent():
    now = [0.0]

    def slow(scheme):
        now[0] += 60
        return lambda w: lambda x: F.linear(x, w)

    def never(scheme):
        raise AssertionError("started too late")

    asked = plan(
        peer("slow", slow), peer("late", never), tokens=(1, 2), schemes=("int8:row", "int4:g128"), seconds=50,
        clock=lambda: now[0],
    )  # fmt: skip
    rows, left_out = bench.bench_linear(asked)
    assert rows == []
    assert [(x.layer, x.scheme, x.m) for x in left_out] == [
        ("64x256", "int8:row", 1), ("64x256", "int8:row", 2), ("64x256", "int4:g128", 1), ("64x256", "int4:g128", 2),
    ]  # fmt: skip
    assert {x.reason for x in left_out} == {"50 s are spent"}


def test_within_a_row_late_peers_are_left_out_and_the_row_is_kept():
    now = [0.0]

    def slow(scheme):
        def call(x, w):
            now[0] += 60
            return F.linear(x, w)

        return lambda w: lambda x: call(x, w)

    plain = peer("plain", lambda scheme: lambda w: lambda x: F.linear(x, w))
    asked = plan(peer("slow", slow), plain, tokens=(1, 2), seconds=50, clock=lambda: now[0])
    rows, left_out = bench.bench_linear(asked)
    assert len(rows) == 1
    assert rows[0].of("slow").us
    assert rows[0].of("plain").error == "left out: 50 s are spent"
    assert [x.m for x in left_out] == [2]


def test_a_gpu_that_fails_ends_the_run(monkeypatch):
    def illegal(scheme):
        def call(x):
            monkeypatch.setattr(timing, "synchronize", lost)
            raise RuntimeError("illegal access")

        return lambda w: call

    def lost(device):
        raise RuntimeError("illegal access, again")

    rows, left_out = bench.bench_linear(plan(peer("bad", illegal), tokens=(1, 2)))
    assert rows == []
    assert [x.m for x in left_out] == [1, 2]
    assert left_out[0].reason == "the GPU fails since: RuntimeError: illegal access"


# The file and the plot ---------------------------------------------------------------------------


def test_the_file_gives_the_rows_back(tmp_path):
    rows = [row(floor=5.0, bf16=40.0, lowbit=10.0, humming=20.0)]
    left = [bench_rows.LeftOut("o", "int8:row", 4, "1 s are spent")]
    file = tmp_path / "deep" / "result.json"
    write_json(file, document({"gpu": "a GPU"}, rows, left))
    assert read_rows(file) == rows
    content = json.loads(file.read_text())
    assert content["gpu"] == "a GPU"
    assert content["left_out"] == [{"layer": "o", "scheme": "int8:row", "m": 4, "reason": "1 s are spent"}]
    assert set(content["records"][0]) == {f.name for f in dataclasses.fields(Record)}


def test_what_is_not_a_number_is_null(tmp_path):
    rows = [Row((record("lowbit", sqnr_db=math.nan, us=math.inf),))]
    write_json(tmp_path / "x.json", document({}, rows, []))
    got = json.loads((tmp_path / "x.json").read_text())["records"][0]
    assert (got["sqnr_db"], got["us"]) == (None, None)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"a": math.nan})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_the_plot_shows_every_layer_and_provider(tmp_path):
    rows = []
    for layer in ("qkv", "o"):
        for m in (1, 8, 64):
            one = row(floor=5.0, bf16=40.0 + m, lowbit=10.0 + m, humming=20.0, mine=30.0)
            rows.append(Row(tuple(dataclasses.replace(r, layer=layer, m=m) for r in one.records)))
    for name in ("plot.svg", "plot.png"):
        write_plot(rows, tmp_path / name, "a GPU, a date")
        assert (tmp_path / name).stat().st_size > 5000
    text = (tmp_path / "plot.svg").read_text()
    for word in ("qkv", "64 x 256", "int4:g128", "lowbit", "bf16", "humming", "mine", "reading alone", "a GPU, a date"):
        assert word in text, word
    with pytest.raises(ValueError, match=r"\.svg"):
        write_plot(rows, tmp_path / "plot.gif", "")
    with pytest.raises(ValueError, match="nothing was measured"):
        write_plot([Row((record("lowbit"),))], tmp_path / "plot.svg", "")


# Adapters, as far as they go without the libraries -----------------------------------------------


@pytest.mark.parametrize("spec", ["int4:g128", "int4:g32:asym", "int2:g64", "int1:g128", "int1:g64:asym"])
def test_gemlite_gets_the_same_numbers(spec):
    """Codes, scale and zero point in its form stand for exactly the weights that lowbit multiplies."""
    fmt = parse_format(spec)
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale, zero = unsigned_codes(fmt, w)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 1 << fmt.bits
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    got = ((groups - zero.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(1)
    assert torch.equal(got, fmt.dequantize(fmt.quantize(w), 8, 256))


@pytest.mark.parametrize(
    ("spec", "weight", "inputs"),
    [
        ("int8:row", {"dtype": "int8", "has_zero_point": False}, {}),
        ("int3:g64:asym", {"dtype": "int3", "has_zero_point": True, "group_size": 64}, {}),
        ("float8_e4m3:row+float8_e4m3:row", {"dtype": "float8e4m3"}, {"dtype": "float8e4m3"}),
        ("mxfp6_e3m2", {"dtype": "float6e3m2", "group_size": 32, "scale_dtype": "float8e8m0"}, {}),
        ("nvfp4", {"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3", "scale_2_type": "tensor"}, {}),
    ],
)  # fmt: skip
def test_humming_is_told_the_scheme(spec, weight, inputs):
    assert humming_configs(parse_scheme(spec)) == (weight, inputs)


@pytest.mark.parametrize("spec", ["nf4:g64", "int8:tensor", "nvfp4+nvfp4", "codebook4:g64"])
def test_humming_has_no_counterpart(spec):
    with pytest.raises(NoCounterpart, match="humming has nothing"):
        humming_configs(parse_scheme(spec))


@pytest.fixture
def torchao(monkeypatch):
    """torchao's names without torchao: configs that keep their arguments, and a `quantize_` that does nothing."""

    class Config:
        def __init__(self, *args, **kwargs):
            self.args, self.kwargs = args, kwargs

    names = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Int4WeightOnlyConfig", "PerRow",
             "Float8DynamicActivationInt4WeightConfig", "Float8WeightOnlyConfig", "PerTensor", "PerGroup", "PerBlock",
             "Float8DynamicActivationFloat8WeightConfig", "NVFP4WeightOnlyConfig")  # fmt: skip
    kinds = {name: type(name, (Config,), {}) for name in names}
    quantization = types.ModuleType("torchao.quantization")
    quantization.__dict__.update(
        kinds, granularity=types.SimpleNamespace(**kinds), quantize_=lambda layer, config: None
    )
    prototype = types.ModuleType("torchao.prototype")
    prototype.mx_formats = types.SimpleNamespace(**kinds)
    for name, module in {"torchao": types.ModuleType("torchao"), "torchao.quantization": quantization,
                         "torchao.prototype": prototype}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["torchao"].quantization = quantization
    return quantization


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        ("int8:row", "Int8WeightOnlyConfig"),
        ("int8:row+int8:row", "Int8DynamicActivationInt8WeightConfig"),
        ("int4:g64", "Int4WeightOnlyConfig"),
        ("int4:g128+float8_e4m3:row", "Float8DynamicActivationInt4WeightConfig"),
        ("float8_e4m3:tensor", "Float8WeightOnlyConfig"),
        ("float8_e4m3:b128x128+float8_e4m3:g128", "Float8DynamicActivationFloat8WeightConfig"),
        ("nvfp4", "NVFP4WeightOnlyConfig"),
    ],
)
def test_torchao_is_told_the_scheme(torchao, spec, config):
    got = peers_module._torchao_config(parse_scheme(spec))
    assert type(got).__name__ == config
    if spec == "int4:g64":
        assert got.kwargs == {"group_size": 64}
    for other in ("int3:g64", "int8:g64+int8:row", "float8_e5m2:row", "mxfp4", "nf4:g64"):
        with pytest.raises(NoCounterpart):
            peers_module._torchao_config(parse_scheme(other))


def test_a_weight_that_torchao_left_alone_is_no_result(torchao):
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        make = peers_module.torchao(parse_scheme("int8:row"))
        with pytest.raises(RuntimeError, match="left the weight"):
            make(torch.zeros(4, 8, dtype=torch.bfloat16))
