"""One kernel for what stands before a layer and the quantization of its input: codes to the bit, layers to the bit."""

from __future__ import annotations

import pytest
import torch
from cases import weights

from lowbit import QuantizedTensor, decoder_ops, operand_ops, ops
from lowbit.formats import parse_format
from lowbit.formats.activation import Activation, parse_activation
from lowbit.kernels.problem import Problem, early_launches
from lowbit.kernels.select import select
from lowbit.kernels.triton import row_quant
from lowbit.kernels.triton.act_rules import rule_of
from lowbit.models import Session, inference, random_model, shape_of
from lowbit.specs import parse_config

BF16 = torch.bfloat16
SPECS = ("float8_e4m3:row", "int8:row", "int8:row:asym", "float8_e4m3:g128", "mxfp8_e4m3", "mxfp4", "nvfp4@static",
         "int8:tensor@static")  # fmt: skip
SHAPES = [(1, 4096), (1, 14336), (16, 4096), (7, 1001), (300, 2048), (2, 53248)]


def activation(spec: str) -> Activation:
    act = parse_activation(spec)
    assert act is not None
    return act


def static_scale(act: Activation) -> torch.Tensor | None:
    return torch.full((1, 1), 0.0117, device="cuda") if act.static else None


def on_cpu(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.cpu()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_operands_are_those_of_what_stands_before(m: int, k: int, spec: str, dtype: torch.dtype) -> None:
    """The kernel before it, then the definition on the CPU: the same codes and scales."""
    act = activation(spec)
    scale = static_scale(act)
    for kind in ("student_t", "zeros"):
        x, wide = weights(kind, m, k).to(dtype).cuda(), weights(kind, m, 2 * k).to(dtype).cuda()
        for name, given, before in (
            ("quantized", x, x), ("relu_quantized", x, x.relu()),
            ("silu_mul_quantized", wide, decoder_ops.silu_mul(wide)),
        ):  # fmt: skip
            operand, scales = act.split(before.cpu(), on_cpu(scale))
            got = getattr(operand_ops, name)(given, scale, spec, BF16)
            assert torch.equal(got[0].cpu(), operand), f"{name} {kind}"
            assert torch.equal(got[1].cpu(), scales), f"{name} {kind}"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("m", "k"), [(1, 4096), (16, 4096), (1, 3000), (200, 2048), (1, 16384)])
def test_norms_of_exact_sums(m: int, k: int, spec: str) -> None:
    """Squares whose sum is exact in any order: then the codes are those of the definition on the CPU."""
    act = activation(spec)
    scale = static_scale(act)
    x, y = (torch.randint(-8, 9, (m, k), generator=torch.Generator().manual_seed(i)).to(BF16) for i in (0, 1))
    w = weights("normal", 1, k, seed=2)[0].to(BF16)
    expected = operand_ops.add_rms_norm_quantized(x, y, w, 1e-5, on_cpu(scale), spec, BF16)
    got = operand_ops.add_rms_norm_quantized(x.cuda(), y.cuda(), w.cuda(), 1e-5, scale, spec, BF16)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu(), b)
    expected = operand_ops.rms_norm_quantized(x, w, 1e-5, on_cpu(scale), spec, BF16)
    got = operand_ops.rms_norm_quantized(x.cuda(), w.cuda(), 1e-5, scale, spec, BF16)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("spec", ["float8_e4m3:row", "int8:row"])
def test_norms_of_any_numbers(spec: str) -> None:
    """Sums in another order may move a number by its last bit, and a code to its neighbour: few of them."""
    x, w = weights("student_t", 64, 4096).to(BF16).cuda(), weights("normal", 1, 4096, seed=2)[0].to(BF16).cuda()
    code = activation(spec).format.planes[0].dtype
    expected = activation(spec).quantize(decoder_ops.rms_norm(x, w, 1e-5))["qdata"].view(torch.uint8)
    got = operand_ops.rms_norm_quantized(x, w, 1e-5, None, spec, code)[0].view(torch.uint8)
    assert float((got != expected).float().mean()) < 1e-3


