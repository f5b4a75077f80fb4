"""Replaying allocations: totals, peaks and what they are made of, from constructed events and CUDA snapshots."""

from lowbit.tools.profile.layers import Layer
from lowbit.tools.profile.memory import MemoryEvent, Point, Span, copies_in_layers, snapshot_events, thin, timeline
from lowbit.tools.profile.stacks import Frame

A, B = (Frame("/site-packages/lib/a.py", 1, "f"),), (Frame("/b.py", 2, "g"), Frame("/main.py", 9, "run"))


def events(*rows):
    return [MemoryEvent(float(i), *row) for i, row in enumerate(rows)]


def test_peaks_and_spikes():
    seen = timeline(events(
        (100, 1, "load", "", A),
        (50, 2, "load", "", A),
        (-50, 2, "load", "", ()),
        (10, 3, "decode", "l0", B),
        (30, 4, "decode", "l1", B),
        (5, 5, "decode", "l1", A),
        (-30, 4, "decode", "l1", ()),
        (-10, 3, "decode", "l1", ()),
        (20, 6, "decode", "", ()),
    ), base=1000)  # fmt: skip
    assert [p.bytes for p in seen.points] == [1100, 1150, 1100, 1110, 1140, 1145, 1115, 1105, 1125]
    load, decode = seen.phases
    assert (load.before, load.peak, load.peak_at, load.allocated) == (1000, 1150, 1.0, 150)
    assert (decode.before, decode.peak, decode.peak_at, decode.allocated) == (1100, 1145, 5.0, 65)
    assert [(s.bytes, s.count, s.layers, s.stack) for s in decode.spikes] == [
        (40, 2, ("l0", "l1"), B),
        (5, 1, ("l1",), A),
    ]
    assert load.attributed == 1.0
    assert decode.attributed == 45 / 65, "the last block has neither line nor layer"
    assert seen.peak == 1150


def test_frees_of_unknown_blocks_change_nothing():
    assert timeline(events((-7, 1, "a", "", ()), (3, 2, "a", "", ())), base=10).points[-1].bytes == 13
    assert timeline([]).peak == 0


def test_blocks_at_a_peak_with_several_events_at_once():
    same = [MemoryEvent(1.0, 5, 1, "p", "", A), MemoryEvent(1.0, 7, 2, "p", "", B), MemoryEvent(1.0, -5, 1, "p")]
    (phase,) = timeline(same).phases
    assert (phase.peak, sum(s.bytes for s in phase.spikes)) == (12, 12)


def test_thinning_keeps_peaks_and_ends_of_phases():
    points = [Point(float(i), 999 if i == 4321 else i % 7, "a" if i < 5000 else "b") for i in range(10000)]
    kept = thin(points, 300)
    assert len(kept) <= 310
    assert max(p.bytes for p in kept) == 999
    assert points[4999] in kept
    assert points[-1] in kept
    assert [p.seconds for p in kept] == sorted(p.seconds for p in kept)
    assert thin(points[:10], 300) == tuple(points[:10])


def snapshot(*entries):
    frames = [
        {"filename": "??", "line": 0, "name": "cuda"},
        {"filename": "/x/site-packages/lib/quant.py", "line": 7, "name": "dequantize"},
        {"filename": "/home/me/my/main.py", "line": 3, "name": "run"},
    ]
    return {"device_traces": [[], [{"frames": frames, "time_us": 1_000_000 * i} | e for i, e in enumerate(entries)]]}


def test_cuda_snapshots_become_events():
    got = snapshot_events(snapshot(
        {"action": "segment_alloc", "addr": 0, "size": 2048},
        {"action": "alloc", "addr": 64, "size": 512, "user_metadata": "phase=prefill;layer=model.0"},
        {"action": "free_requested", "addr": 64, "size": 512},
        {"action": "free_completed", "addr": 64, "size": 512},
        {"action": "alloc", "addr": 64, "size": 256, "user_metadata": "phase=;layer="},
    ), [Span("load", 0.0, 2.0), Span("decode", 2.5, 4.0)], device=1)  # fmt: skip
    assert [(e.seconds, e.bytes, e.block) for e in got] == [(1.0, 512, 64), (3.0, -512, 64), (4.0, 256, 64)]
    assert [(e.phase, e.layer) for e in got] == [("prefill", "model.0"), ("decode", ""), ("decode", "")]
    assert [str(f) for f in got[0].stack] == ["lib/quant.py:7 in dequantize", "me/my/main.py:3 in run"]
    assert timeline(got).phases[0].peak == 512


def layer(name, elements, quantized=True):
    return Layer(name, "Linear", "int8", elements, elements, quantized)


def test_blocks_of_a_weights_size_are_seen():
    layers = [layer("a", 1000), layer("b", 1000), layer("c", 10, quantized=False), layer("d", 1000)]
    rows = events(
        (2000, 1, "decode", "a", A),
        (400, 2, "decode", "b", A),
        (9000, 3, "prefill", "b", A),
        (9000, 4, "decode", "c", A),
        (-9000, 4, "decode", "b", A),
    )
    assert copies_in_layers(rows, layers, {"decode"}) == {"a": True, "b": False}
    assert copies_in_layers(rows, layers, {"prefill"}) == {"b": True}
