"""How kernels run: repeatable, in CUDA graphs, under torch.compile, on other streams, for formats nobody knew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import FORMATS, each_format
from gpu_cases import assert_close, expected, inputs, weight_on_gpu
from torch import Tensor

from lowbit.formats import Format, Plane, Planes, parse_format, register
from lowbit.formats.activation import parse_activation
from lowbit.formats.base import safe_scale, tile_amax, unregister
from lowbit.formats.elements import FloatElement
from lowbit.kernels.problem import Problem
from lowbit.kernels.select import select

BF16 = torch.bfloat16
PAIRS = [
    ("int4:g128", ""), ("mxfp4", ""), ("nf4:g64:dq", ""), ("float8_e4m3:row", "float8_e4m3:row"),
    ("int8:row", "int8:row"), ("nvfp4", "nvfp4"), ("float8_e4m3:b128x128", "float8_e4m3:g128"),
    ("int4:g64:asym", "int8:tensor"),
]  # fmt: skip
each_pair = pytest.mark.parametrize(("weight", "act"), PAIRS)


@each_pair
@pytest.mark.parametrize("m", [1, 17, 300])
def test_repeated_runs_give_the_same_bits(weight: str, act: str, m: int) -> None:
    w, x = weight_on_gpu(parse_format(weight), 256, 2048, parse_activation(act)), inputs(m, 2048, BF16)
    first = F.linear(x, w)
    for _ in range(8):
        assert torch.equal(F.linear(x, w), first)


@each_pair
@pytest.mark.parametrize("m", [1, 300])
def test_graph_replay_equals_eager(weight: str, act: str, m: int) -> None:
    n, k = 256, 2048
    w, x = weight_on_gpu(parse_format(weight), n, k, parse_activation(act)), inputs(m, k, BF16)
    F.linear(x, w)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        F.linear(x, w)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.linear(x, w)
    for seed in (1, 2):
        x.copy_(inputs(m, k, BF16, seed))
        y.fill_(7)
        graph.replay()
        assert torch.equal(y, F.linear(x, w))


@pytest.mark.parametrize(("weight", "act"), PAIRS[:4])
def test_compiled_equals_eager(weight: str, act: str) -> None:
    w = weight_on_gpu(parse_format(weight), 128, 256, parse_activation(act))

    def layer(x: Tensor) -> Tensor:
        return F.linear(x, w) * 2

    compiled = torch.compile(layer, fullgraph=True)
    for m in (1, 3, 130):
        x = inputs(m, 256, BF16)
        assert torch.equal(compiled(x), layer(x))


def test_other_streams() -> None:
    w, x = weight_on_gpu(parse_format("int4:g128"), 256, 2048), inputs(300, 2048, BF16)
    reference, side = F.linear(x, w), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = F.linear(x, w)
    side.synchronize()
    assert torch.equal(y, reference)


@each_format
def test_slow_paths_are_never_chosen(fmt: Format) -> None:
    arch = torch.cuda.get_device_capability()
    for act in ("", "int8:row", "float8_e4m3:row", "float8_e4m3:g128", "mxfp8_e4m3", "nvfp4"):
        for m in (1, 16, 17, 128, 129, 4096):
            kernel = select(Problem(m, 4096, 4096, fmt.spec, act, BF16, "cuda", arch)).kernel
            assert kernel.name not in ("torch_blocked", "reference"), f"{act} M = {m}"


@dataclass(frozen=True)
class FiveBitFloat(Format):
    """E3M1 in two code planes, fp16 scales for tiles of 2 x 48 weights, one factor for the tensor."""

    examples = ("toyfloat",)

    @classmethod
    def from_spec(cls, name: str, *options: str) -> FiveBitFloat:
        return cls()

    @property
    def spec(self) -> str:
        return "toyfloat"

    @property
    def element(self) -> FloatElement:
        return FloatElement(5, 3, 1)

    @property
    def scale_planes(self) -> tuple[Plane, ...]:
        return (Plane("scale", torch.float16, 2, 48), Plane("outer_scale", torch.float32, None, None))

    def choose_params(self, w: Tensor) -> Planes:
        outer = torch.full((1, 1), 0.01, dtype=torch.float32, device=w.device)
        return {
            "scale": safe_scale(tile_amax(w, (2, 48)) / self.element.max / outer, torch.float16),
            "outer_scale": outer,
        }


@pytest.fixture
def toy() -> Iterator[Format]:
    register("toyfloat")(FiveBitFloat)
    yield parse_format("toyfloat")
    unregister("toyfloat")


@pytest.mark.parametrize("m", [1, 20, 200])
def test_a_format_registered_elsewhere_runs_untouched(toy: Format, m: int) -> None:
    assert toy not in FORMATS
    w, x = weight_on_gpu(toy, 101, 500), inputs(m, 500, BF16)
    assert_close(F.linear(x, w), expected(x, w), toy, BF16)
    x = inputs(m, 500, torch.float32)
    assert_close(F.linear(x, w), expected(x, w), toy, torch.float32)
