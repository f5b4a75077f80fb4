"""Every op on every format: the edge matrix against the fp64 definition, views, errors, `opcheck`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import FORMATS, each_format, quantized, same_bits, sqnr_db, weights
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lowbit import QuantizedTensor, ops
from lowbit.formats import Format, parse_format
from lowbit.formats.activation import Activation, parse_activation
from lowbit.kernels.problem import UnsupportedError
from lowbit.kernels.select import KERNELS, select, use_kernel

MS = (0, 1, 2, 7, 16, 17, 33, 128, 1025)
NS = KS = (1, 3, 31, 64, 65, 100, 127, 129, 4097)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What rounding the output alone may leave of a single number is 48.2 dB in bf16 and 66.2 dB in fp16.
FLOOR_DB = {torch.float32: 90.0, torch.float16: 66.0, torch.bfloat16: 48.0}
CPU_KERNELS = [k for k in KERNELS if k.device in (None, "cpu") and not k.by_name_only]
ACTIVATIONS = [
    "float8_e4m3:row", "float8_e4m3:tensor", "float8_e4m3:g128", "float8_e5m2:row", "float8_e4m3:tensor@static",
    "int8:row", "int8:tensor", "int8:row:asym", "int8:tensor@static", "int8:g128", "int4:row",
    "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxfp4:rceil", "mxfp8_e4m3:rceil",
    "nvfp4", "nvfp4@static",
]  # fmt: skip


def exact(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """The definition: fp64 arithmetic on the dequantized operands, not rounded to the input's dtype."""
    with use_kernel("reference"):
        return F.linear(x.float(), w, None if bias is None else bias.float())


def check(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None) -> None:
    """Every kernel that takes the problem agrees with the definition, and one of them is chosen without a name."""
    m = x.numel() // max(x.shape[-1], 1)
    chosen = F.linear(x, w, bias)
    assert chosen.shape == (*x.shape[:-1], w.shape[0])
    assert chosen.dtype == x.dtype
    if m == 0:
        return
    expected = exact(x, w, bias)
    floor = FLOOR_DB[x.dtype]
    problem = ops.problem_of(x, m, w.out_features, w.in_features, w.format.spec, w.act_spec)
    ran = []
    for kernel in CPU_KERNELS:
        if kernel.why_not(problem) is not None:
            continue
        with use_kernel(kernel.name):
            y = F.linear(x, w, bias)
        ran.append(kernel.name)
        assert y.isfinite().all()
        got = sqnr_db(expected, y)
        where = f"{kernel.name} M={m} N={w.out_features} K={w.in_features} {x.dtype}"
        assert got >= floor, f"{where}: {got:.1f} dB, promised {floor}"
        if kernel.name == select(problem).kernel.name:
            assert same_bits(chosen, y)
    assert select(problem).kernel.name in ran


def case(fmt: Format, m: int, n: int, k: int, dtype: torch.dtype, bias: bool, act: str = "") -> None:
    g = torch.Generator().manual_seed(m + n + k)
    w = QuantizedTensor.from_float(weights("normal", n, k, seed=n + k).to(dtype), fmt, parse_activation(act))
    x = torch.randn(m, k, generator=g).to(dtype)
    # A bias of one sign, away from zero: a sum that cancels to nearly nothing says little about a kernel.
    check(x, w, (torch.rand(n, generator=g) + 1).to(dtype) if bias else None)


def covering(index: int) -> list[tuple[int, int, int]]:
    """Nine triples that hold every M, N and K once; the shift differs from format to format, so that the formats
    together cover most pairs. Large sizes meet small ones: the time of a case stays below a tenth of a second."""
    triples = []
    for i, m in enumerate(MS):
        n = NS[(2 * i + index) % 9]
        k = KS[(5 * i + 4 * index + 3) % 9]
        triples.append((m, n, k))
    return [(min(m, 33) if n * k > 1 << 20 else m, n, k) for m, n, k in triples]


@each_format
def test_edge_matrix(fmt: Format) -> None:
    index = FORMATS.index(fmt)
    for i, (m, n, k) in enumerate(covering(index)):
        case(fmt, m, n, k, DTYPES[(i + index) % 3], bias=(i + index) % 2 == 0)


@pytest.mark.parametrize("spec", ["int4:g128", "float8_e4m3:b128x128", "int3:g64"])
def test_every_pair_of_n_and_k(spec: str) -> None:
    for i, (n, k) in enumerate(product(NS, KS)):
        case(parse_format(spec), 2, n, k, DTYPES[i % 3], bias=i % 2 == 0)


