"""Linear layers of every registered format on the GPU against fp64, at sizes that fit no tile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import each_format
from gpu_cases import assert_close, expected, inputs, weight_on_gpu

from lowbit import QuantizedTensor
from lowbit.formats import Format, parse_format
from lowbit.formats.activation import parse_activation
from lowbit.kernels.problem import Problem
from lowbit.kernels.select import KERNELS, use_kernel
from lowbit.kernels.triton import dequant, weight_only
from lowbit.kernels.triton.weight_only import Config

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# M, N, K, dtype, bias: every M, and every odd size of N and K, at least once.
SHAPES = [
    (1, 512, 1024, BF16, False), (2, 127, 129, FP16, True), (7, 31, 65, FP32, True), (16, 100, 4097, BF16, True),
    (17, 129, 127, BF16, False), (33, 65, 1, BF16, True), (128, 64, 3, FP16, False), (129, 127, 100, BF16, True),
    (1025, 3, 31, FP32, False), (1, 1, 64, BF16, True), (128, 4097, 64, BF16, False), (64, 256, 512, FP16, True),
    (300, 129, 257, FP16, True),
]  # fmt: skip


@each_format
@pytest.mark.parametrize(("m", "n", "k", "dtype", "with_bias"), SHAPES, ids=lambda v: str(v).removeprefix("torch."))
def test_linear_is_right(fmt: Format, m: int, n: int, k: int, dtype: torch.dtype, with_bias: bool) -> None:
    w, x = weight_on_gpu(fmt, n, k), inputs(m, k, dtype)
    bias = torch.linspace(-1, 1, n, dtype=dtype, device="cuda") if with_bias else None
    reference = expected(x, w, bias)
    assert_close(F.linear(x, w, bias), reference, fmt, dtype)
    # The portable kernels too, where a faster one is chosen.
    problem = Problem(m, n, k, fmt.spec, "", dtype, "cuda", torch.cuda.get_device_capability())
    for kernel in (k for k in KERNELS if k.name.startswith("triton_") and k.why_not(problem) is None):
        with use_kernel(kernel.name):
            assert_close(F.linear(x, w, bias), reference, fmt, dtype)


@each_format
def test_identity_activations_give_the_decoded_weights(fmt: Format) -> None:
    """fp32 holds every level and scale, so the product with the identity is the weight, to the bit.

    A factor of the whole tensor is multiplied last, which rounds in another order: one unit in the last place.
    """
    n, k = 100, 128
    w = weight_on_gpu(fmt, n, k)
    dense = w.dequantize(FP32)
    last = weight_only.constants(fmt, 64)["OUTER_LAST"]
    x = torch.eye(k, device="cuda")
    decoded = weight_only.matmul(x, w.planes, fmt, n, None, FP32).t()
    tolerance = 2.0**-23 if last else 0.0
    assert bool(((decoded - dense).abs() <= tolerance * dense.abs()).all())
    with use_kernel("triton_chunked"):
        assert torch.equal(F.linear(x, w).t(), dense)


@each_format
def test_dequantize_kernel_equals_the_definition(fmt: Format) -> None:
    n, k = 131, 333
    w = weight_on_gpu(fmt, n, k)
    for dtype in (FP32, BF16, FP16):
        whole = fmt.dequantize(w.planes, n, k, dtype)
        out = torch.full((n, k), 7.0, dtype=dtype, device="cuda")
        assert torch.equal(dequant.dequantize_into(out, w.planes, fmt, k, (0, n), (0, k)), whole)
        part = torch.full((70, 141), 7.0, dtype=dtype, device="cuda")
        dequant.dequantize_into(part, w.planes, fmt, k, (61, 131), (192, 333))
        assert torch.equal(part, whole[61:, 192:])


@each_format
def test_split_along_k_is_right_and_repeatable(fmt: Format) -> None:
    n, k = 96, 2048
    w, x = weight_on_gpu(fmt, n, k), inputs(5, k, BF16)
    first = weight_only.matmul(x, w.planes, fmt, n, None, BF16)
    assert_close(first, expected(x, w), fmt, BF16)
    for _ in range(5):
        assert torch.equal(weight_only.matmul(x, w.planes, fmt, n, None, BF16), first)


@pytest.mark.parametrize("spec", ["int4:g128", "mxfp4", "nf4:g64:dq", "int8:row"])
def test_every_tile_size(spec: str) -> None:
    fmt, n, k, m = parse_format(spec), 200, 640, 70
    w, x = weight_on_gpu(fmt, n, k), inputs(m, k, BF16)
    for config in (
        Config(16, 64, 64, 4, 2), Config(32, 128, 64, 4, 3), Config(64, 64, 32, 4, 4, 3), Config(128, 128, 32, 8, 2),
    ):  # fmt: skip
        y = weight_only.matmul(x, w.planes, fmt, n, None, BF16, config=config)
        assert_close(y, expected(x, w), fmt, BF16)


@pytest.mark.parametrize("spec", ["int4:g64:asym", "mxfp6_e2m3", "nvfp4", "codebook4v2:g64", "float8_e5m2:row"])
@pytest.mark.parametrize("m", [6, 150])
def test_inputs_of_every_layout(spec: str, m: int) -> None:
    fmt, n, k = parse_format(spec), 65, 192
    w, base = weight_on_gpu(fmt, n, k), inputs(m, k, BF16)
    wide = inputs(m, 2 * k + 3, BF16)
    cases = {
        "3-D": base.view(2, m // 2, k), "4-D": base.view(1, 2, m // 2, k), "1-D": base[0],
        "columns of a wider one": wide[:, 3 : 3 + k], "transposed": base.t().contiguous().t(),
        "expanded": base[:1].expand(m, k), "every second": wide[:, : 2 * k : 2],
        "offset": wide.flatten()[1 : 1 + m * k].view(m, k), "no tokens": base[:0],
    }  # fmt: skip
    for name, x in cases.items():
        y = F.linear(x, w)
        assert y.shape == (*x.shape[:-1], n), name
        if x.numel():
            assert_close(y, expected(x, w), fmt, BF16)


@pytest.mark.parametrize("spec", ["int4:g128", "float8_e4m3:b128x128", "nf4:g64", "mxfp4", "int6:g64:asym"])
def test_weights_cut_on_tile_boundaries(spec: str) -> None:
    """Planes of a slice have strides and offsets; kernels read them in place."""
    fmt = parse_format(spec)
    w = weight_on_gpu(fmt, 384, 512)
    for part in (w[128:], w[:, 128:], w[128:256, 256:384]):
        assert isinstance(part, QuantizedTensor)
        for m in (3, 200):
            x = inputs(m, part.shape[1], BF16)
            assert_close(F.linear(x, part), expected(x, part), fmt, BF16)


@pytest.mark.parametrize("spec", ["int4:g128", "int8:row", "mxfp4", "nf4:g64:dq", "codebook4v2:g64"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_gradient_of_the_input(spec: str, dtype: torch.dtype) -> None:
    fmt, n, k = parse_format(spec), 129, 200
    w, x = weight_on_gpu(fmt, n, k), inputs(9, k, dtype).requires_grad_()
    grad = inputs(9, n, dtype, seed=1)
    F.linear(x, w).backward(grad)
    assert x.grad is not None
    assert_close(x.grad, grad.double() @ fmt.dequantize(w.planes, n, k).double(), fmt, dtype)
    got = dequant.dgrad(grad, w.planes, fmt, n, k)
    assert_close(got, grad.double() @ fmt.dequantize(w.planes, n, k).double(), fmt, dtype)


@pytest.mark.parametrize("act", ["", "int8:row", "float8_e4m3:row"])
@pytest.mark.parametrize("m", [3, 40, 200])
def test_biases_of_other_layouts(act: str, m: int) -> None:
    """Every second element of a longer bias, and a bias in fp32 beside bf16 activations."""
    fmt, n, k = parse_format(act or "int4:g128"), 64, 256
    w, x = weight_on_gpu(fmt, n, k, parse_activation(act)), inputs(m, k, BF16)
    wide = torch.linspace(-1, 1, 2 * n, device="cuda")
    for bias in (wide[::2].bfloat16(), wide.bfloat16()[::2], wide[::2]):
        assert_close(F.linear(x, w, bias), expected(x, w, bias), fmt, BF16)


def test_many_tokens() -> None:
    """More tokens than a grid's second axis may count."""
    fmt, n, k, m = parse_format("int4:g32"), 33, 64, 70_000
    w, x = weight_on_gpu(fmt, n, k), inputs(m, k, BF16)
    y = weight_only.matmul(x, w.planes, fmt, n, None, BF16)
    assert_close(y, expected(x, w), fmt, BF16)
    assert_close(F.linear(x, w), expected(x, w), fmt, BF16)


def test_offsets_beyond_int32() -> None:
    """An output of more than 2**31 elements, written by the last tokens too."""
    fmt, n, k, m = parse_format("int4:g32"), 65_536, 32, 32_800
    w = weight_on_gpu(fmt, n, k)
    x = inputs(m, k, BF16)
    y = weight_only.matmul(x, w.planes, fmt, n, None, BF16)
    assert_close(y[-8:], expected(x[-8:], w), fmt, BF16)
    assert_close(y[:8], expected(x[:8], w), fmt, BF16)
