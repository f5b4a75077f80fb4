"""Ops that hand over codes, and the layer that takes them: their definitions, schemas and errors."""

import pytest
import torch
import torch.nn.functional as F
from cases import same_bits, weights

from lowbit import QuantizedTensor, decoder_ops, operand_ops, ops
from lowbit.formats import parse_format
from lowbit.formats.activation import parse_activation
from lowbit.kernels.cpu import packed
from lowbit.kernels.problem import Problem
from lowbit.kernels.select import select, use_kernel

BF16 = torch.bfloat16
SPECS = ("float8_e4m3:row", "int8:row", "int8:row:asym", "float8_e4m3:g128", "mxfp8_e4m3", "nvfp4", "nvfp4@static",
         "int8:tensor@static", "float8_e4m3:tensor")  # fmt: skip
X, Y, W = (weights("normal", rows, 320, seed=i).bfloat16() for i, rows in enumerate((6, 6, 1)))
#: Every op: what it is given, and the same before the quantization.
OPS = {
    "quantized": ((X,), lambda: X),
    "relu_quantized": ((X,), lambda: F.relu(X)),
    "silu_mul_quantized": ((X,), lambda: decoder_ops.silu_mul(X)),
    "rms_norm_quantized": ((X, W[0], 1e-5), lambda: decoder_ops.rms_norm(X, W[0], 1e-5)),
    "add_rms_norm_quantized": ((X, Y, W[0], 1e-5), lambda: decoder_ops.add_rms_norm(X, Y, W[0], 1e-5)[1]),
}


def static_scale(act):
    return torch.full((1, 1), 0.011) if act.static else None


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", OPS)
def test_codes_are_those_of_the_activation(name, spec):
    given, before = OPS[name]
    act = parse_activation(spec)
    expected = act.split(before(), static_scale(act))
    out = getattr(operand_ops, name)(*given, static_scale(act), spec, BF16)
    if name == "add_rms_norm_quantized":
        assert torch.equal(out[0], X + Y)
        out = out[1:]
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])
    if act.format.element.bits == 8 and spec in ("float8_e4m3:row", "int8:row", "int8:tensor@static"):
        codes = getattr(operand_ops, name)(*given, static_scale(act), spec, act.format.planes[0].dtype)[-2]
        assert same_bits(codes, act.quantize(before(), static_scale(act))["qdata"])
        assert torch.equal(codes.to(BF16), out[0])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", OPS)
def test_schemas_and_shapes(name, spec):
    """Any leading shape; what the compiler is told of the results is what they are."""
    given, _ = OPS[name]
    wide = [t.view(2, 3, -1) if isinstance(t, torch.Tensor) and t.dim() == 2 else t for t in given]
    scale = static_scale(parse_activation(spec))
    for args in (given, wide):
        torch.library.opcheck(
            getattr(operand_ops, name), (*args, scale, spec, BF16), test_utils=("test_schema", "test_faketensor")
        )


SCHEMES = (("float8_e4m3:row", "float8_e4m3:row"), ("int8:row", "int8:row"), ("int8:row", "int8:row:asym"),
           ("int4:g32:asym", "int8:row"), ("mxfp4", "mxfp8_e4m3"), ("nvfp4", "nvfp4@static"))  # fmt: skip


@pytest.mark.parametrize(("weight", "spec"), SCHEMES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [1, 6])
def test_a_layer_of_codes_is_the_layer(m, gated, weight, spec):
    """The bits of `linear`, for every kernel that takes an operand."""
    act, fmt, n, k = parse_activation(spec), parse_format(weight), 96, 320
    x, bias, scale = X[:m], torch.linspace(-1, 1, n).bfloat16(), static_scale(act)
    w = QuantizedTensor.from_float(weights("normal", n, k, seed=3), fmt, act, scale)
    planes, problem = list(w.planes.values()), Problem(m, n, k, weight, spec, BF16, "cpu")
    for kernel in dict.fromkeys((select(problem).kernel.name, "torch_blocked")):
        with use_kernel(kernel):
            operand, row_scale = operand_ops.quantized(x, scale, spec, ops.operand_dtype(problem))
            given = (operand, row_scale, planes, bias, weight, spec, n, k, BF16, gated)
            got = ops.linear_of_operand(*given)
            plain = (ops.linear_silu_mul if gated else ops.linear)(x, planes, bias, scale, weight, spec, n, k)
            assert torch.equal(got, plain)
            # test_schema adds numbers up, which torch cannot do with one-byte floats.
            checks = ("test_schema", "test_faketensor") if weight.startswith("int") else ("test_faketensor",)
            torch.library.opcheck(ops.linear_of_operand, given, test_utils=checks)


