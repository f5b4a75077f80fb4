"""Eager calls on a GPU, which go past the dispatcher: the bits of `torch.ops.lowbit.linear`, whatever happens to the
weight in between."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import same_bits, weights
from gpu_cases import inputs, weight_on_gpu
from torch import Tensor, nn

import lowbit
from lowbit import QuantizedTensor, dispatch, ops
from lowbit.formats import parse_format
from lowbit.formats.activation import parse_activation
from lowbit.kernels.select import planned, use_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
N, K = 256, 2048
PAIRS = [
    ("int4:g128", ""), ("int4:g64:asym", ""), ("int8:row", ""), ("int3:g64", ""), ("nf4:g64:dq", ""), ("mxfp4", ""),
    ("float8_e4m3:row", ""), ("float8_e4m3:row", "float8_e4m3:row"), ("int8:row", "int8:row"), ("nvfp4", "nvfp4"),
    ("int4:g128", "int8:row"), ("float8_e4m3:b128x128", "float8_e4m3:g128"),
]  # fmt: skip
each_pair = pytest.mark.parametrize(("spec", "act"), PAIRS)
#: One for each kernel that few and more tokens meet.
MS = (1, 3, 8, 9, 16, 64, 300)


def made(spec: str, act: str = "") -> QuantizedTensor:
    """A weight of its own, to be changed."""
    return weight_on_gpu(parse_format(spec), N, K, parse_activation(act)).clone()


def by_op(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    planes = list(w.planes.values())
    y: Tensor = torch.ops.lowbit.linear(
        x, planes, bias, w.act_scale, w.format.spec, w.act_spec, w.out_features, w.in_features
    )
    return y


def by_kernel(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """By the entry of the table that was chosen, with nothing remembered in between."""
    m = x.numel() // K
    problem = ops.problem_of(x, m, N, K, w.format.spec, w.act_spec)
    return ops._multiplied(x.reshape(m, K).contiguous(), w.planes, bias, problem, w.act_scale, False).view(
        *x.shape[:-1], N
    )


def assert_same(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    assert not dispatch._is_watched(x, bias)
    y = F.linear(x, w, bias)
    assert same_bits(y, by_op(x, w, bias))
    assert same_bits(y, by_kernel(x, w, bias))
    return y


@each_pair
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
def test_bits_of_the_op(spec: str, act: str, mode: Callable[[], torch.no_grad]) -> None:
    w = made(spec, act)
    with mode():
        for m in MS:
            for dtype in (BF16, FP16, FP32):
                x = inputs(m, K, dtype, seed=m)
                for bias in (None, torch.randn(N, device="cuda", dtype=dtype), torch.randn(N, device="cuda")):
                    assert_same(x, w, bias)
            x = inputs(m, K, BF16)
            assert_same(x.view(1, m, K), w)
            assert_same(x.view(m, 1, 1, K), w, torch.randn(N, device="cuda", dtype=FP16))


@each_pair
def test_inputs_that_lie_apart(spec: str, act: str) -> None:
    """Views with gaps, of one row, transposed, at an address that is no multiple of 16."""
    w = made(spec, act)
    with torch.inference_mode():
        big = torch.randn(8, 3, K + 8, device="cuda", dtype=BF16)
        odd = torch.randn(K * 2 + 1, device="cuda", dtype=BF16)
        for x in (big[..., :K], big[:, 1:2, :K], big[:1, -1:, 8:], big[..., :K].transpose(0, 1), odd[1:].view(2, K)):
            whole = assert_same(x.contiguous().clone(), w)
            y = F.linear(x, w)
            assert same_bits(y, whole)
            assert y.is_contiguous()


@each_pair
@pytest.mark.parametrize("m", [1, 64])
def test_the_weight_changes(spec: str, act: str, m: int) -> None:
    """In place, by other planes, by other memory of the same planes, by a move."""
    w, x = made(spec, act), inputs(m, K, BF16)
    other = QuantizedTensor.from_float(weights("student_t", N, K, seed=5), w.format, w.act).to("cuda")
    with torch.no_grad():
        expected = F.linear(x, other)
        before = assert_same(x, w)
        assert not torch.equal(before, expected)

        first = w.clone()
        first.copy_(other)
        assert torch.equal(assert_same(x, first), expected)

        second = w.clone()
        F.linear(x, second)
        for name, plane in other.planes.items():
            getattr(second, name).fill_(0) if plane.dtype == torch.uint8 else None
            setattr(second, name, plane.clone())
        assert torch.equal(assert_same(x, second), expected)

        third = w.clone()
        F.linear(x, third)
        for name, plane in other.planes.items():
            getattr(third, name).data = plane.clone()
        noise = [torch.full_like(plane.view(torch.uint8), 0x55) for plane in w.planes.values()]
        assert torch.equal(assert_same(x, third), expected)
        del noise

        fourth = w.to("cpu").to("cuda")
        assert torch.equal(assert_same(x, fourth), before)


@pytest.mark.parametrize("m", [1, 64])
def test_a_layer_that_moves_and_loads(m: int) -> None:
    layer, x = nn.Linear(K, N, bias=False, device="cuda", dtype=BF16), inputs(m, K, BF16)
    other = nn.Linear(K, N, bias=False, device="cuda", dtype=BF16)
    for each in (layer, other):
        lowbit.quantize_(nn.Sequential(each), "int4:g128")
        each.requires_grad_(False)
    with torch.no_grad():
        before, expected = layer(x), other(x)
        layer.to("cpu")
        held = [torch.full((1 << 20,), 7, device="cuda", dtype=torch.uint8) for _ in range(4)]
        layer.to("cuda")
        assert torch.equal(layer(x), before)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), expected)
        layer.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(layer(x), expected)
        del held


def test_kernels_that_are_asked_for() -> None:
    w, x = made("int4:g128"), inputs(4, K, BF16)
    with torch.inference_mode():
        for name in ("cuda_small_m", "cuda_wgmma", "triton_weight_only", "triton_chunked", "cuda_small_m"):
            with use_kernel(name):
                assert_same(x, w)
        with lowbit.batch_invariant():
            y = assert_same(x, w)
            assert torch.equal(F.linear(x[:1].clone(), w), y[:1])
        assert_same(x, w)
        with use_kernel("cuda_scaled_mm"), pytest.raises(lowbit.UnsupportedError):
            F.linear(x, w)


def test_errors_are_those_of_the_op() -> None:
    w = made("int4:g128")
    with torch.inference_mode():
        for x, bias in (
            (torch.zeros(1, K, dtype=torch.int32, device="cuda"), None), (torch.zeros(1, K + 128, device="cuda"), None),
            (torch.zeros(1, K), None), (torch.zeros(1, K, device="cuda"), torch.zeros(N)),
            (torch.zeros(1, K, device="cuda"), torch.zeros(N + 1, device="cuda")),
        ):  # fmt: skip
            with pytest.raises((TypeError, ValueError)) as short:
                F.linear(x, w, bias)
            with pytest.raises((TypeError, ValueError)) as op:
                by_op(x, w, bias)
            assert (short.type, str(short.value)) == (op.type, str(op.value))
        assert F.linear(torch.zeros(0, K, device="cuda"), w).shape == (0, N)


@pytest.mark.parametrize("m", [1, 8, 64])
def test_threads(m: int) -> None:
    """Each with a stream, inputs and a weight of its own, at once; half of them share a weight."""
    shared, failures = made("int4:g128"), list[str]()
    torch.cuda.synchronize()

    def work(i: int) -> None:
        w = shared if i % 2 else made("int4:g128")
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            xs = [inputs(m, K, BF16, seed=100 * i + j) for j in range(4)]
            expected = [by_op(x, w) for x in xs]
            for _ in range(100):
                for x, y in zip(xs, expected, strict=True):
                    if not torch.equal(F.linear(x, w), y):
                        failures.append(f"thread {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@each_pair
@pytest.mark.parametrize("m", [1, 64])
def test_graphs_and_streams(spec: str, act: str, m: int) -> None:
    """The launches of a capture are those of the captured stream, and what is called after it is not."""
    w, x = made(spec, act), inputs(m, K, BF16)
    with torch.inference_mode():
        expected = assert_same(x, w)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = F.linear(x, w)
        captured.fill_(7)
        assert torch.equal(F.linear(x, w), expected)
        assert bool((captured == 7).all()), "an eager call wrote into the output of the capture"
        x.copy_(inputs(m, K, BF16, seed=1))
        graph.replay()
        assert torch.equal(captured, F.linear(x, w))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Long enough that what is launched on another stream would read x before it is written.
            late = torch.empty_like(x)
            torch.cuda._sleep(10_000_000)
            late.copy_(x)
            y = F.linear(late, w)
        side.synchronize()
        assert torch.equal(y, F.linear(x, w))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("m", [1, 64])
def test_a_gpu_that_is_not_the_current_one(m: int) -> None:
    w, x = made("int4:g128"), inputs(m, K, BF16)
    with torch.inference_mode():
        expected = F.linear(x, w)
        there, x1 = w.to("cuda:1"), x.to("cuda:1")
        assert torch.cuda.current_device() == 0
        y = F.linear(x1, there)
        assert torch.cuda.current_device() == 0
        assert torch.equal(y.to("cuda:0"), expected)
        assert torch.equal(F.linear(x, w), expected)
        with pytest.raises(ValueError, match="input on cuda:0, weight on cuda:1"):
            F.linear(x, there)


def test_no_memory_is_kept() -> None:
    x = inputs(1, K, BF16)
    with torch.inference_mode():
        F.linear(x, made("int4:g128"))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(20):
            F.linear(x, made("int4:g128"))
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before


def test_weight_only_layers_have_plans() -> None:
    """Otherwise nothing above would be tested."""
    device = torch.device("cuda", torch.cuda.current_device())
    for m in (1, 64):
        assert (planned(m, N, K, "int4:g128", "", BF16, device) is not None) == (
            torch.cuda.get_device_capability() == (9, 0) or m == 1
        )
    assert ops.linear_unwatched is ops._linear
