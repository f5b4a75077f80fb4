"""The CUDA C++ kernel for 8-bit activations: exact sums, every tile, the same bits every time."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import weight_on_gpu
from torch import Tensor

from lowbit.formats import Format, parse_format
from lowbit.kernels.cuda import scaled_mm
from lowbit.kernels.cuda.tiles import Tiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

PAIRS = [
    ("int8:row", "int8:row"), ("float8_e4m3:row", "float8_e4m3:row"), ("float8_e5m2:row", "float8_e5m2:row"),
    ("int8:tensor", "int8:tensor"), ("int4:g128", "float8_e4m3:row"), ("int4:g128", "int8:row"),
    ("int4:g32:asym", "float8_e4m3:row"), ("int4:g64:asym", "int8:row"), ("int4:row", "int8:row"),
    ("int4:g256", "float8_e4m3:g128"), ("float8_e4m3:b128x128", "float8_e4m3:g128"), ("int8:g128", "int8:row"),
    ("int8:row", "int8:g128"),
]  # fmt: skip
TILINGS = [
    Tiling(8, warpgroups=1, blocks=2), Tiling(16, 2, blocks=2), Tiling(16, split=2), Tiling(32, split=4, warpgroups=1),
    Tiling(64, split=8), Tiling(64, cut=True, blocks=2), Tiling(128, warpgroups=1), Tiling(128, cut=True),
    Tiling(128, split=4), Tiling(128, 2), Tiling(128, warpgroups=3), Tiling(192), Tiling(256), Tiling(256, cut=True),
    Tiling(256, split=2), Tiling(128, turned=True), Tiling(128, 2, cut=True, turned=True),
    Tiling(128, warpgroups=3, cut=True, turned=True), Tiling(128, split=4, turned=True),
    Tiling(128, warpgroups=1, blocks=2, split=8, turned=True), Tiling(160),
    Tiling(128, 2, warpgroups=1, blocks=2, turned=True),
]  # fmt: skip


def codes_like(act: Format, m: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes `(m, k)` of every size, a row of zeros among them, and scales."""
    generator = torch.Generator().manual_seed(seed)
    x, dtype = torch.randn(m, k, generator=generator), act.planes[0].dtype
    x[m // 2] = 0
    x = (x * 40).round().clamp(-127, 127) if dtype == torch.int8 else x
    scale = act.plane("scale")
    shape = 1 if scale.n is None else m, 1 if scale.k is None else -(-k // scale.k)
    return x.to(dtype).cuda(), (torch.rand(shape, generator=generator) * 1e-3).cuda()


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """fp64 `(M, K)`."""
    k = codes.shape[1]
    whole = scales.double().repeat_interleave(scaled_mm.DEPTH, 1)[:, :k] if scales.shape[1] > 1 else scales.double()
    return codes.double() * whole


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
@pytest.mark.parametrize(("n", "k"), [(64, 32), (392, 1184), (770, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_fp64(weight: str, activation: str, n: int, k: int, dtype: torch.dtype) -> None:
    fmt, act = parse_format(weight), parse_format(activation)
    quantized = weight_on_gpu(fmt, n, k)
    w = fmt.dequantize(quantized.planes, n, k, torch.float64)
    bias = torch.linspace(-1, 1, n, dtype=dtype, device="cuda")
    chosen = {scaled_mm.config_for(fmt, act, m, n, k, 132) for m in (1, 100, 1000)}
    for c in (*TILINGS, *chosen):
        if isinstance(scaled_mm.constants(fmt, act, c), str) or c.split * scaled_mm.DEPTH > k:
            continue
        for m in (1, 5, 130):
            codes, scales = codes_like(act, m, k, seed=m)
            y = scaled_mm.launch(codes, quantized.planes, fmt, act, n, dtype, bias, scales, config=c)
            x = dequantized(codes, scales)
            exact = x @ w.T + bias
            # Sums of integers are exact, and one rounding follows, or one in fp32 for each part. Sums of 128 products
            # of float8 have 14 bits in the matrix units.
            error = (y.double() - exact).abs()
            unit = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
            sizes = x.abs() @ w.abs().T
            slack = 2.0**-20 if codes.dtype == torch.int8 else 2.0**-11
            assert bool((error <= exact.abs() * unit * 1.001 + slack * sizes + 1e-7).all()), str(c)


@pytest.mark.parametrize(("weight", "activation"), [*PAIRS[:2], *PAIRS[4:6], PAIRS[10]])
@pytest.mark.parametrize("tiling", [Tiling(64, split=4), Tiling(64, cut=True), Tiling(128, cut=True)], ids=str)
def test_the_same_bits_every_time_and_in_graphs(weight: str, activation: str, tiling: Tiling) -> None:
    fmt, act, n, k = parse_format(weight), parse_format(activation), 1024, 2048
    planes = weight_on_gpu(fmt, n, k).planes
    (x, scales), (other, _) = (codes_like(act, 60, k, seed) for seed in (1, 2))

    def run() -> Tensor:
        return scaled_mm.launch(x, planes, fmt, act, n, torch.bfloat16, None, scales, config=tiling)

    first = run()
    assert all(torch.equal(run(), first) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for values in (x.clone(), other):
        x.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, run())


@pytest.mark.parametrize("activation", ["int8:row", "float8_e4m3:row"])
def test_every_code_of_4_bits_becomes_its_level(activation: str) -> None:
    """One activation of 1 at a time takes out a column of the weight: every code under every zero point, exactly."""
    fmt, act, n, k = parse_format("int4:g32:asym"), parse_format(activation), 256, 512
    generator = torch.Generator().manual_seed(0)
    qdata = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=generator)
    zero_point = torch.arange(16, dtype=torch.uint8).repeat(n * k // 32 // 16).view(n, k // 32)
    planes = {"qdata": qdata, "scale": torch.ones(n, k // 32, dtype=torch.bfloat16), "zero_point": zero_point}
    levels = fmt.dequantize(planes, n, k, torch.float64)
    assert set(levels.unique().tolist()) == set(range(-15, 16))
    codes = torch.eye(k).to(act.planes[0].dtype).cuda()
    on_gpu, ones = {name: t.cuda() for name, t in planes.items()}, torch.ones(k, 1, device="cuda")
    for c in (Tiling(64), Tiling(128, cut=True), Tiling(160)):
        y = scaled_mm.launch(codes, on_gpu, fmt, act, n, torch.bfloat16, None, ones, config=c)
        assert torch.equal(y.cpu().double(), levels.T)


def test_rows_of_a_wider_weight() -> None:
    """A weight whose rows lie further apart than they are long."""
    fmt = parse_format("int8:row")
    planes = weight_on_gpu(fmt, 256, 1024).planes
    x, ones = codes_like(fmt, 20, 512)
    cut = planes | {"qdata": planes["qdata"][:, 256:768]}
    whole = planes | {"qdata": planes["qdata"][:, 256:768].contiguous()}
    assert torch.equal(
        scaled_mm.launch(x, cut, fmt, fmt, 256, torch.bfloat16, None, ones),
        scaled_mm.launch(x, whole, fmt, fmt, 256, torch.bfloat16, None, ones),
    )


def test_integer_sums_are_exact() -> None:
    """Halves of K whose sums fp32 would round, and that nearly cancel."""
    fmt, k = parse_format("int8:row"), 1 << 16
    qdata = torch.full((64, k), 127, dtype=torch.int8)
    qdata[:, 0] = 126
    x = torch.full((3, k), 127, dtype=torch.int8)
    x[:, k // 2 :] = -127
    planes, ones = {"qdata": qdata.cuda(), "scale": torch.ones(64, 1, device="cuda")}, torch.ones(1, 1, device="cuda")
    for c in (Tiling(16, split=2), Tiling(128, cut=True), Tiling(8, warpgroups=1)):
        y = scaled_mm.launch(x.cuda(), planes, fmt, fmt, 64, torch.bfloat16, None, ones, config=c)
        assert bool((y == -127).all())
