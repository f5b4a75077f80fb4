"""The CUDA C++ kernel for few tokens: right for every format it takes, and the same bits for every number of tokens."""

from __future__ import annotations

import pytest
import torch
from cases import sqnr_db
from gpu_cases import assert_close, expected, inputs, weight_on_gpu

from lowbit.formats import Format, registered
from lowbit.kernels.cuda import decode, small_m
from lowbit.kernels.problem import Problem

pytestmark = pytest.mark.gpu

FORMATS = [f for f in registered() if not isinstance(decode.constants(f), str)]


def run(fmt: Format, n: int, k: int, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    w = weight_on_gpu(fmt, n, k)
    problem = Problem(x.shape[0], n, k, fmt.spec, "", x.dtype, "cuda", torch.cuda.get_device_capability())
    assert x.shape[0] > 8 or small_m.why_not(problem) is None
    return small_m.small_m(x, w.planes, bias, problem, None)


def test_every_registered_format_has_an_instance() -> None:
    without = {f.spec: decode.constants(f) for f in registered() if f not in FORMATS}
    assert not without


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (100, 1152), (17, 128), (4096, 4096)], ids=str)
def test_matches_fp64(fmt: Format, n: int, k: int) -> None:
    for m in (1, 3, 8, 9, 16) if n < 4096 else (1, 16):
        dtype = torch.float16 if m == 3 else torch.bfloat16
        x = inputs(m, k, dtype, seed=m)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(m)).to(dtype).cuda() if m % 2 else None
        y = run(fmt, n, k, x, bias)
        assert_close(y, expected(x, weight_on_gpu(fmt, n, k), bias), fmt, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_common_inputs_lose_little(fmt: Format, dtype: torch.dtype) -> None:
    """Errors of many products average out: what is left is the rounding of the output (55.6 dB) and of the weights."""
    x = torch.randn(16, 2048, generator=torch.Generator().manual_seed(0)).to(dtype).cuda()
    # The last row of the weight is 50 times the others and would decide alone.
    y, reference = run(fmt, 256, 2048, x)[:, :-1], expected(x, weight_on_gpu(fmt, 256, 2048))[:, :-1]
    least = 66 if dtype == torch.float16 else 50 if fmt.kernel_sqnr_db < 46 else 52
    assert sqnr_db(reference, y) > least


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_row_does_not_depend_on_its_company(fmt: Format) -> None:
    n, k = 96, 640
    x = inputs(16, k, torch.bfloat16)
    whole = run(fmt, n, k, x)
    for m in (1, 8, 9):
        assert torch.equal(run(fmt, n, k, x[:m].contiguous()), whole[:m])


def test_bits_repeat() -> None:
    fmt = FORMATS[0]
    x = inputs(16, 4096, torch.bfloat16)
    first = run(fmt, 4096, 4096, x)
    assert all(torch.equal(run(fmt, 4096, 4096, x), first) for _ in range(50))


@pytest.mark.parametrize("spec", ["int4:g128", "int8:row", "int3:g64", "nf4:g64", "mxfp4", "int4:g64:asym"])
def test_gate_and_up_in_one_kernel(spec: str) -> None:
    """`silu(gate) * up` of the outputs that the kernel gives without it, which are the same bits."""
    fmt = next(f for f in FORMATS if f.spec == spec)
    for n, k, m, cluster in ((64, 256, 1, None), (146, 640, 3, None), (146, 640, 8, 2), (512, 1152, 16, None)):
        x, w = inputs(m, k, torch.bfloat16, seed=m), weight_on_gpu(fmt, n, k)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(m)).cuda() if m % 2 else None
        gate, up = small_m.launch(x, w.planes, fmt, n, bias, cluster=cluster).float().chunk(2, dim=-1)
        y = small_m.launch(x, w.planes, fmt, n, bias, cluster=cluster, gated=True)
        expected_y = torch.nn.functional.silu(gate) * up
        # The exponential of the hardware may round the last bit the other way.
        torch.testing.assert_close(y.float(), expected_y, rtol=2**-7, atol=0)
        assert (y == expected_y.bfloat16()).float().mean() > 0.98
