"""Eager calls of linear layers: past the dispatcher where nothing looks on, through the op where anything does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import each_format, quantized, same_bits
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit import QuantizedTensor, ops
from lowbit.formats import Format, parse_format
from lowbit.formats.activation import parse_activation

N, K = 48, 64
Ways = list[str]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    """How calls went: through the "op", or "past" it."""
    taken: Ways = []

    def noting(way: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            taken.append(way)
            return run(*args)

        return call

    monkeypatch.setattr(ops, "linear", noting("op", ops.linear))
    monkeypatch.setattr(ops, "linear_unwatched", noting("past", ops.linear_unwatched))
    return taken


@pytest.fixture(scope="module")
def weight() -> QuantizedTensor:
    return quantized(parse_format("int8:row"), N, K)


class Watching(TorchDispatchMode):
    """Notes the ops that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


# Where nothing looks on --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "context",
    [nullcontext, torch.no_grad, torch.inference_mode, Passing, lambda: torch.autocast("cpu")],
    ids=["plain", "no_grad", "inference_mode", "function mode", "autocast"],
)
def test_nothing_looks_on(ways: Ways, weight: QuantizedTensor, context: Callable[[], AbstractContextManager]) -> None:
    with context():
        F.linear(torch.randn(3, K), weight, torch.randn(N))
    assert ways == ["past"]


def test_gradients_that_nobody_records_do_not_matter(ways: Ways, weight: QuantizedTensor) -> None:
    with torch.no_grad():
        y = F.linear(torch.randn(3, K, requires_grad=True), weight, nn.Parameter(torch.randn(N)))
    assert ways == ["past"]
    assert not y.requires_grad


@each_format
@pytest.mark.parametrize("act", ["", "int8:row", "float8_e4m3:g128", "nvfp4"])
def test_both_ways_give_the_same_bits(ways: Ways, fmt: Format, act: str) -> None:
    w = quantized(fmt, N, K)
    w = w.with_planes(w.planes, act=parse_activation(act))
    x, bias = torch.randn(2, 3, K).bfloat16(), torch.randn(N).bfloat16()
    for given in (x, x[0], x[0, 0], x[:, :, ::1].transpose(0, 1), x[:0]):
        y = F.linear(given, w, bias)
        with Watching():
            expected = F.linear(given, w, bias)
        assert ways[-2:] == ["past", "op"]
        assert same_bits(y, expected)
        assert y.is_contiguous() == expected.is_contiguous()


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, K, dtype=torch.int32), None, "the input must be bf16, fp16 or fp32"),
        (torch.zeros(2, K, dtype=torch.float64), None, "the input must be bf16, fp16 or fp32"),
        (torch.zeros(2, K + 1), None, "the input's last size must be K = 64"),
        (torch.zeros(()), None, "the input's last size must be K = 64"),
        (torch.zeros(2, K), torch.zeros(N + 1), r"the bias must be \(48,\)"),
    ],
    ids=str,
)
def test_both_ways_raise_the_same_errors(
    ways: Ways, weight: QuantizedTensor, x: Tensor, bias: Tensor | None, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as short:
        F.linear(x, weight, bias)
    with Watching(), pytest.raises((TypeError, ValueError), match=message) as ordinary:
        F.linear(x, weight, bias)
    assert ways == ["past", "op"]
    assert (short.type, str(short.value)) == (ordinary.type, str(ordinary.value))


# Where something does ----------------------------------------------------------------------------


def test_autograd(ways: Ways, weight: QuantizedTensor) -> None:
    x = torch.randn(3, K, requires_grad=True)
    F.linear(x, weight).sum().backward()
    assert x.grad is not None
    bias = nn.Parameter(torch.randn(N))
    F.linear(torch.randn(3, K), weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((N,), 3.0))
    assert ways == ["op", "op"]


def test_a_dispatch_mode(ways: Ways, weight: QuantizedTensor) -> None:
    with torch.inference_mode(), Watching() as mode:
        F.linear(torch.randn(3, K), weight)
    assert ways == ["op"]
    assert "lowbit::linear" in mode.seen


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.11 and 2.12
def test_a_profiler(ways: Ways, weight: QuantizedTensor) -> None:
    with torch.inference_mode(), torch.profiler.profile() as profile:
        F.linear(torch.randn(3, K), weight)
    assert ways == ["op"]
    assert "lowbit::linear" in [event.name for event in profile.events()]


def test_fake_tensors(ways: Ways, weight: QuantizedTensor) -> None:
    with FakeTensorMode() as mode:
        x, w = mode.from_tensor(torch.randn(3, K)), mode.from_tensor(weight)
        assert F.linear(x, w).shape == (3, N)
    assert ways == ["op"]
    assert F.linear(x, w).shape == (3, N), "outside of the mode"
    assert ways == ["op", "op"]


def test_meta_tensors(ways: Ways, weight: QuantizedTensor) -> None:
    assert F.linear(torch.randn(3, K, device="meta"), weight.to("meta")).is_meta
    assert ways == ["op"]


def test_tracers(ways: Ways, weight: QuantizedTensor) -> None:
    def layer(x: Tensor) -> Tensor:
        return F.linear(x, weight)

    for before_dispatch in (False, True):
        graph = make_fx(layer, pre_dispatch=before_dispatch)(torch.randn(3, K)).graph
        assert torch.ops.lowbit.linear.default in [node.target for node in graph.nodes]
    assert ways == ["op", "op"]


# From torch 2.14 on, a warning that another tracer is preferred.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:.torch.jit:FutureWarning"
)
def test_the_old_tracer(ways: Ways, weight: QuantizedTensor) -> None:
    traced = torch.jit.trace(lambda x: F.linear(x, weight), torch.randn(3, K), check_trace=False)
    assert "lowbit::linear" in str(traced.graph)
    assert ways == ["op"]


