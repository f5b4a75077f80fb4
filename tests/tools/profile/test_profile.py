"""A whole profile of a model with a dequantizing layer: recorders, joins, suggestions, page."""

import gzip
import json
from dataclasses import replace

import pytest
import torch
from dequantizing import FILE, Float8Layer, line_of
from html_page import check_self_contained, parse
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit.tools.profile import Files, Profiler, Verdict, document, profile
from lowbit.tools.profile.kernels import Gaps, LayerTime
from lowbit.tools.profile.layers import Layer
from lowbit.tools.profile.memory import Span, Timeline
from lowbit.tools.profile.report import render, write_json, write_report
from lowbit.tools.profile.result import build, slowdown, with_witnesses
from lowbit.tools.profile.suggest import suggest
from lowbit.tools.profile.taint import Read
from lowbit.tools.profile.verdict import LayerVerdict, Verdicts

X = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)).bfloat16()


def load(phase):
    with phase("load"):
        model = nn.Sequential(nn.Linear(256, 512).bfloat16(), Float8Layer(256, 512), nn.Linear(256, 256).bfloat16())
    with phase("quantize"):
        lowbit.quantize_(model, {"0": "int4wo-32"})
    return model


def run(model, phase):
    with phase("prefill"):
        model(X)
    with phase("decode"):
        for i in range(2):
            model(X[i : i + 1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("profile")
    files = Files(directory / "trace.json.gz")
    made = profile(load, run, title="a <model>", tokens={"prefill": 32, "decode": 2}, files=files)
    return made, directory


def test_the_verdicts_have_three_witnesses(found):
    p, _ = found
    first, second, third = p.verdicts.layers
    assert [v.verdict for v in p.verdicts.layers] == [Verdict.FUSED, Verdict.UNFUSED, Verdict.NOT_QUANTIZED]
    assert second.witnesses == {"dispatcher": True, "memory": True, "kernels": True}
    assert first.witnesses == {"dispatcher": False, "memory": False, "kernels": False}
    assert third.witnesses == {}
    assert second.calls == 3
    assert p.unfused == [second]


def test_phases(found):
    p, _ = found
    assert [t.phase for t in p.phases] == ["load", "quantize", "warm-up", "prefill", "decode"]
    assert [t.instrumented for t in p.phases] == [True, True, False, False, False]
    assert p.attributed == 1.0
    assert p.busiest_phase == "decode"
    assert {(t.phase, t.calls) for t in p.layers} == {("prefill", 1), ("decode", 2)}
    assert {t.layer for t in p.layers} == {"0", "1", "2"}
    assert all(t.share and t.share > 0 for t in p.layers)
    assert sum(k.share for k in p.kernels if k.phase == "decode") == pytest.approx(1, abs=0.05)


def test_the_spike_has_layer_and_line(found):
    p, _ = found
    decode = next(m for m in p.timeline.phases if m.phase == "decode")
    top = decode.spikes[0]
    assert top.layers == ("1",)
    assert (top.stack[0].file, top.stack[0].line) == (str(FILE), line_of("float8 dequantized"))
    assert top.bytes == 2 * 2 * 256 * 512, "the codes in bf16 and their product with the scale, both at once"
    assert decode.peak >= decode.before + top.bytes
    assert decode.attributed == 1.0


def test_suggestions_have_numbers(found):
    p, _ = found
    first = p.suggestions[0]
    assert first.rule == "unfused-dequant"
    assert first.layers == ("1",)
    assert f"{FILE.name}:{line_of('float8 dequantized')}" in first.text
    stored = 256 * 512 + 256 * 2
    assert first.gain.startswith(f"{(stored + 2 * 2 * 2 * 256 * 512) / stored:.1f} times less memory traffic")
    assert "float8wo" in first.text
    assert all(any(c.isdigit() for c in s.gain) for s in p.suggestions)


def test_the_trace_is_for_perfetto(found):
    _, directory = found
    trace = json.loads(gzip.decompress((directory / "trace.json.gz").read_bytes()))
    names = {e["name"] for e in trace["traceEvents"]}
    assert {"lowbit.phase=prefill", "lowbit.phase=decode", "lowbit.layer=1"} <= names


def test_the_page_is_complete_and_self_contained(found, tmp_path):
    p, _ = found
    html = render(p)
    page = parse(html)
    check_self_contained(html, page)
    text = " ".join(" ".join(page.text).split())
    assert page.tags.count("svg") == 3
    assert "a <model>" in text
    assert "1 of 2 dequantize" in text
    assert "dispatcher: 1 of 1 copied" in text
    for s in p.suggestions:
        assert s.gain in text
    assert f"{FILE.name}:{line_of('float8 dequantized')}" in text
    assert len(html) < 1_000_000
    assert "script" not in page.tags
    assert "built-in" not in text
    assert f"{2 * 256 * 512 / 1e6:.1f} MB" in text, "the copy's size"
    write_report(p, tmp_path / "a.html")
    assert "nan" not in (tmp_path / "a.html").read_text().lower()


def test_json(found, tmp_path):
    p, _ = found
    write_json(replace(p, attributed=float("nan")), tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert data["schema"] == "lowbit-profile/1"
    assert data["time_attributed"] is None
    layers = data["verdicts"]["layers"]
    assert [v["verdict"] for v in layers] == ["fused", "unfused", "not quantized"]
    assert layers[1]["where"].endswith(f"{FILE.name}:{line_of('float8 dequantized')} in dequantize")
    assert data["memory"]["peak_bytes"] == p.timeline.peak
    assert json.loads(json.dumps(document(p)))["tokens"] == {"prefill": 32, "decode": 2}


def test_running_out_of_memory_is_a_result():
    def fail(model, phase):
        run(model, phase)
        with phase("too much"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    p = profile(load, fail)
    assert p.error == "out of memory: CUDA out of memory. Tried to allocate"
    assert p.phases[-1].phase == "too much"
    assert len(p.unfused) == 1
    assert "ended early" in render(p)


def test_a_model_without_phases_or_layers():
    p = profile(nn.ReLU(), lambda model, phase: model(X))
    assert p.phases == ()
    assert p.suggestions == ()
    assert "nothing is quantized" in render(p)


def test_nothing_stays_behind():
    model = load(Profiler().phase)
    profile(model, run)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_allocations_on_a_cpu_are_exact():
    p = Profiler()
    with p.memory():
        with p.phase("a"):
            kept = torch.zeros(1000, dtype=torch.float32)
            kept.view(10, 100)
            gone = torch.ones(500, dtype=torch.int8)
            del gone
        with p.phase("b"):
            kept.add_(1)
            other = kept + 1
    del kept, other
    assert [(e.phase, e.bytes) for e in p.memory_events] == [("a", 4000), ("a", 500), ("a", -500), ("b", 4000)]
    assert {e.stack[0].function for e in p.memory_events if e.bytes > 0} == {"test_allocations_on_a_cpu_are_exact"}


def test_weights_that_no_operation_made_are_counted(tmp_path):
    save_file({"weight": torch.ones(64, 64)}, tmp_path / "w.safetensors")
    p = Profiler()
    with p.memory(), p.phase("load") as count:
        layer = nn.Linear(64, 64, bias=False, device="meta")
        layer.load_state_dict(load_file(tmp_path / "w.safetensors"), assign=True)
        count(layer)
        count(layer)
    assert [(e.phase, e.bytes) for e in p.memory_events] == [("load", 64 * 64 * 4)]


def test_compiled_parts_have_no_hooks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].compile(backend="eager")
    model[2] = torch.compile(model[2], backend="eager")
    p = Profiler()
    p.watch(model)
    with p.layers():
        assert [bool(m._forward_hooks) for m in (model[0], model[1], model[2]._orig_mod)] == [True, False, False]


def test_on_a_gpu_the_allocator_is_asked(monkeypatch, tmp_path):
    """The calls to CUDA's allocator and what becomes of its answer; the allocator itself is played here."""
    calls, notes = [], []
    memory = torch.cuda.memory
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 500)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryMetadata", notes.append, raising=False)
    monkeypatch.setattr(memory, "_record_memory_history", lambda *args, **kwargs: calls.append(args[0]))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda name: calls.append(name))

    def snapshot():
        alloc = {"action": "alloc", "addr": 1, "size": 64, "time_us": 10, "frames": [], "user_metadata": notes[-3]}
        return {"device_traces": [[alloc]]}

    monkeypatch.setattr(memory, "_snapshot", snapshot)
    model = nn.Sequential(Float8Layer(64, 64))
    p = Profiler("cuda:0")
    p.watch(model)
    with p.memory(tmp_path / "s.pickle"), p.layers(), p.phase("decode"):
        model(X[:1, :64])
    assert calls == ["all", str(tmp_path / "s.pickle"), None]
    assert notes == ["phase=decode;layer=", "phase=decode;layer=0", "phase=decode;layer=", "phase=;layer=", ""]
    (event,) = p.memory_events
    assert (event.bytes, event.phase, event.layer) == (64, "decode", "0")
    assert p.memory_base == 500


# Pure joins --------------------------------------------------------------------------------------


def verdict(name, what, **more):
    return LayerVerdict(Layer(name, "Linear", "int8", 1000, 1000, True), what, **more)


def test_times_that_recording_distorts_lead_to_no_conclusion():
    layers = [Layer("a", "Linear", "int8", 1 << 20, 1 << 20, True)]
    trace = {"traceEvents": [
        {"ph": "X", "cat": "user_annotation", "name": "lowbit.phase=decode", "ts": 0, "dur": 9, "pid": 1, "tid": 1},
        {"ph": "X", "cat": "user_annotation", "name": "lowbit.layer=a", "ts": 1, "dur": 7, "pid": 1, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 2, "dur": 5000, "pid": 1, "tid": 1},
    ]}  # fmt: skip
    reads = [Read("a", "aten::mm", None, 1 << 20, 1 << 20, ())]
    for recorded, rules in ((1.5, ["below-bandwidth"]), (9.0, [])):
        spans = {"clock": [Span("decode", 10, 11)], "kernels": [Span("decode", 20, 20 + recorded)]}
        p = build("", {"device": ""}, layers, spans=spans, reads=reads, trace=trace, ceiling_gb_s=100.0)
        assert p.slowdown == {"decode": recorded}
        assert [s.rule for s in p.suggestions] == rules
    assert slowdown(spans, {"decode": 30}, {"decode": 10}) == {"decode": 27.0}, (
        "a third of the tokens took 9 times as long"
    )


def test_two_witnesses_decide_where_the_dispatcher_saw_nothing():
    silent = Verdicts((verdict("a", Verdict.NOT_RUN), verdict("b", Verdict.NOT_RUN), verdict("c", Verdict.FUSED)))
    silent = replace(silent, layers=(*silent.layers[:2], replace(silent.layers[2], op="lowbit::linear")))
    joined = with_witnesses(silent, {"a": True, "b": True, "c": True}, {"a": True, "b": False, "c": True})
    assert [v.verdict for v in joined.layers] == [Verdict.UNFUSED, Verdict.NOT_RUN, Verdict.FUSED]
    assert joined.layers[0].copy_bytes == 2000
    assert joined.layers[2].witnesses == {"dispatcher": False, "memory": True, "kernels": True}


def test_rules_speak_only_of_what_is_there():
    packed = Verdicts((verdict("a", Verdict.FUSED),))
    empty = Timeline((), ())
    assert suggest(packed, empty, [], [], None) == []
    assert (
        suggest(packed, empty, [LayerTime("a", "decode", 10, 1, 90, 0.9)], [Gaps("decode", 100, 90, 5, 3)], 100) == []
    )
    (slow,) = suggest(packed, empty, [LayerTime("a", "decode", 1000, 1, 10, 0.1)], [], 100)
    assert (slow.rule, slow.gain) == ("below-bandwidth", "up to 0.90 ms of 1.00 ms per token in these layers")
    (idle,) = suggest(packed, empty, [], [Gaps("decode", 100, 25, 5, 3), Gaps("prefill", 100, 1, 5, 3)], None)
    assert (idle.rule, idle.gain) == ("launch-gaps", "up to 4.0 times as many tokens per second")
