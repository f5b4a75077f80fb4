"""Activations quantized in CUDA C++ (`act_quant.cu`): the definition's codes and scales to the bit, by that kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from cases import KINDS, same_bits, weights
from torch import Tensor

import lowbit
from lowbit import operand_ops
from lowbit.formats.activation import Activation, parse_activation
from lowbit.kernels.cuda import act_quant, loader
from lowbit.kernels.triton import act_quant as either
from lowbit.kernels.triton import row_quant
from lowbit.kernels.triton.act_rules import rule_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SPECS = (
    "float8_e4m3:row", "float8_e5m2:row", "int8:row", "int8:row:asym", "int4:row", "int8:row:fp16", "float8_e4m3:g128",
    "int8:g32", "int8:g256", "int6:g64:fp16", "float8_e4m3:tensor@static", "int8:tensor@static", "float8_e4m3:tensor",
)  # fmt: skip
each_spec = pytest.mark.parametrize("spec", SPECS)
SHAPES = [(m, k) for k in (128, 1000, 4096) for m in (1, 3, 16, 17, 33, 34, 128, 513)] + [
    (m, 14336) for m in (1, 16, 17, 128, 513)
] + [(1, 8), (5, 264), (2, 40000), (1, 65536), (9, 28672), (3000, 2048)]  # fmt: skip


@pytest.fixture(autouse=True)
def _runs_here() -> None:
    if (reason := loader.missing()) is not None:
        pytest.skip(reason)
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("converts float8 from compute capability 8.9")


def activation(spec: str) -> Activation:
    act = parse_activation(spec)
    assert act is not None
    return act


def operands(act: Activation) -> list[torch.dtype]:
    """What it may become: levels, and codes where there are any."""
    has_codes = act.format.element.bits == 8 and not act.format.has("zero_point")
    return [BF16] + [act.format.planes[0].dtype] * has_codes


def static_scale(act: Activation) -> Tensor | None:
    return torch.full((1, 1), 0.0021, device="cuda") if act.static else None


def numbers(kind: str, m: int, k: int, dtype: torch.dtype) -> Tensor:
    """On the GPU; beside the usual kinds, those that reach the ends of the dtype, and zeros with both signs."""
    x = weights(kind if kind in KINDS else "normal", m, k, seed=m + k)
    if kind == "outliers":
        x[:, :: max(1, k // 3)] *= 1e4
    elif kind == "huge":
        x = (x * (5e39 if dtype == BF16 else 3e6)).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    elif kind == "tiny":
        x = x * (2.0**-126 if dtype == BF16 else 2.0**-18)
    elif kind == "signed zeros":
        x[::2] *= 0
    return x.to(dtype).cuda()


def assert_is_the_definition(x: Tensor, act: Activation, note: str = "") -> None:
    """Levels, codes and scales of this kernel; torch quantizes small inputs on the CPU, large ones on the GPU."""
    scale = static_scale(act)
    small = x.numel() < 1 << 19
    on, given = (x.cpu(), None if scale is None else scale.cpu()) if small else (x, scale)
    levels, scales = act.split(on, given)
    codes = act.quantize(on, given)["qdata"] if len(operands(act)) > 1 else levels
    for operand in operands(act):
        has_one = act.static or act.scale_tile[0] is None
        assert act_quant.plan(act, has_one, operand, *x.shape, x.dtype, x.device) is not None
        found = either.quantize(x, act, scale, operand)
        assert found is not None
        if operand == BF16:
            assert torch.equal(found[0].to(on.device), levels), f"levels {note}"
        else:
            assert same_bits(found[0].to(on.device), codes), f"codes {note}"
        assert torch.equal(found[1].to(on.device), scales.float()), f"scales {note}"


@each_spec
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_shape(spec: str, dtype: torch.dtype) -> None:
    act = activation(spec)
    for m, k in SHAPES:
        x = numbers("normal", m, k, dtype)
        if m > 2:
            x[1] = 0
        assert_is_the_definition(x, act, f"{m} x {k}")


@each_spec
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_kind_of_numbers(spec: str, dtype: torch.dtype) -> None:
    act = activation(spec)
    for kind in (*KINDS, "outliers", "huge", "tiny", "signed zeros"):
        for m, k in ((1, 4096), (5, 264), (40, 1000), (150, 8192)):
            assert_is_the_definition(numbers(kind, m, k, dtype), act, f"{kind} {m} x {k}")


@each_spec
def test_every_number_of_a_dtype(spec: str) -> None:
    """All finite numbers, divided by scales that make codes meet their ties."""
    act = activation(spec)
    for dtype in (BF16, FP16):
        bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        finite = torch.where(bits.isfinite(), bits, torch.zeros_like(bits))
        rows = finite.view(64, 1024).cuda()
        assert_is_the_definition(rows, act, f"{dtype}")
        assert_is_the_definition(rows.view(-1)[torch.randperm(1 << 16, device="cuda")].view(64, 1024), act, f"{dtype}")
        # Multiples of a power of two beside the largest magnitude.
        steps = (torch.arange(1024).float() / 1024 * 448 * 0.37).to(dtype).expand(4, -1).contiguous().cuda()
        assert_is_the_definition(steps, act, f"{dtype} steps")


@each_spec
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_triton_gives_the_same_bits(spec: str, dtype: torch.dtype) -> None:
    act = activation(spec)
    if not act.static and act.scale_tile[0] is None:
        pytest.skip("its scale comes from Triton in any case")
    x, scale = numbers("student_t", 70, 4096, dtype), static_scale(act)
    rule = rule_of(act.format)
    assert rule is not None
    for operand in operands(act):
        found = either.quantize(x, act, scale, operand)
        assert found is not None
        _, *other = row_quant.launch(row_quant.Source("plain", x), rule, scale, operand, False)
        assert all(same_bits(a, b) for a, b in zip(found, other, strict=True))


@each_spec
def test_what_it_does_not_take_comes_out_the_same(spec: str) -> None:
    """K in no pieces of 8, addresses at no multiple of 16, fp32."""
    act = activation(spec)
    aligned = weights("normal", 6, 1001).to(BF16).cuda()
    badly = torch.empty(6 * 256 + 1, dtype=BF16, device="cuda")[1:].view(6, 256).copy_(aligned[:, :256])
    for x in (aligned, badly, weights("normal", 3, 512).cuda()):
        scale = static_scale(act)
        found, (levels, scales) = either.quantize(x, act, scale, BF16), act.split(x.cpu(), on_cpu(scale))
        assert found is not None
        assert torch.equal(found[0].cpu(), levels)
        assert torch.equal(found[1].cpu(), scales.float())


def on_cpu(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.cpu()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@each_spec
def test_bad_inputs_do_not_become_numbers(spec: str, value: float) -> None:
    """Levels of what shares a scale with them; and nothing else is touched."""
    act = activation(spec)
    if act.static:
        pytest.skip("a calibrated scale saturates what it did not see")
    x = weights("normal", 3, 4096).to(BF16).cuda()
    good, good_scales = act.split(x, None)
    x[1, 7] = value
    found = either.quantize(x, act, None, BF16)
    assert found is not None
    operand, scales = found
    group = act.scale_tile[1] or 4096
    sums = (operand.float().view(3, -1, group) * scales.view(-1, 4096 // group, 1)).sum(2)
    assert bool(sums[1, 0].isnan())
    if act.scale_tile[0] == 1:
        assert torch.equal(operand[::2], good[::2])
        assert torch.equal(scales[::2], good_scales[::2].float())
        assert torch.equal(operand[1, group:], good[1, group:])


def test_a_static_scale_saturates() -> None:
    x = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1e38, -1e38, 0.0, -0.0, 1.0]], dtype=BF16)
    for spec in ("float8_e4m3:tensor@static", "int8:tensor@static"):
        act = activation(spec)
        scale = torch.full((1, 1), 2.0**-100)
        found = either.quantize(x.cuda(), act, scale.cuda(), act.format.planes[0].dtype)
        assert found is not None
        expected = act.quantize(x, scale)["qdata"].float()
        assert torch.equal(found[0].float().cpu().nan_to_num(7), expected.nan_to_num(7))


@each_spec
def test_inside_a_graph(spec: str) -> None:
    """Started before the kernel ahead has ended: the same bits, a hundred times."""
    act = activation(spec)
    scale, shape = static_scale(act), (4, 4096)
    inputs = [weights("normal", *shape, seed=i).to(BF16).cuda() for i in range(4)]
    x = torch.empty_like(inputs[0])
    for operand in operands(act):
        expected = [either.quantize(given, act, scale, operand) for given in inputs]
        graph = torch.cuda.CUDAGraph()
        source, found = torch.zeros_like(x), []
        with torch.cuda.graph(graph):
            for _ in range(3):
                torch.mul(source, 1, out=x)
                found += [either.quantize(x, act, scale, operand) for _ in range(2)]
                x.fill_(float("nan"))
        for i in range(100):
            source.copy_(inputs[i % 4])
            graph.replay()
            for got in found:
                assert all(same_bits(a, b) for a, b in zip(got, expected[i % 4], strict=True))


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loader, "_load", functools.cache(loader.CudaKernel))
    act_quant._plan.cache_clear()
    yield
    act_quant._plan.cache_clear()


@pytest.mark.usefixtures("nothing_loaded")
def test_a_capture_names_the_warmup() -> None:
    x = weights("normal", 2, 512).to(BF16).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        with pytest.raises(lowbit.UnsupportedError, match=r"call lowbit\.warmup"):
            operand_ops.quantized(x, None, "float8_e4m3:row", torch.float8_e4m3fn)
    graph.replay()
    assert torch.equal(y, x + 1)
    act_quant._plan.cache_clear()
    assert operand_ops.quantized(x, None, "float8_e4m3:row", torch.float8_e4m3fn)[0].shape == (2, 512)


def test_streams_and_threads_do_not_mix() -> None:
    """Launches from many streams at once, each with its own input."""
    act = activation("float8_e4m3:row")
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [weights("normal", 64, 4096, seed=i).to(BF16).cuda() for i in range(4)]
    expected = [act.quantize(x)["qdata"] for x in inputs]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(either.codes(x, act, None)[0])
    torch.cuda.synchronize()
    for i, codes in enumerate(found):
        assert same_bits(codes, expected[i % 4])