def test_export(weight: QuantizedTensor) -> None:
    layer = nn.Linear(K, N, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    for strict in (False, True):
        exported = torch.export.export(layer, (torch.randn(3, K),), strict=strict)
        assert "lowbit.linear" in str(exported.graph)


def test_functorch(ways: Ways, weight: QuantizedTensor) -> None:
    """The op has no rule for batches. The kernel, which would read a batch as one tensor, must not run."""
    with pytest.raises(RuntimeError, match="Batching rule not implemented for lowbit::linear"):
        torch.func.vmap(lambda x: F.linear(x, weight))(torch.randn(3, K))
    assert ways == ["op"]


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # of torch's own decompositions
def test_forward_differentiation(ways: Ways, weight: QuantizedTensor) -> None:
    x = torch.randn(3, K)
    with forward_ad.dual_level():
        F.linear(forward_ad.make_dual(x, x), weight)
    assert ways == ["op"]


def test_tensors_of_other_kinds(ways: Ways, weight: QuantizedTensor) -> None:
    x = torch.randn(3, K, dtype=torch.complex64).conj().imag  # negated when it is read
    assert x.is_neg()
    torch.testing.assert_close(F.linear(x, weight), F.linear(x.resolve_neg().clone(), weight))
    F.linear(torch.randn(3, K).as_subclass(Subclass), weight)
    F.linear(torch.randn(3, K), weight, torch.randn(N).as_subclass(Subclass))
    F.linear(torch.randn(3, K), weight, torch.randn(N, dtype=torch.complex64).conj().imag)
    assert ways == ["op", "past", "op", "op", "op"]


def test_other_threads_are_not_watched(ways: Ways, weight: QuantizedTensor) -> None:
    """Modes belong to a thread."""
    x = torch.randn(3, K)
    with Watching():
        thread = threading.Thread(target=F.linear, args=(x, weight))
        thread.start()
        thread.join()
        F.linear(x, weight)
    assert ways == ["past", "op"]