@pytest.mark.parametrize("spec", ["float8_e4m3:row", "int8:row:asym", "mxfp8_e4m3"])
def test_shared_rows_give_the_same_bits(spec: str) -> None:
    """With sums that are exact in any order; others may differ in the last bit from one division to another."""
    act = activation(spec)
    rule = rule_of(act.format)
    assert rule is not None
    x, y = (torch.randint(-8, 9, (3, 5000), generator=torch.Generator().manual_seed(i)).to(BF16).cuda() for i in (0, 1))
    w = weights("normal", 1, 5000, seed=2)[0].to(BF16).cuda()
    source = row_quant.Source("add_rms_norm", x, y, w, 1e-5)
    whole = row_quant.launch(source, rule, None, BF16, rule.scaling == "mx", 8192)
    for part in (1024, 2048, 4096):
        shared = row_quant.launch(source, rule, None, BF16, rule.scaling == "mx", part)
        assert all(torch.equal(got, expected) for got, expected in zip(shared, whole, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["quantized", "relu_quantized", "silu_mul_quantized", "rms_norm_quantized"])
@pytest.mark.parametrize("spec", ["float8_e4m3:row", "int8:row", "int8:row:asym", "mxfp8_e4m3"])
def test_bad_inputs_do_not_become_numbers(name: str, spec: str, value: float) -> None:
    x = weights("normal", 3, 4096).to(BF16).cuda()
    x[1, 7] = value
    norm = (torch.ones(4096, dtype=BF16, device="cuda"), 1e-5) if "norm" in name else ()
    operand, scale = getattr(operand_ops, name)(x, *norm, None, spec, BF16)
    y = (operand.float() * scale).sum(1)
    assert not bool(y[1].isfinite())
    assert bool(y[0].isfinite() & y[2].isfinite())


@pytest.mark.parametrize(
    ("weight", "spec"),
    [("float8_e4m3:row", "float8_e4m3:row"), ("int8:row", "int8:row"), ("int8:row", "int8:row:asym"),
     ("int4:g32:asym", "int8:row"), ("mxfp4", "mxfp8_e4m3"), ("nvfp4", "nvfp4@static"),
     ("float8_e4m3:b128x128", "float8_e4m3:g128"), ("int4:g128", "float8_e4m3:row")],
)  # fmt: skip
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [1, 8, 16, 100, 1025, 5000])
def test_a_layer_of_codes_is_the_layer(m: int, gated: bool, weight: str, spec: str) -> None:
    act, fmt, n, k = activation(spec), parse_format(weight), 512, 1024
    x, scale = weights("normal", m, k).to(BF16).cuda(), static_scale(act)
    w = QuantizedTensor.from_float(weights("normal", n, k, seed=3).to(BF16).cuda(), fmt, act, scale)
    planes = list(w.planes.values())
    problem = Problem(m, n, k, weight, spec, BF16, "cuda", torch.cuda.get_device_capability())
    dtype = ops.operand_dtype(problem)
    assert dtype is not None, select(problem).kernel.name
    operand, row_scale = operand_ops.quantized(x, scale, spec, dtype)
    got = ops.linear_of_operand(operand, row_scale, planes, None, weight, spec, n, k, BF16, gated)
    plain = (ops.linear_silu_mul if gated else ops.linear)(x, planes, None, scale, weight, spec, n, k)
    assert torch.equal(got, plain)


@pytest.mark.parametrize(
    "spec", ["float8dq-row", "float8dq-block", "int8dq", "int8dq-asym", "int8dq-int4-32-sym", "mxfp8dq"]
)
def test_a_graph_with_codes_says_what_eager_steps_say(spec: str) -> None:
    """Started early, too; and the logits of layers that quantize for themselves, up to a code's neighbour."""
    model = random_model(shape_of("tiny"), parse_config(spec).scheme, "cuda").model
    ids = torch.randint(512, (1, 24), generator=torch.Generator().manual_seed(0)).cuda()
    graph, eager = Session(model, 1, 128), Session(model, 1, 128, graph=False)
    assert torch.equal(graph.prefill(ids), eager.prefill(ids))
    for _ in range(40):
        assert torch.equal(graph.step(), eager.step())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_wanted", lambda readers, x: None)
        apart = Session(model, 1, 128, graph=False)
        a, b = apart.prefill(ids).double(), eager.prefill(ids).double()
    assert float((a - b).norm() / a.norm()) < 0.02


def test_started_early_they_give_the_same_bits() -> None:
    """A chain of norms and layers inside a graph, a hundred times."""
    w = QuantizedTensor.from_float(
        weights("normal", 4096, 4096, seed=3).to(BF16).cuda() * 0.02, parse_format("float8_e4m3:row"),
        activation("float8_e4m3:row"),
    )  # fmt: skip
    x, norm = weights("normal", 1, 4096).to(BF16).cuda(), torch.ones(4096, dtype=BF16, device="cuda")
    how, planes = ("float8_e4m3:row", "float8_e4m3:row", 4096, 4096, BF16, False), list(w.planes.values())

    def chain() -> torch.Tensor:
        total, y = x, x
        for _ in range(8):
            total, operand, scale = operand_ops.add_rms_norm_quantized(total, y, norm, 1e-5, None, how[1], BF16)
            y = ops.linear_of_operand(operand, scale, planes, None, *how)
        return y

    expected = chain()
    with early_launches():
        assert torch.equal(chain(), expected)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain()
    for _ in range(100):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
