"""The CUDA C++ kernel for Hopper's matrix units: right for every format, tile and split, and the same bits every time."""

from __future__ import annotations

import pytest
import torch
from cases import sqnr_db
from gpu_cases import assert_close, expected, inputs, weight_on_gpu

from lowbit.formats import Format, registered
from lowbit.kernels.cuda import small_m, wgmma
from lowbit.kernels.cuda.wgmma import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

FORMATS = [f for f in registered() if not isinstance(small_m.constants(f), str)]
CONFIGS = [
    Config(16, 1, 1, 2), Config(32, 1, 2, 2), Config(64, 2), Config(64, 1, 4, 2), Config(128, 1, 8), Config(128, 2),
    Config(128, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (100, 1152), (770, 2048)], ids=str)
def test_matches_fp64(fmt: Format, n: int, k: int) -> None:
    for m in (1, 17, 64, 129, 300):
        x = inputs(m, k, torch.bfloat16, seed=m)
        bias = torch.randn(n, device="cuda") if m % 2 else None
        y = wgmma.launch(x, weight_on_gpu(fmt, n, k).planes, fmt, n, bias)
        assert_close(y, expected(x, weight_on_gpu(fmt, n, k), bias), fmt, torch.bfloat16)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("spec", ["int4:g128", "int8:row", "mxfp8_e4m3", "int1:g128", "int3:g64", "codebook4v2:g64"])
def test_every_tile(config: Config, spec: str) -> None:
    fmt = next(f for f in FORMATS if f.spec == spec)
    n, k = 388, 3200
    for m in (5, 130):
        x = inputs(m, k, torch.bfloat16, seed=m)
        y = wgmma.launch(x, weight_on_gpu(fmt, n, k).planes, fmt, n, config=config)
        assert_close(y, expected(x, weight_on_gpu(fmt, n, k)), fmt, torch.bfloat16)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_common_inputs_lose_little(fmt: Format) -> None:
    """Errors of many products average out: what is left is the rounding of the output (55.6 dB) and of the weights."""
    x = torch.randn(128, 2048, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    w = weight_on_gpu(fmt, 256, 2048)
    # The last row of the weight is 50 times the others and would decide alone.
    y, reference = wgmma.launch(x, w.planes, fmt, 256)[:, :-1], expected(x, w)[:, :-1]
    assert sqnr_db(reference, y) > (50 if fmt.kernel_sqnr_db < 46 else 52)


def test_row_does_not_depend_on_its_company_for_one_split() -> None:
    fmt, n, k = FORMATS[0], 256, 1024
    x, w = inputs(256, k, torch.bfloat16), weight_on_gpu(FORMATS[0], 256, 1024)
    whole = wgmma.launch(x, w.planes, fmt, n, config=Config(128, 1, 2))
    for m, config in ((1, Config(16, 1, 2, 2)), (33, Config(64, 1, 2, 2)), (100, Config(128, 2, 2))):
        assert torch.equal(wgmma.launch(x[:m].contiguous(), w.planes, fmt, n, config=config), whole[:m])


def test_bits_repeat() -> None:
    fmt = next(f for f in FORMATS if f.spec == "int4:g128")
    x, w = inputs(100, 4096, torch.bfloat16), weight_on_gpu(fmt, 1024, 4096)
    first = wgmma.launch(x, w.planes, fmt, 1024)
    assert all(torch.equal(wgmma.launch(x, w.planes, fmt, 1024), first) for _ in range(50))
