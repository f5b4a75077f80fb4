"""From Chrome traces to layers and gaps: constructed ones as a GPU gives them, and one recorded here."""

import pytest

from lowbit.tools.profile.kernels import (
    attributed,
    calls_of,
    copies_before_products,
    gaps,
    kernels_by_time,
    kind_of,
    layer_times,
)
from lowbit.tools.profile.layers import Layer

LAYERS = [
    Layer("l0", "Linear", "int8", 1 << 20, 1 << 20, True, ("tied",)),
    Layer("l1", "Linear", "bf16", 100, 200, False),
]


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


def op(name, ts, dur, *dims):
    return event("cpu_op", name, ts, dur, **{"Input Dims": [list(d) for d in dims]})


def scope(name, ts, dur):
    return event("user_annotation", name, ts, dur)


def cpu_trace():
    return {"traceEvents": [
        {"ph": "M", "name": "process_name"},
        scope("lowbit.phase=decode", 0, 100),
        scope("lowbit.layer=l0", 10, 40),
        op("aten::to", 11, 20, (1024, 1024)),
        op("aten::_to_copy", 12, 18, (1024, 1024)),
        op("aten::mm", 32, 10, (1, 1024), (1024, 1024)),
        scope("lowbit.layer=l0", 50, 20),
        op("aten::mm", 51, 10, (1, 1024), (1024, 1024)),
        scope("lowbit.layer=l1", 70, 10),
        op("aten::mm", 71, 5, (1, 10), (10, 10)),
        op("aten::add", 90, 5, (1, 10)),
        op("aten::add", 200, 5, (1, 10)),
    ]}  # fmt: skip


def gpu_trace():
    """Two launches inside of a layer, and their kernels long after on the GPU's own clock."""

    def launch(ts, number):
        return event("cuda_runtime", "cudaLaunchKernel", ts, 1, correlation=number)

    def kernel(name, ts, dur, number, grid=(1, 1, 1), stream=7):
        return event("kernel", name, ts, dur, tid=stream, correlation=number, grid=list(grid), block=[128, 1, 1])

    return {"traceEvents": [
        scope("lowbit.phase=decode", 0, 100),
        scope("lowbit.layer=l0", 10, 20), launch(11, 1), launch(12, 2),
        launch(40, 3),
        kernel("void at::native::vectorized_elementwise_kernel<4, bf16>", 1000, 8, 1, grid=(2048, 1, 1)),
        kernel("nvjet_hsh_128x64", 1010, 10, 2),
        kernel("void norm<float>", 1040, 2, 3),
        event("gpu_memcpy", "Memcpy DtoH", 1050, 3, tid=9, correlation=77),
    ]}  # fmt: skip


def test_operations_get_their_own_time_phase_and_layer():
    calls = calls_of(cpu_trace())
    assert [(c.name, c.us, c.phase, c.layer, c.instance) for c in calls] == [
        ("aten::to", 2, "decode", "l0", 0),
        ("aten::_to_copy", 18, "decode", "l0", 0),
        ("aten::mm", 10, "decode", "l0", 0),
        ("aten::mm", 10, "decode", "l0", 1),
        ("aten::mm", 5, "decode", "l1", 2),
        ("aten::add", 5, "decode", "", -1),
        ("aten::add", 5, "", "", -1),
    ]
    assert attributed(calls) == 50 / 55
    assert gaps(calls) == []


def test_sums():
    calls = calls_of(cpu_trace())
    first = kernels_by_time(calls)[0]
    assert (first.name, first.phase, first.us, first.calls, first.share) == ("aten::mm", "decode", 25, 3, 0.5)
    assert len(kernels_by_time(calls, limit=1)) == 2, "one for each phase"
    l0, l1 = layer_times(calls, LAYERS, ceiling_gb_s=100.0)
    assert (l0.layer, l0.us, l0.calls) == ("l0", 20, 2)
    assert l0.gb_s == pytest.approx((1 << 20) / 20e-6 / 1e9)
    assert l0.share == l0.gb_s / 100
    assert l1.gb_s == pytest.approx(200 / 5e-6 / 1e9)
    assert layer_times(calls, LAYERS)[0].share is None
    table = Layer("l0", "Embedding", "bf16", 10, 20, False, ("head",), ("l0",))
    assert layer_times(calls, [table]) == [], "a lookup does not read the table"


def test_kernels_belong_to_what_launched_them():
    calls = calls_of(gpu_trace())
    assert [(c.phase, c.layer) for c in calls] == [("decode", "l0"), ("decode", "l0"), ("decode", ""), ("", "")]
    assert all(c.on_gpu for c in calls)
    assert calls[0].elements >= 1 << 20


def test_gaps():
    decode, other = gaps(calls_of(gpu_trace()))
    assert (decode.span_us, decode.busy_us, decode.launches, decode.longest_us) == (42, 20, 3, 20)
    assert decode.idle == 1 - 20 / 42
    assert (other.phase, other.idle) == ("", 0)
    overlapping = gpu_trace()
    overlapping["traceEvents"][-2]["ts"] = 1015
    assert gaps(calls_of(overlapping))[0].busy_us == 18, "time that two streams share counts once"


def test_a_copy_before_a_product_is_a_witness():
    assert copies_before_products(calls_of(cpu_trace()), LAYERS, {"decode"}) == {"l0": True}
    assert copies_before_products(calls_of(gpu_trace()), LAYERS, {"decode"}) == {"l0": True}
    assert copies_before_products(calls_of(gpu_trace()), LAYERS, {"prefill"}) == {}
    fused = gpu_trace()
    fused["traceEvents"][5]["args"]["grid"] = [8, 1, 1]
    assert copies_before_products(calls_of(fused), LAYERS, {"decode"}) == {"l0": False}, "only an activation is copied"
    tied = [Layer("first", "Linear", "int8", 1 << 20, 1 << 20, True, ("l0",))]
    assert copies_before_products(calls_of(cpu_trace()), tied, {"decode"}) == {"first": True}
    after = cpu_trace()
    after["traceEvents"][5]["ts"] = 10.5
    after["traceEvents"][5]["dur"] = 0.2
    assert copies_before_products(calls_of(after), LAYERS, {"decode"}) == {"l0": False}


def test_kinds():
    for name in ("aten::addmm", "lowbit::linear", "nvjet_hsh_128", "void cutlass::Kernel<x>", "sm90_xmma_gemm_bf16"):
        assert kind_of(name) == "matrix product", name
    for name in ("aten::copy_", "void at::native::elementwise_kernel<1>", "triton_poi_fused__to_copy_mul_0"):
        assert kind_of(name) == "copy or elementwise", name
    assert kind_of("aten::softmax") == "other"