def test_what_a_layer_wants():
    def wanted(weight, act, m=4, device="cpu", arch=None):
        return ops.operand_dtype(Problem(m, 4096, 4096, weight, act, BF16, device, arch))

    assert wanted("int8:row", "int8:row") == (torch.int8 if packed.multiplies_int8() else BF16)
    assert wanted("int4:g32", "int8:row") == BF16
    assert wanted("int8:row", "") is None
    assert wanted("int8:row", "int8:tensor") is None, "the scale of the whole input comes first"
    assert wanted("float8_e4m3:b128x128", "float8_e4m3:g128") is None, (
        "no kernel multiplies levels with scales beside them"
    )
    for weight in ("float8_e4m3:b128x128", "int4:g128"):
        assert wanted(weight, "float8_e4m3:g128", device="cuda", arch=(9, 0)) == torch.float8_e4m3fn
    assert wanted("int4:g128", "int8:row", m=16, device="cuda", arch=(9, 0)) == torch.int8
    assert wanted("nvfp4", "nvfp4") is None
    assert wanted("int8:row", "int8:row", m=0) is None
    with use_kernel("reference"):
        assert wanted("int8:row", "int8:row") is None


def test_errors_say_what_is_wanted():
    w = QuantizedTensor.from_float(weights("normal", 64, 320), parse_format("int8:row"), parse_activation("int8:row"))
    planes, how = list(w.planes.values()), ("int8:row", "int8:row", 64, 320, BF16, False)
    operand, row_scale = operand_ops.quantized(X, None, "int8:row", torch.int8)
    with use_kernel("torch_blocked"):
        with pytest.raises(ValueError, match=r"takes torch.bfloat16 .*, got torch.int8"):
            ops.linear_of_operand(operand, row_scale, planes, None, *how)
        with pytest.raises(ValueError, match=r"row scales \(6, 1\) or \(1, 1\), .* and \(3, 1\)"):
            ops.linear_of_operand(operand.to(BF16), row_scale[:3], planes, None, *how)
    with pytest.raises(ValueError, match="activation none"):
        ops.linear_of_operand(operand.to(BF16), row_scale, planes, None, "int8:row", "", 64, 320, BF16, False)
    with pytest.raises(ValueError, match=r"levels in bf16 or fp32, or codes in torch.int8; got torch.float16"):
        operand_ops.quantized(X, None, "int8:row", torch.float16)
    with pytest.raises(ValueError, match=r"levels in bf16 or fp32; got torch.uint8"):
        operand_ops.quantized(X, None, "int8:row:asym", torch.uint8)
    with pytest.raises(ValueError, match="empty"):
        operand_ops.quantized(X, None, "", BF16)
    with pytest.raises(ValueError, match="calibrate"):
        operand_ops.quantized(X, None, "int8:tensor@static", BF16)


def test_nothing_comes_of_no_tokens():
    operand, scale = operand_ops.quantized(X[:0], None, "int8:row", BF16)
    assert (operand.shape, scale.shape) == ((0, 320), (0, 1))
    out = ops.linear_of_operand(
        operand, scale, [torch.zeros(64, 320, dtype=torch.int8), torch.ones(64, 1)], None, "int8:row", "int8:row", 64,
        320, BF16, False,
    )  # fmt: skip
    assert (out.shape, out.dtype) == ((0, 64), BF16)
