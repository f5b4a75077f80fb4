"""Quantized activations on the GPU: codes to the bit, and products against the fp64 product of rounded operands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import KINDS, same_bits, weights
from gpu_cases import assert_close, expected, inputs, weight_on_gpu

from lowbit.formats import parse_format
from lowbit.formats.activation import Activation, parse_activation
from lowbit.kernels.problem import Problem
from lowbit.kernels.select import select
from lowbit.kernels.triton import act_quant

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ACTIVATIONS = (
    "float8_e4m3:row", "float8_e4m3:tensor", "float8_e4m3:tensor@static", "float8_e5m2:row", "float8_e4m3:g128",
    "int8:row", "int8:tensor", "int8:tensor@static", "int8:row:asym", "int8:g32", "int4:row", "int6:g64:fp16",
    "mxfp8_e4m3", "mxfp8_e5m2:rceil", "mxfp6_e2m3", "mxfp6_e3m2:rceil", "mxfp4", "mxfp4:rceil", "nvfp4", "nvfp4@static",
)  # fmt: skip
each_activation = pytest.mark.parametrize("spec", ACTIVATIONS)


def activation(spec: str) -> Activation:
    act = parse_activation(spec)
    assert act is not None
    return act


@each_activation
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_operands_and_scales_equal_the_definition(spec: str, dtype: torch.dtype) -> None:
    """The fused kernel, the torch operations on the GPU and those on the CPU: the same bits."""
    act = activation(spec)
    for kind in (*KINDS, "outliers 1e4"):
        for m, k in ((1, 4097), (33, 300), (7, 1)):
            x = weights("normal" if kind == "outliers 1e4" else kind, m, k).to(dtype)
            if kind == "outliers 1e4":
                x[:, :: max(1, k // 3)] *= 1e4
            static = torch.full((1, 1), 0.0021) if act.static else None
            operand, scale = act.split(x, static)
            on_gpu = None if static is None else static.cuda()
            for got in (act_quant.quantize(x.cuda(), act, on_gpu, BF16), act.split(x.cuda(), on_gpu)):
                assert got is not None
                assert torch.equal(got[0].cpu(), operand), f"{kind} {m}x{k}"
                assert torch.equal(got[1].float().cpu(), scale.float()), f"{kind} {m}x{k}"


@pytest.mark.parametrize(
    "spec", ["float8_e4m3:row", "float8_e5m2:row", "float8_e4m3:tensor", "int8:row", "int8:tensor"]
)
def test_codes_equal_the_definition(spec: str) -> None:
    act = activation(spec)
    x = weights("student_t", 33, 1000).bfloat16()
    planes = act.quantize(x)
    codes, scale = act_quant.codes(x.cuda(), act, None)
    assert same_bits(codes.cpu(), planes["qdata"])
    assert torch.equal(scale.cpu(), planes["scale"].float())


@each_activation
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_inputs_do_not_become_numbers(spec: str, value: float) -> None:
    act = activation(spec)
    if act.static:
        pytest.skip("a calibrated scale saturates what it did not see")
    w = weight_on_gpu(parse_format("int8:row"), 64, 256, act)
    x = inputs(5, 256, BF16)
    x[1, 3] = value
    y = F.linear(x, w)
    assert bool(y[1].isnan().all())
    if act.scale_tile[0] == 1 and act.format.spec != "nvfp4":
        assert bool(y[0].isfinite().all())


PAIRS = [
    ("float8_e4m3:row", "float8_e4m3:row"), ("float8_e4m3:tensor", "float8_e4m3:tensor"),
    ("float8_e4m3:tensor", "float8_e4m3:row"), ("float8_e4m3:row", "float8_e4m3:tensor@static"),
    ("float8_e5m2:row", "float8_e5m2:row"), ("int8:row", "int8:row"), ("int8:tensor", "int8:tensor"),
    ("int8:row", "int8:row:asym"), ("int8:row", "int8:tensor@static"), ("int8:row:asym", "int8:row"),
    ("int4:g128", "int8:row"), ("int4:g64:asym", "float8_e4m3:row"), ("float8_e4m3:b128x128", "float8_e4m3:g128"),
    ("int4:g32", "int8:g32"), ("mxfp4", "float8_e4m3:g128"), ("mxfp8_e4m3", "mxfp8_e4m3"), ("mxfp4", "mxfp4"),
    ("mxfp4", "mxfp8_e4m3:rceil"), ("nvfp4", "nvfp4"), ("nvfp4", "nvfp4@static"), ("nf4:g64", "int8:row"),
    ("int8:row", "int8:g48"), ("int4:g128", "float8_e4m3:row"), ("int4:row", "float8_e4m3:tensor"),
    ("int4:g32", "float8_e4m3:row"), ("int4:g64", "float8_e4m3:tensor@static"), ("mxfp4", "float8_e4m3:row"),
]  # fmt: skip
SHAPES = [
    (1, 512, 1024, BF16, False), (16, 128, 256, FP16, True), (7, 31, 65, BF16, True), (33, 100, 129, FP32, True),
    (129, 64, 4096, BF16, True), (1025, 127, 100, FP16, False), (130, 256, 512, FP16, True),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "spec"), PAIRS)
@pytest.mark.parametrize(("m", "n", "k", "dtype", "with_bias"), SHAPES, ids=lambda v: str(v).removeprefix("torch."))
def test_linear_is_right(weight: str, spec: str, m: int, n: int, k: int, dtype: torch.dtype, with_bias: bool) -> None:
    act, fmt = activation(spec), parse_format(weight)
    w, x = weight_on_gpu(fmt, n, k, act, act.static), inputs(m, k, dtype)
    bias = torch.linspace(-1, 1, n, dtype=dtype, device="cuda") if with_bias else None
    y = F.linear(x, w, bias)
    # Operands are bf16 also where the output is fp32: its own limit does not apply.
    assert y.dtype == dtype
    assert_close(y.to(BF16 if dtype == FP32 else dtype), expected(x, w, bias), fmt, BF16 if dtype == FP32 else dtype)


@pytest.mark.parametrize("weight", ["float8_e4m3:row", "int8:row"])
def test_weights_cut_anywhere(weight: str) -> None:
    """Columns that start at no multiple of 16 bytes."""
    w = weight_on_gpu(parse_format(weight), 64, 256, activation(weight))[:, 9:185]
    x = inputs(20, 176, BF16)
    assert_close(F.linear(x, w), expected(x, w), w.format, BF16)


@pytest.mark.parametrize("spec", ["float8_e4m3:row", "float8_e5m2:row", "int8:row"])
def test_8bit_pairs_use_matrix_units(spec: str) -> None:
    arch = torch.cuda.get_device_capability()
    assert "scaled_mm" in select(Problem(16, 256, 512, spec, spec, BF16, "cuda", arch)).kernel.name
