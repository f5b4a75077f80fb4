"""No path holds a decoded weight: peak memory of prefill and decode, for every registered format."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import each_format

from lowbit import QuantizedTensor
from lowbit.formats import Format
from lowbit.formats.activation import parse_activation

MIB = 1 << 20
# 256 MiB in bf16: four times what a path may take beside weights and activations.
N, K = 16384, 8192


def random_weight(fmt: Format, act: str = "") -> QuantizedTensor:
    """Random codes with scales of one; the values do not matter here."""
    planes = {}
    for p in fmt.planes:
        shape = p.shape_for(N, K)
        if p in fmt.code_planes:
            planes[p.name] = torch.randint(0, 100, shape, dtype=torch.uint8, device="cuda").view(p.dtype)
        else:
            planes[p.name] = torch.ones(shape, dtype=torch.float32, device="cuda").to(p.dtype)
    torch.cuda.empty_cache()
    return QuantizedTensor(planes, fmt, (N, K), torch.bfloat16, parse_activation(act))


@pytest.fixture(scope="module", autouse=True)
def _cublas_workspace() -> None:
    """cuBLAS takes its workspace at the first product of a process, with or without quantized weights."""
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(64, 64, device="cuda", dtype=dtype)
        a @ a


def assert_peak(w: QuantizedTensor, m: int, dtype: torch.dtype, operand_bytes: int = 0) -> None:
    x = torch.randn(m, K, device="cuda").to(dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = F.linear(x, w)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - y.numel() * y.element_size() - m * K * operand_bytes
    assert extra <= 64 * MIB, f"{w.format.spec}, M = {m}: {extra / MIB:.0f} MiB beside weights and activations"


@each_format
@pytest.mark.parametrize("m", [1, 2048])
def test_peak_memory(fmt: Format, m: int) -> None:
    assert_peak(random_weight(fmt), m, torch.bfloat16)


@pytest.mark.parametrize(
    ("weight", "act"),
    [
        ("float8_e4m3:row", "float8_e4m3:row"), ("int8:row", "int8:row"), ("int4:g128", "int8:row"),
        ("float8_e4m3:b128x128", "float8_e4m3:g128"), ("mxfp4", "mxfp8_e4m3"), ("nvfp4", "nvfp4"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("m", [1, 2048])
def test_peak_memory_with_quantized_activations(weight: str, act: str, m: int) -> None:
    from lowbit.formats import parse_format

    assert_peak(random_weight(parse_format(weight), act), m, torch.bfloat16, operand_bytes=2)


def test_the_measure_sees_a_decoded_weight() -> None:
    from lowbit.formats import parse_format
    from lowbit.kernels.select import use_kernel

    w = random_weight(parse_format("int4:g128"))
    with use_kernel("reference"), pytest.raises(AssertionError, match="MiB beside weights"):
        assert_peak(w, 1, torch.bfloat16)