@pytest.mark.parametrize(
    "spec", ["int8:row", "int4:g32", "nf4:g64:dq", "mxfp6_e2m3", "codebook4v2:g64", "codebook2v4:g64"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_m(spec: str, dtype: torch.dtype) -> None:
    for i, m in enumerate(MS):
        case(parse_format(spec), m, 64, 128, dtype, bias=i % 2 == 0)
        case(parse_format(spec), m, 33, 95, dtype, bias=i % 2 == 1)


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "offset": lambda x: F.pad(x, (3, 5, 2, 0))[2:, 3:-5],
    "odd storage offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded columns": lambda x: x[:, :1].expand(x.shape),
    "negative view": lambda x: torch.complex(x.float(), -x.float()).conj().imag.to(x.dtype),
    "3-D permuted": lambda x: x.reshape(2, -1, x.shape[1]).transpose(0, 1),
    "4-D": lambda x: x.reshape(2, 1, -1, x.shape[1]).expand(2, 3, x.shape[0] // 2, x.shape[1]),
    "3-D": lambda x: x.reshape(1, -1, x.shape[1]),
    "1-D": lambda x: x[3],
    "1-D strided": lambda x: x.t().contiguous().t()[3],
}


@each_format
def test_views_are_bit_equal_to_contiguous(fmt: Format) -> None:
    dtype = DTYPES[FORMATS.index(fmt) % 3]
    w = quantized(fmt, 40, 96)
    x = torch.randn(8, 96).to(dtype)
    for name, view in VIEWS.items():
        v = view(x)
        # Same bits of the same shape: what differs is only how they lie in memory.
        assert same_bits(F.linear(v, w), F.linear(v.clone(memory_format=torch.contiguous_format), w)), name
    rows = F.linear(x, w)
    assert F.linear(x.view(2, 4, 96), w).flatten(0, 1).equal(rows)


@each_format
def test_weight_views_are_bit_equal(fmt: Format) -> None:
    """A cut along K leaves planes with the old strides; kernels must read them right."""
    tk = fmt.tile[1]
    if tk > 256:
        tk = 0
    w = quantized(fmt, 40, 256)
    part = w[:, tk:] if tk and tk < 256 else w
    for dtype in DTYPES:
        check(torch.randn(3, part.shape[1]).to(dtype), part)


@each_format
def test_large_and_zero_inputs(fmt: Format) -> None:
    w = weights("zeros", 48, 160)
    w[:, 7] *= 1e4
    w = QuantizedTensor.from_float(w, fmt)
    x = torch.randn(5, 160)
    x[1], x[2, 3], x[3, ::9] = 0.0, 1e4, 3e4
    for dtype in (torch.float32, torch.bfloat16):
        check(x.to(dtype), w)
    zero = F.linear(torch.zeros(3, 160), w)
    assert (zero == 0).all()


@each_format
def test_modes_agree(fmt: Format) -> None:
    w, x, bias = quantized(fmt, 33, 65), torch.randn(4, 65), torch.randn(33)
    plain = F.linear(x, w, bias)
    with torch.inference_mode():
        assert same_bits(F.linear(x, w, bias).clone(), plain)
        assert same_bits(F.linear(x, quantized(fmt, 33, 65), bias).clone(), plain)
    with torch.no_grad():
        assert same_bits(F.linear(x.requires_grad_(), w, bias), plain)
    again = F.linear(x, w, bias)
    assert again.requires_grad
    assert same_bits(again.detach(), plain)


@each_format
def test_wrong_calls_are_named(fmt: Format) -> None:
    w = quantized(fmt, 33, 65)
    for x, error, named in (
        (torch.randn(2, 64), ValueError, "K = 65"),
        (torch.randn(()), ValueError, "K = 65"),
        (torch.randn(2, 65).double(), TypeError, "bf16, fp16 or fp32"),
        (torch.ones(2, 65, dtype=torch.int32), TypeError, "bf16, fp16 or fp32"),
        (torch.randn(2, 65, device="meta"), ValueError, "input on meta, weight on cpu"),
    ):
        with pytest.raises(error, match=named) as info:
            F.linear(x, w)
        assert fmt.spec in str(info.value)
    x = torch.randn(2, 65)
    for bias in (torch.zeros(1), torch.zeros(32), torch.zeros(2, 33)):
        with pytest.raises(ValueError, match=r"bias.*33"):
            F.linear(x, w, bias)


def with_static(w: Tensor, fmt: Format, act: Activation | None, x: Tensor) -> QuantizedTensor:
    scale = None
    if act is not None and act.static:
        top = act.format.element.max if hasattr(act.format.element, "max") else 127.5
        scale = (x.float().abs().max() / top / (448 if act.format.spec == "nvfp4" else 1)).view(1, 1)
    return QuantizedTensor.from_float(w, fmt, act, scale)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("weight", ["int8:row", "float8_e4m3:row", "int4:g128", "mxfp4", "nvfp4", "nf4:g64"])
def test_activations(act: str, weight: str) -> None:
    fmt, activation = parse_format(weight), parse_activation(act)
    for i, (m, n, k) in enumerate([(1, 64, 128), (7, 33, 65), (33, 100, 129), (128, 31, 100), (3, 1, 1), (0, 5, 7)]):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(m, k, generator=g)
        if m > 1:
            x[1] = 0
            x[-1, 0] = 1e4 if i % 2 else 60.0
        for dtype in DTYPES:
            xd = x.to(dtype)
            w = with_static(weights("normal", n, k, seed=i), fmt, activation, xd if m else torch.ones(1, 1))
            check(xd, w, torch.randn(n, generator=g).to(dtype) if i % 2 else None)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_operands_are_exact_in_bf16(act: str) -> None:
    """`split` gives the same values as the format's own decoding, times a row scale that was taken out."""
    activation = parse_activation(act)
    x = torch.randn(9, 100) * 3
    x[2] = 0
    scale = with_static(torch.ones(1, 1), parse_format("int8:row"), activation, x).act_scale
    planes = activation.quantize(x, scale)
    operand, row_scale = activation.split(x, scale)
    assert operand.dtype == torch.bfloat16
    if activation.grouped:
        row_scale = row_scale.repeat_interleave(activation.scale_tile[1], dim=1)[:, :100]
    expected = activation.format.dequantize(planes, 9, 100, torch.float32)
    # One rounding apart: two scales and an element are multiplied in another order.
    assert torch.allclose(operand.float() * row_scale, expected, rtol=2**-22, atol=0)
    assert sqnr_db(x, expected) > (10 if activation.format.element.bits < 6 else 20)


def test_nonfinite_activations_stay_nonfinite() -> None:
    """A NaN or Inf in a token must not come out as a number, and must not touch other tokens."""
    for act, weight in product(ACTIVATIONS, ("int4:g32", "float8_e4m3:row")):
        activation = parse_activation(act)
        if activation.static or None in activation.scale_tile[:1] or activation.format.has("outer_scale"):
            continue  # one scale for all tokens: all of them are lost
        w = QuantizedTensor.from_float(weights("normal", 16, 64), parse_format(weight), activation)
        x = torch.randn(3, 64)
        clean = F.linear(x, w)
        for bad in (float("nan"), float("inf")):
            x[1, 5] = bad
            y = F.linear(x, w)
            assert not y[1].isfinite().any(), (act, weight, bad)
            assert same_bits(y[::2], clean[::2])


def test_static_activation_without_its_scale_is_named() -> None:
    w = QuantizedTensor.from_float(torch.randn(4, 8), parse_format("int8:row"), parse_activation("int8:tensor@static"))
    with pytest.raises(ValueError, match="calibrate"):
        F.linear(torch.randn(2, 8), w)


@pytest.mark.parametrize(("act", "named"), [
    ("int8:row@static", "per-tensor"), ("int8:tensor:asym@static", "symmetric"), ("int8:row@dynamic", "'static'"),
    ("mxfp4@static", "per-tensor"), ("float9", "float8_e4m3"),
])  # fmt: skip
def test_bad_activations_are_named(act: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_activation(act)


def test_epilogue_scales_are_applied_in_fp32() -> None:
    """Sums before the scales leave fp16, the result does not: scales come before the cast."""
    x = torch.full((2, 512), 4.0, dtype=torch.float16)
    for spec, act in (
        ("nvfp4", "nvfp4"),
        ("int8:row", "int8:row"),
        ("float8_e4m3:row", "float8_e4m3:row"),
        ("nvfp4", ""),
    ):
        w = QuantizedTensor.from_float(torch.full((8, 512), 0.5), parse_format(spec), parse_activation(act))
        y = F.linear(x, w)
        assert torch.allclose(y.float(), torch.full((2, 8), 1024.0), rtol=0.02)


def test_float8_saturates() -> None:
    """Codes beyond the largest value are the largest value, whatever the cast of this release does."""
    for spec, top in (("float8_e4m3:row", 448.0), ("float8_e5m2:row", 57344.0)):
        fmt = parse_format(spec)
        w = torch.tensor([[465.0, 1e9, -1e9, 500.0, 1e35, 1.0]]) * (top / 448)
        planes = fmt.quantize(w, {"scale": torch.ones(1, 1)})
        assert fmt.dequantize(planes, 1, 6)[0].tolist() == [top, top, -top, top, top, top / 448]


def opcheck(op: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """All of torch's checks; the one of the schema does arithmetic on every input, which float8 has none of."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    float8 = any(isinstance(t, Tensor) and t.itemsize == 1 and t.is_floating_point() for t in tree_leaves(args))
    torch.library.opcheck(op, args, test_utils=tests[1:] if float8 else tests)


OPCHECK = [
    "int8:row",
    "int4:g64:asym",
    "int3:g64",
    "float8_e4m3:b128x128",
    "mxfp4",
    "nvfp4",
    "nf4:g64:dq",
    "codebook4v2:g64",
]


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch 2.14, in opcheck itself
@pytest.mark.parametrize("spec", OPCHECK)
def test_opcheck(spec: str) -> None:
    fmt, n, k = parse_format(spec), 20, 72
    w = quantized(fmt, n, k)
    planes, x = list(w.planes.values()), torch.randn(3, k, requires_grad=True)
    bias = torch.randn(n, requires_grad=True)
    opcheck(ops.linear, (x, planes, bias, None, spec, "", n, k))
    opcheck(ops.linear, (x.detach().view(3, 1, k), planes, None, None, spec, "int8:row", n, k))
    opcheck(ops.linear_dgrad, (torch.randn(3, n), planes, spec, n, k))
    opcheck(ops.embedding, (torch.tensor([[1, 2], [0, 19]]), planes, spec, n, k, torch.bfloat16))
    opcheck(ops.dequantize, (planes, spec, n, k, torch.float32))
    where = (spec, [n, 8, 3, 3], [1, 2], [1, 1], [1, 1], 1)
    image = torch.randn(2, 8, 6, 7, requires_grad=True)
    opcheck(ops.conv2d, (image, planes, bias, *where))
    opcheck(ops.conv2d_dgrad, (torch.randn(2, n, 6, 4), planes, [2, 8, 6, 7], *where))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_opcheck_of_quantize_act(act: str) -> None:
    x = torch.randn(2, 3, 72)
    scale = torch.full((1, 1), 0.01) if act.endswith("@static") else None
    opcheck(ops.quantize_act, (x, scale, act))
    activation = parse_activation(act)
    expected = activation.quantize(x.view(6, 72), scale)
    for got, plane in zip(ops.quantize_act(x, scale, act), expected.values(), strict=True):
        assert same_bits(got, plane)


def test_the_kernel_asked_for_runs_or_is_refused() -> None:
    w = quantized(parse_format("int4:g32"), 8, 32)
    with pytest.raises(UnsupportedError, match="aten_int8_packed: only symmetric int8"), use_kernel("aten_int8_packed"):
        F.linear(torch.randn(2, 32), w)
    with pytest.raises(ValueError, match="torch_blocked"), use_kernel("fastest"):
        pass


@each_format
def test_linear_silu_mul_is_the_linear_layer_and_what_follows(fmt: Format) -> None:
    n, k = 130, 256
    w = quantized(fmt, n, k)
    for m, dtype in ((0, torch.float32), (1, torch.bfloat16), (5, torch.float16)):
        x = weights("normal", m, k, seed=m).to(dtype)
        bias = weights("normal", 1, n)[0].to(dtype) if m else None
        args = (list(w.planes.values()), bias, None, fmt.spec, "", n, k)
        gate, up = ops.linear(x, *args).float().chunk(2, dim=-1)
        assert torch.equal(ops.linear_silu_mul(x, *args), (F.silu(gate) * up).to(dtype))
    torch.library.opcheck(ops.linear_silu_mul, (x, *args), test_utils="test_faketensor")


def test_linear_silu_mul_needs_as_many_gates_as_gated() -> None:
    w = quantized(parse_format("int8:row"), 65, 64)
    with pytest.raises(ValueError, match="65 outputs are no gate and as many others"):
        ops.linear_silu_mul(torch.randn(1, 64), list(w.planes.values()), None, None, "int8:row", "", 65, 64)
