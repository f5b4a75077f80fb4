"""The CUDA C++ kernel for 8-bit codes on both sides: exact sums, every tile, the same bits every time."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import weight_on_gpu
from torch import Tensor

from lowbit.formats import parse_format
from lowbit.kernels.cuda import scaled_mm
from lowbit.kernels.cuda.tiles import Tiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

SPECS = ["int8:row", "float8_e4m3:row", "float8_e5m2:row", "int8:tensor"]
TILINGS = [
    Tiling(8, warpgroups=1, blocks=2), Tiling(16, 2, blocks=2), Tiling(16, split=2), Tiling(32, split=4, warpgroups=1),
    Tiling(64, split=8), Tiling(64, cut=True, blocks=2), Tiling(128, warpgroups=1), Tiling(128, cut=True),
    Tiling(128, split=4), Tiling(128, 2), Tiling(256), Tiling(256, cut=True), Tiling(256, split=2),
]  # fmt: skip


def codes_like(w: Tensor, m: int, k: int, seed: int = 0) -> Tensor:
    """Codes of every size `(m, k)` in the dtype of `w`, a row of zeros among them."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x[m // 2] = 0
    x = (x * 40).round().clamp(-127, 127) if w.dtype == torch.int8 else x
    return x.to(w.dtype).cuda()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("n", "k"), [(64, 16), (388, 1168), (770, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_fp64(spec: str, n: int, k: int, dtype: torch.dtype) -> None:
    fmt = parse_format(spec)
    planes = weight_on_gpu(fmt, n, k).planes
    w, scale = planes["qdata"].double(), planes["scale"].double()
    bias = torch.linspace(-1, 1, n, dtype=dtype, device="cuda")
    chosen = {scaled_mm.config_for(fmt, m, n, k, 132) for m in (1, 100, 1000)}
    for c in (*TILINGS, *chosen):
        if isinstance(scaled_mm.constants(fmt, c), str) or c.split * scaled_mm.DEPTH > k:
            continue
        for m in (1, 5, 130):
            x = codes_like(planes["qdata"], m, k, seed=m)
            row_scale = torch.rand(m, 1, generator=torch.Generator().manual_seed(m)).cuda() * 1e-3
            y = scaled_mm.launch(x, planes, fmt, n, dtype, bias, row_scale, config=c)
            exact = x.double() @ w.T * scale.view(1, -1) * row_scale + bias
            # Sums of integers are exact, and one rounding follows. Sums of 128 products of float8 have 14 bits in the
            # matrix units.
            error = (y.double() - exact).abs()
            unit = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
            sizes = x.double().abs() @ w.abs().T * scale.view(1, -1) * row_scale
            slack = 0 if planes["qdata"].dtype == torch.int8 else 2.0**-11 * sizes
            assert bool((error <= exact.abs() * unit * 1.001 + slack + 1e-7).all()), str(c)


@pytest.mark.parametrize("spec", SPECS[:2])
@pytest.mark.parametrize("tiling", [Tiling(64, split=4), Tiling(64, cut=True), Tiling(128, cut=True)], ids=str)
def test_the_same_bits_every_time_and_in_graphs(spec: str, tiling: Tiling) -> None:
    fmt, n, k = parse_format(spec), 1024, 2048
    planes = weight_on_gpu(fmt, n, k).planes
    x, other = (codes_like(planes["qdata"], 60, k, seed) for seed in (1, 2))
    row_scale = torch.ones(1, 1, device="cuda")

    def run() -> Tensor:
        return scaled_mm.launch(x, planes, fmt, n, torch.bfloat16, None, row_scale, config=tiling)

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


def test_rows_of_a_wider_weight() -> None:
    """A weight whose rows lie further apart than they are long."""
    fmt = parse_format("int8:row")
    planes = weight_on_gpu(fmt, 256, 1024).planes
    x = codes_like(planes["qdata"], 20, 512)
    cut = planes | {"qdata": planes["qdata"][:, 256:768]}
    whole = planes | {"qdata": planes["qdata"][:, 256:768].contiguous()}
    ones = torch.ones(1, 1, device="cuda")
    assert torch.equal(
        scaled_mm.launch(x, cut, fmt, 256, torch.bfloat16, None, ones),
        scaled_mm.launch(x, whole, fmt, 256, torch.bfloat16, None, ones),
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
        y = scaled_mm.launch(x.cuda(), planes, fmt, 64, torch.bfloat16, None, ones, config=c)
        assert bool((y == -127).all())
