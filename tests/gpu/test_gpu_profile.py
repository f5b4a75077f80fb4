"""The profiler on a GPU: verdicts with three witnesses, memory and kernels by phase and layer, the overhead."""

import time
from contextlib import nullcontext

import pytest
import torch
from dequantizing import FILE, ChunkedLayer, Float8Layer, line_of
from html_page import check_self_contained, parse
from torch import nn

import lowbit
from lowbit.specs import EXAMPLES, parse_config
from lowbit.testing import assert_no_dequant
from lowbit.tools.profile import Files, Profiler, Verdict, find_dequant, profile
from lowbit.tools.profile.report import render

pytestmark = pytest.mark.gpu
SIZE = 4096


def linear(n=SIZE, k=SIZE):
    return nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)


def inputs(m, k=SIZE):
    return torch.randn(m, k, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("spec", EXAMPLES)
def test_every_config_stays_packed(spec):
    model = nn.Sequential(linear(1024, 1024))
    config = parse_config(spec)
    static = config.scheme.act is not None and config.scheme.act.static
    lowbit.quantize_(model, spec, calibration=lowbit.calibrate(model, [inputs(8, 1024)]) if static else None)
    for m in (1, 16, 512):
        verdicts = assert_no_dequant(model, inputs(m, 1024))
        assert verdicts.layers[0].verdict in (Verdict.FUSED, Verdict.CHUNKED)
    with lowbit.use_kernel("reference"), pytest.raises(AssertionError, match="reference kernel"):
        assert_no_dequant(model, inputs(2, 1024))


def run(model, phase):
    with phase("prefill"):
        model(inputs(64))
    with phase("decode"):
        for _ in range(4):
            model(inputs(1))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("profile")

    def load(phase):
        with phase("load"):
            model = nn.Sequential(linear(), Float8Layer(SIZE, SIZE).cuda(), ChunkedLayer(SIZE, SIZE).cuda(), linear())
        with phase("quantize"):
            lowbit.quantize_(model, {"0": "int4wo-128"})
        return model

    files = Files(directory / "trace.json.gz", directory / "snapshot.pickle")
    return profile(load, run, device="cuda", title="gpu", tokens={"decode": 4}, files=files), files


def test_three_witnesses_agree(found):
    p, _ = found
    by_name = {v.layer.name: v for v in p.verdicts.layers}
    assert by_name["1"].verdict is Verdict.UNFUSED
    assert by_name["1"].witnesses == {"dispatcher": True, "memory": True, "kernels": True}
    assert (by_name["1"].where.file, by_name["1"].where.line) == (str(FILE), line_of("float8 dequantized"))
    assert by_name["0"].verdict is Verdict.FUSED
    assert by_name["0"].witnesses == {"dispatcher": False, "memory": False, "kernels": False}
    assert by_name["2"].verdict is Verdict.CHUNKED


def test_time_and_memory_are_attributed(found):
    p, files = found
    assert p.attributed >= 0.95
    phases = {m.phase: m for m in p.timeline.phases}
    assert {"load", "quantize", "prefill", "decode"} <= set(phases)
    assert all(phases[name].attributed >= 0.99 for name in ("quantize", "prefill", "decode"))
    top = phases["decode"].spikes[0]
    assert (top.layers, top.stack[0].line) == (("1",), line_of("float8 dequantized"))
    assert phases["decode"].peak - phases["decode"].before >= 2 * SIZE * SIZE * 2
    assert {g.phase for g in p.gaps} >= {"prefill", "decode"}
    assert all(0 <= g.idle < 1 for g in p.gaps)
    decode = {t.layer: t for t in p.layer_times("decode")}
    assert set(decode) == {"0", "1", "2", "3"}
    assert decode["1"].gb_s < decode["3"].gb_s, "bytes that are written and read again are no speed"
    assert 0.2 < decode["3"].share < 2, "some of it may still be in the cache"
    assert files.trace.stat().st_size > 1000
    assert files.snapshot.stat().st_size > 1000


def test_the_page(found):
    p, _ = found
    html = render(p)
    page = parse(html)
    check_self_contained(html, page)
    assert page.tags.count("svg") == 3
    assert "Launch gaps" in html


def test_phases_alone_cost_little():
    """Ten steps of 32 layers in a phase, as `lowbit profile` marks it, and without."""
    model = nn.Sequential(*(linear() for _ in range(32)))
    p, x = Profiler("cuda"), inputs(1)
    p.watch(model)

    def steps(marked):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with p.phase("decode") if marked else nullcontext():
            for _ in range(10):
                model(x)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    with torch.no_grad():
        steps(True), steps(False)
        with_phases, without = (min(steps(marked) for _ in range(10)) for marked in (True, False))
    assert with_phases < 1.05 * without


@pytest.mark.parametrize(("config", "expected"), [
    ("Float8WeightOnlyConfig", Verdict.UNFUSED),
    ("Int8WeightOnlyConfig", Verdict.UNFUSED),
    ("Float8DynamicActivationFloat8WeightConfig", Verdict.FUSED),
    ("Int8DynamicActivationInt8WeightConfig", Verdict.FUSED),
])  # fmt: skip
def test_torchao(config, expected):
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(linear(1024, 1024), linear(1024, 1024))
    torchao.quantize_(model, getattr(torchao, config)())
    found = find_dequant(model, inputs(32, 1024))
    assert {v.verdict for v in found.layers} == {expected}
    assert all("torchao" in v.where.file for v in found.layers if v.where is not None)
