"""The finder's verdicts: on lowbit's formats, on layers as others write them, and on torchao where it is installed."""

import pytest
import torch
import torch.nn.functional as F
from dequantizing import (
    FILE,
    ChunkedLayer,
    DequantizedTable,
    Float8Layer,
    Float8Product,
    GatheredLayer,
    IntegerProductLayer,
    LookupLayer,
    ScaledAfterLayer,
    UnpackingLayer,
    line_of,
)
from torch import nn

import lowbit
from lowbit.specs import EXAMPLES, parse_config
from lowbit.tools.profile.find import find_dequant
from lowbit.tools.profile.layers import find_layers
from lowbit.tools.profile.verdict import Verdict

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
IDS = torch.arange(100).remainder(96)


def quantized(spec, bias=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, bias=bias), nn.GELU(), nn.Linear(128, 64)).bfloat16()
    config = parse_config(spec)
    static = config.scheme.act is not None and config.scheme.act.static
    statistics = lowbit.calibrate(model, [X]) if static else None
    lowbit.quantize_(model, spec, calibration=statistics)
    return model


def only(module, x=X):
    (found,) = find_dequant(module, x).layers
    return found


@pytest.mark.parametrize("spec", EXAMPLES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_config_stays_packed(spec, mode):
    model = quantized(spec)
    with mode():
        expected = model(X)
        found = find_dequant(model, X)
        assert torch.equal(model(X), expected), "tracing leaves nothing behind"
    assert {v.verdict for v in found.layers} <= {Verdict.FUSED, Verdict.CHUNKED}
    assert [v.layer.name for v in found.layers] == ["0", "2"]
    assert all(v.kernel for v in found.layers)
    weight = model[0].weight
    assert found.layers[0].layer.stored_bytes == weight.nbytes_packed + (4 if weight.act_scale is not None else 0)
    assert found.layers[0].layer.scheme.startswith(weight.format.spec)


@pytest.mark.parametrize("spec", ["int4wo-32", "float8wo", "nf4wo-64", "int8dq", "mxfp8dq"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_reference_kernel_is_found(spec, mode):
    model = quantized(spec)
    with mode(), lowbit.use_kernel("reference"):
        found = find_dequant(model, X)
    assert [v.verdict for v in found.layers] == [Verdict.UNFUSED] * 2
    assert {v.kernel for v in found.layers} == {"reference"}
    assert "reference kernel" in str(found)
    with lowbit.use_kernel("torch_blocked"):
        found = find_dequant(model, X)
    assert [v.verdict for v in found.layers] == [Verdict.CHUNKED] * 2, "its workspace holds this small weight at once"


def test_dequantize_and_multiply_is_found():
    model = quantized("int8wo")
    found = find_dequant(model, run=lambda: model[0](X) @ model[2].weight.dequantize().t())
    assert [v.verdict for v in found.layers] == [Verdict.FUSED, Verdict.UNFUSED]
    model[0].register_forward_hook(lambda m, args, y: y @ m.weight.dequantize())
    found = find_dequant(model, X, run=lambda: model[0](X))
    assert [v.verdict for v in found.layers] == [Verdict.UNFUSED, Verdict.NOT_RUN]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_dequantizing_layer_is_found_with_its_line(mode):
    with mode():
        found = only(Float8Layer(128, 64))
    assert found.verdict is Verdict.UNFUSED
    assert (found.where.file, found.where.line) == (str(FILE), line_of("float8 dequantized"))
    assert found.where.function == "dequantize"
    assert found.stack[1].function == "forward"
    assert found.copy_bytes == 128 * 64 * 2
    assert found.written_bytes == 2 * 128 * 64 * 2, "the codes in bf16, and their product with the scale"
    assert found.layer.stored_bytes == 128 * 64 + 128 * 2
    assert found.layer.elements == 128 * 64


@pytest.mark.parametrize(("layer", "expected"), [
    (ChunkedLayer, Verdict.CHUNKED),
    (GatheredLayer, Verdict.UNFUSED),
    (ScaledAfterLayer, Verdict.UNFUSED),
    (UnpackingLayer, Verdict.UNFUSED),
    (IntegerProductLayer, Verdict.FUSED),
    (Float8Product, Verdict.FUSED),
])  # fmt: skip
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_as_others_write_them(layer, expected, mode):
    with mode():
        assert only(layer(128, 64)).verdict is expected


def test_chunks_are_counted():
    found = only(ChunkedLayer(128, 64))
    assert (found.calls, found.copy_bytes) == (4, 128 // 4 * 64 * 2)
    assert "25 %" in found.why


def test_embeddings():
    assert only(LookupLayer(96, 64), IDS).verdict is Verdict.FUSED
    assert only(DequantizedTable(96, 64), IDS).verdict is Verdict.UNFUSED
    table = nn.Embedding(96, 64)
    lowbit.quantize_(table, "int8wo", lambda m, name: True)
    assert only(table, IDS).verdict is Verdict.FUSED


def test_a_convolution_is_chunked():
    conv = nn.Conv2d(16, 32, 3)
    lowbit.quantize_(conv, "int4wo-16", lambda m, name: True)
    assert only(conv, torch.randn(1, 16, 8, 8)).verdict is Verdict.CHUNKED


def test_gradients_stay_packed():
    layer, x = quantized("int4wo-32")[0], X.clone().requires_grad_()

    def run():
        with torch.enable_grad():
            layer(x).sum().backward()

    found = find_dequant(layer, run=run).layers[0]
    assert x.grad is not None
    assert (found.verdict, found.kernel) == (Verdict.CHUNKED, "torch_blocked_dgrad")


def test_a_plain_model_has_nothing_to_find():
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Embedding(4, 64)).bfloat16()
    found = find_dequant(model[:2], X)
    assert [v.verdict for v in found.layers] == [Verdict.NOT_QUANTIZED]
    assert "nothing is quantized" in str(found)


def test_several_layers_in_one_model_are_told_apart():
    model = nn.ModuleDict({"a": Float8Layer(128, 64), "b": ChunkedLayer(64, 128), "c": nn.Linear(64, 8).bfloat16(),
                           "d": Float8Layer(8, 64)})  # fmt: skip
    found = find_dequant(model, run=lambda: model["c"](model["b"](model["a"](X))))
    assert {v.layer.name: v.verdict for v in found.layers} == {
        "a": Verdict.UNFUSED, "b": Verdict.CHUNKED, "c": Verdict.NOT_QUANTIZED, "d": Verdict.NOT_RUN,
    }  # fmt: skip
    assert found.summary == "1 chunked, 1 unfused, 1 not run, 1 not quantized"


def test_kernels_outside_of_the_dispatcher_read_codes():
    class Launched(Float8Layer):
        def forward(self, x):
            return torch.from_numpy(x.float().numpy() @ self.scale.float().numpy().repeat(64, 1).T)

    found = only(Launched(128, 64))
    assert (found.verdict, found.op) == (Verdict.FUSED, "")
    assert find_dequant(Launched(128, 64), run=lambda: None).layers[0].verdict is Verdict.NOT_RUN


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_models_that_run_as_functions(mode):
    packed, copied = quantized("int4wo-32")[0], Float8Layer(128, 64)
    with mode():
        found = find_dequant(packed, run=lambda: F.linear(X, packed.weight))
        assert [v.verdict for v in found.layers] == [Verdict.FUSED]
        found = find_dequant(copied, run=lambda: X @ copied.dequantize(X.dtype).t())
        assert [v.verdict for v in found.layers] == [Verdict.UNFUSED]


def test_sparse_tensors_are_no_obstacle():
    class Sparse(Float8Layer):
        def forward(self, x):
            return super().forward(torch.sparse.mm(torch.eye(len(x)).to_sparse(), x.float()).bfloat16())

    assert only(Sparse(128, 64)).verdict is Verdict.UNFUSED


def test_a_quantized_cache_is_no_weight():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("keys", torch.zeros(64, 32, dtype=torch.int8))
            self.register_buffer("scales", torch.ones(64, 1))

        def forward(self, x):
            self.keys[:32] = x[:, :32].to(torch.int8)
            return (self.keys.float() * self.scales) @ x[0, :32].float()

    assert find_dequant(Cache(), X).layers == ()


def test_a_weight_of_several_planes_is_read_once_per_run():
    model = quantized("int4wo-32")
    assert len(model[0].weight.planes) == 3
    assert find_dequant(model, run=lambda: [model(X) for _ in range(3)]).layers[0].calls == 3


def test_what_counts_as_a_quantized_weight():
    def module(**tensors):
        made = nn.Module()
        made.register_module("plain", nn.ReLU())
        for name, value in tensors.items():
            made.register_buffer(name, value)
        return made

    codes = torch.zeros(64, 32, dtype=torch.uint8)
    assert find_layers(module(codes=codes)).quantized == [], "bytes alone may be anything"
    assert find_layers(module(mask=codes, weight=torch.ones(64, 32))).quantized == [], "a mask beside a weight"
    assert find_layers(module(ids=torch.zeros(1, 512, dtype=torch.int64), scale=torch.ones(1))).layers == []
    (scaled,) = find_layers(module(codes=codes, scale=torch.ones(64, 1))).quantized
    assert (scaled.elements, scaled.stored_bytes) == (64 * 32, 64 * 32 + 64 * 4)
    packed = module(qweight=torch.zeros(4, 64, dtype=torch.int32), scales=torch.ones(1, 64).half())
    packed.in_features, packed.out_features = 32, 64
    (sized,) = find_layers(packed).quantized
    assert (sized.elements, sized.bits) == (64 * 32, 8 * (4 * 64 * 4 + 64 * 2) / (64 * 32))


def test_a_shared_weight_is_one_layer():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    lowbit.quantize_(model, "int8wo")
    found = only(model)
    assert (found.layer.name, found.layer.also, found.calls) == ("0", ("1",), 2)
    tied = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 96, bias=False))
    tied[1].weight = tied[0].weight
    (layer,) = find_layers(tied).layers
    assert (layer.name, layer.also, layer.lookups) == ("0", ("1",), ("0",))


def test_parametrized_weights():
    """A submodule that is given the codes is no input of the model."""

    class Decode(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.register_buffer("scale", scale)

        def forward(self, codes):
            return codes.bfloat16() * self.scale

    layer = Float8Layer(128, 64)
    decode = Decode(layer.scale)
    layer.add_module("decode", decode)
    layer.dequantize = lambda dtype: decode(layer.codes)
    found = only(layer)
    assert (found.verdict, found.where.function) == (Verdict.UNFUSED, "forward")


def test_operations_of_libraries_are_looked_into():
    with torch.library._scoped_library("lowbit_test", "FRAGMENT") as lib:
        lib.define("honest(Tensor x, Tensor codes) -> Tensor")
        lib.define("hidden(Tensor x, Tensor codes) -> Tensor")
        lib.impl("honest", lambda x, codes: x.new_zeros(len(x), len(codes)), "CompositeExplicitAutograd")
        lib.impl("hidden", lambda x, codes: x @ codes.to(x.dtype).t(), "CPU")
        for name, expected in (("honest", Verdict.FUSED), ("hidden", Verdict.UNFUSED)):
            layer = Float8Layer(128, 64)
            op = getattr(torch.ops.lowbit_test, name)
            layer.forward = lambda x, op=op, layer=layer: op(x, layer.codes)
            found = only(layer)
            assert found.verdict is expected
            assert found.op == ("lowbit_test::honest" if name == "honest" else "aten::to")


def test_a_workspace_that_is_used_again_is_what_was_written_last():
    class Reused(Float8Layer):
        def forward(self, x):
            work = torch.empty(self.codes.shape, dtype=x.dtype)
            work.copy_(self.dequantize(x.dtype))
            work.copy_(torch.ones_like(work))
            return F.linear(x, work) + torch._scaled_mm(
                x.to(torch.float8_e4m3fn), self.codes.t(), torch.ones(()), torch.ones(()), out_dtype=x.dtype
            )

    assert only(Reused(128, 64)).verdict is Verdict.FUSED


def test_compiled_models_are_traced_uncompiled():
    model = torch.compile(Float8Layer(128, 64), backend="eager")
    model(X)
    found = find_dequant(model, X)
    assert [v.verdict for v in found.layers] == [Verdict.UNFUSED]


@pytest.mark.parametrize(("config", "expected"), [
    ("Float8WeightOnlyConfig", Verdict.UNFUSED),
    ("Int8WeightOnlyConfig", Verdict.UNFUSED),
    ("Int8DynamicActivationInt8WeightConfig", Verdict.FUSED),
])  # fmt: skip
def test_torchao(config, expected):
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).bfloat16()
    torchao.quantize_(model, getattr(torchao, config)())
    found = find_dequant(model, X)
    assert {v.verdict for v in found.layers} == {expected}
    if expected is Verdict.UNFUSED:
        assert all("torchao" in v.where.file for v in found.layers)
