"""Every format under `torch.compile(fullgraph=True)`: one graph for every number of tokens, equal to eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import each_format, quantized, same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lowbit import QuantizedTensor
from lowbit.formats import Format, parse_format
from lowbit.formats.activation import parse_activation


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def model(fmt: Format, act: str = "") -> nn.Module:
    """An embedding, a linear with bias and one without, as a language model has them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 64)
            self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 40, bias=False)
            for layer in (self.embedding, self.up, self.down):
                quantized_act = None if layer is self.embedding else parse_activation(act)
                w = QuantizedTensor.from_float(layer.weight, fmt, quantized_act)
                layer.weight = nn.Parameter(w, requires_grad=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.down(F.silu(self.up(self.embedding(ids))))

    return Model()


@each_format
def test_fullgraph_and_one_recompilation_for_any_m(fmt: Format) -> None:
    m = model(fmt)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(m, fullgraph=True, backend=counter)
    # The first length, every other length, and one token, which the compiler always keeps apart.
    for tokens, graphs in ((5, 1), (7, 2), (33, 2), (2, 2), (128, 2), (1, 3)):
        ids = torch.arange(tokens) % 40
        with torch.no_grad():
            assert same_bits(compiled(ids), m(ids))
        assert counter.frame_count <= graphs, f"{tokens} tokens needed another graph"


@each_format
def test_one_graph_for_any_m(fmt: Format) -> None:
    layer = nn.Linear(64, 48)
    layer.weight = nn.Parameter(quantized(fmt, 48, 64), requires_grad=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for tokens in (2, 7, 33, 1025):
            x = torch.randn(tokens, 64)
            assert same_bits(compiled(x), layer(x))
    assert counter.frame_count == 1


@each_format
def test_gradients_of_the_compiled_layer(fmt: Format) -> None:
    w = quantized(fmt, 48, 64)

    def loss(x: Tensor, a: Tensor) -> Tensor:
        return (F.linear(x, w) + F.linear(x, a)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, a = torch.randn(3, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    for got, expected in zip(torch.autograd.grad(compiled(x, a), (x, a)), torch.autograd.grad(loss(x, a), (x, a))):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def run_all(build: Callable[[], Any], x: Tensor, **options: Any) -> None:
    f = build()
    with torch.no_grad():
        assert torch.allclose(torch.compile(f, fullgraph=True, **options)(x), f(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ["int8:row", "float8_e4m3:row", "float8_e4m3:g128", "mxfp8_e4m3", "nvfp4"])
def test_dynamic_activations(act: str) -> None:
    run_all(lambda: model(parse_format("int8:row"), act), torch.arange(9), backend="aot_eager")


@pytest.mark.parametrize("spec", ["int8:row", "int4:g32", "nvfp4", "codebook4:g64"])
def test_inference_mode(spec: str) -> None:
    outside = model(parse_format(spec))
    with torch.inference_mode():
        inside = model(parse_format(spec))
        for m in (outside, inside):
            compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
            for tokens in (5, 9, 1):
                assert same_bits(compiled(torch.arange(tokens)), m(torch.arange(tokens)))


@pytest.mark.parametrize("spec", ["int8:row", "int4:g128", "mxfp4", "nf4:g64"])
def test_convolution(spec: str) -> None:
    layer = nn.Conv2d(8, 12, 3, padding=1, groups=2)
    layer.weight = nn.Parameter(QuantizedTensor.from_float(layer.weight, parse_format(spec)), requires_grad=False)
    run_all(lambda: layer, torch.randn(2, 8, 6, 5), backend="aot_eager")


@pytest.mark.parametrize("spec", ["int4:g128", "nvfp4"])
def test_inductor(spec: str) -> None:
    run_all(lambda: model(parse_format(spec)), torch.arange(9))


def test_a_wrong_size_is_named_while_compiling() -> None:
    w = quantized(parse_format("int4:g32"), 48, 64)
    compiled = torch.compile(lambda x: F.linear(x, w), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="K = 64"):
        compiled(torch.randn(2, 65))
