"""`quantize_`: which layers, in which order, what it reports, what it refuses, and how much memory it takes."""

from __future__ import annotations

import copy
import json
import weakref

import pytest
import torch
from tiny_llama import tiny_ids, tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit import FqnToConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, QuantizedTensor, quantize_
from lowbit.original import unharmed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.body = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False))
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(64, 40, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(self.embed(ids)))
        return out


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().bfloat16()


def formats(model: nn.Module) -> dict[str, str]:
    return {
        n: m.weight.format.spec
        for n, m in model.named_modules()
        if isinstance(getattr(m, "weight", None), QuantizedTensor)
    }  # type: ignore[union-attr]


def test_default_takes_every_linear_and_nothing_else(net: Net) -> None:
    report = quantize_(net, Int4WeightOnlyConfig(group_size=32))
    assert formats(net) == dict.fromkeys(("body.0", "body.2", "head"), "int4:g32:asym")
    assert [r.name for r in report] == ["body.0", "body.2", "head"]
    assert all(not p.requires_grad for p in (net.head.weight, net.body[0].weight))


def test_short_names_and_configs_are_the_same(net: Net) -> None:
    quantize_(net, "int8wo")
    other = Net().bfloat16()
    quantize_(other, Int8WeightOnlyConfig())
    assert formats(net) == formats(other)


def test_filter_fn_chooses(net: Net) -> None:
    quantize_(net, "int8wo", lambda m, name: name.startswith("body") and isinstance(m, nn.Linear))
    assert list(formats(net)) == ["body.0", "body.2"]


def test_rules_first_match_wins_in_the_documented_order(net: Net) -> None:
    rules = {"_default": "int8wo", "re:body\\..*": "int4wo-32", "body.2": "nf4wo-32", "head": None, "conv": "int3wo"}
    report = quantize_(net, FqnToConfig({**rules, "embed": "int8wo-64"}))
    assert formats(net) == {
        "embed": "int8:g64", "body.0": "int4:g32:asym", "body.2": "nf4:g32", "conv": "int3:row",
    }  # fmt: skip
    assert {r.name: r.skipped for r in report.skipped} == {"head": "left as it is by a rule"}


def test_default_rule_takes_the_rest(net: Net) -> None:
    quantize_(net, {"head": None, "_default": "int8wo"})
    assert list(formats(net)) == ["body.0", "body.2"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"nothing": "int8wo"}, r"match no layer: \['nothing'\]"),
        ({"re:.*attn.*": "int8wo", "head": "int8wo"}, r"match no layer: \['re:.\*attn.\*'\]"),
        ({"conv": "int8dq"}, "only Linear takes quantized activations"),
        ({"body": "int8wo"}, "Sequential is none of"),
    ],
)
def test_rules_at_fault_change_nothing(net: Net, rules: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_(net, rules)
    assert not formats(net)


def test_rules_and_filter_exclude_each_other(net: Net) -> None:
    with pytest.raises(ValueError, match="not both"):
        quantize_(net, {"head": "int8wo"}, lambda m, n: True)


def test_empty_selection_is_an_error(net: Net) -> None:
    with pytest.raises(ValueError, match="selected no layer"):
        quantize_(net, "int8wo", lambda m, n: False)


def test_not_a_config_is_a_type_error(net: Net) -> None:
    with pytest.raises(TypeError, match="int"):
        quantize_(net, 4)  # type: ignore[arg-type]


def test_twice_is_an_error_that_names_the_format(net: Net) -> None:
    quantize_(net, "int8wo")
    with pytest.raises(ValueError, match=r"body\.0 .* already int8:row"):
        quantize_(net, "int4wo-32")
    report = quantize_(net, "int4wo-32", on_unsupported="skip")
    assert len(report.skipped) == 3
    assert not report.quantized


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_weights_are_refused_before_anything_changes(net: Net, bad: float) -> None:
    with torch.no_grad():
        net.head.weight[3, :2] = bad
    with pytest.raises(ValueError, match=r"head \(2 of 2560\)"):
        quantize_(net, "int8wo")
    assert not formats(net)
    quantize_(net, "int8wo", on_nonfinite="zero")
    dense = net.head.weight.dequantize()
    assert (dense[3, :2] == 0).all()
    assert dense.isfinite().all()


def test_report_accounts_for_every_byte(net: Net) -> None:
    before = {n: p.numel() * p.element_size() for n, p in net.named_parameters()}
    report = quantize_(net, "int4wo-32")
    for row in report:
        assert row.bytes_before == before[f"{row.name}.weight"]
        weight = net.get_submodule(row.name).weight
        assert isinstance(weight, QuantizedTensor)
        assert row.bytes_after == sum(t.numel() * t.element_size() for t in weight.planes.values())
    data = json.loads(report.to_json())
    assert data["bytes_after"] == report.bytes_after == sum(r["bytes_after"] for r in data["layers"])
    assert report.worst is not None
    assert report.worst.sqnr_db == min(r.sqnr_db or 0 for r in report.layers)
    text = str(report)
    assert all(r.name in text for r in report)
    assert "3 layers quantized" in text


def test_report_measures_the_noise(net: Net) -> None:
    w = net.head.weight.detach().double().clone()
    row = quantize_(net, {"head": "int4wo-32"}).layers[0]
    error = w - net.head.weight.dequantize(torch.float32).double()
    expected = 10 * torch.log10(w.square().sum() / error.square().sum())
    assert row.sqnr_db == pytest.approx(float(expected), abs=1e-6)
    assert quantize_(Net(), "int8wo", measure=False).worst is None


def test_low_sqnr_is_noted(net: Net) -> None:
    with torch.no_grad():
        net.head.weight[0, 0] = 5.0
    notes = {r.name: r.note for r in quantize_(net, "int8wo-tensor")}
    assert "SQNR below 30 dB" in (notes["head"] or "")
    assert notes["body.0"] is None


def test_tied_weights_stay_tied_when_both_are_quantized(net: Net) -> None:
    net.head.weight = net.embed.weight
    report = quantize_(net, {"embed": "int8wo", "head": "int8wo"})
    assert net.head.weight is net.embed.weight
    assert [r.note for r in report] == [None, "shares embed"]
    assert report.bytes_after == report.layers[0].bytes_after
    assert net(torch.arange(4)).isfinite().all()


def test_tied_weight_of_a_layer_that_is_not_quantized_stays(net: Net) -> None:
    net.head.weight = net.embed.weight
    quantize_(net, {"head": "int8wo"})
    assert not isinstance(net.embed.weight, QuantizedTensor)
    assert isinstance(net.head.weight, QuantizedTensor)


def test_meta_weights_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="meta device"):
        quantize_(model, "int8wo")


def test_static_scales_come_from_calibration_or_the_config(net: Net) -> None:
    with pytest.raises(ValueError, match=r"body\.0 needs a calibrated activation scale"):
        quantize_(net, "int8sq")
    assert not formats(net)
    statistics = lowbit.calibrate(net, [torch.arange(40)])
    quantize_(net, "int8sq", calibration=statistics)
    scale = net.body[0].weight.act_scale
    assert isinstance(scale, torch.Tensor)
    assert float(scale) == pytest.approx(statistics["body.0"].amax / 127.5)
    other = Net().bfloat16()
    quantize_(other, lowbit.Float8StaticActivationFloat8WeightConfig(scale=0.25))
    assert float(other.head.weight.act_scale) == 0.25  # type: ignore[arg-type]


def test_progress_is_told_of_every_layer(net: Net) -> None:
    seen: list[tuple[int, int, str]] = []
    quantize_(net, "int8wo", progress=lambda *a: seen.append(a))
    assert seen == [(0, 3, "body.0"), (1, 3, "body.2"), (2, 3, "head")]


class Allocations(TorchDispatchMode):
    """Bytes of the storages that live at once, of those made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if type(t) is torch.Tensor and not t.is_meta:
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.live and t._base is None and not self._is_input(storage, args):
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out

    @staticmethod
    def _is_input(storage: torch.UntypedStorage, args: object) -> bool:
        leaves = torch.utils._pytree.tree_leaves(args)
        return any(
            isinstance(a, torch.Tensor)
            and not isinstance(a, QuantizedTensor)
            and a.untyped_storage()._cdata == storage._cdata
            for a in leaves
        )


@pytest.mark.parametrize("spec", ["int4wo-128", "nvfp4wo", "float8wo", "codebook4wo-64"])
def test_memory_while_quantizing(spec: str) -> None:
    """At most the quantized weights and the two largest layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 6144, bias=False, dtype=torch.bfloat16) for _ in range(4)))
    layer = 2048 * 6144 * 2
    with Allocations() as memory:
        report = quantize_(model, spec)
    assert memory.peak > report.bytes_after  # the meter sees something
    assert memory.peak <= report.bytes_after + 2 * layer


def test_what_went_to_another_device_comes_back() -> None:
    """As `quantize_(..., device=)` does by itself; the meta device stands in for one that is full."""
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 16))
    before = {name: (t, t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}

    def fails() -> None:
        with unharmed(model, keep=True):
            quantize_(model, "int8wo", lambda module, name: name == "0")
            model.to("meta")
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        fails()
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is t and torch.equal(t, values) for name, (t, values) in before.items())


# Algorithms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["int4wo-16", "int3wo-16", "nvfp4wo", "nf4wo-16", "float8wo"])
def test_gptq_keeps_more_of_a_models_output_than_rounding(config: str) -> None:
    """Of the decoder's output, for the inputs that it has seen; weights themselves lose more."""
    batches = [tiny_ids(4, 40, seed=s) for s in range(4)]
    original, errors, sqnr = tiny_llama(), {}, {}
    wanted = torch.cat([original.model(ids, None, 0) for ids in batches])
    for algorithm in ("rtn", "gptq"):
        model = tiny_llama()
        rules = {"re:model.layers.*": config}
        report = quantize_(model, rules, algorithm=algorithm, batches=batches if algorithm == "gptq" else None)  # type: ignore[arg-type]
        got = torch.cat([model.model(ids, None, 0) for ids in batches])
        errors[algorithm] = float((got - wanted).square().sum())
        sqnr[algorithm] = [layer.sqnr_db for layer in report.quantized]
        assert all(
            isinstance(m.weight, QuantizedTensor) for m in model.model.layers.modules() if isinstance(m, nn.Linear)
        )
    assert errors["gptq"] < errors["rtn"]
    if config != "float8wo":  # whose rows keep one scale, which the search improves
        assert sum(sqnr["gptq"]) < sum(sqnr["rtn"])


@pytest.mark.parametrize("algorithm", ["mse", "hqq"])
def test_algorithms_without_inputs(algorithm: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    for m in model:
        m.weight.data[::5, ::7] *= 30
    plain = quantize_(copy.deepcopy(model), "int3wo-32")
    report = quantize_(model, "int3wo-32", algorithm=algorithm)  # type: ignore[arg-type]
    if algorithm == "mse":
        assert all(a.sqnr_db > b.sqnr_db for a, b in zip(report.quantized, plain.quantized))  # type: ignore[operator]
    assert model(torch.randn(3, 64)).shape == (3, 16)


def test_what_gptq_cannot_reach_is_searched_and_said() -> None:
    model = tiny_llama()
    report = quantize_(model, "int4wo-16", algorithm="gptq", batches=[tiny_ids()])
    notes = {layer.name: layer.note for layer in report.quantized}
    assert "no inputs seen" in (notes["lm_head"] or "")
    assert "no inputs seen" not in (notes["model.layers.1.mlp.up_proj"] or "")


def test_layers_that_met_only_zeros_are_searched() -> None:
    model = tiny_llama()
    model.model.layers[0].post_attention_layernorm.weight.zero_()
    report = quantize_(model, "int4wo-16", algorithm="gptq", batches=[tiny_ids()])
    seen = {layer.name: "no inputs seen" in (layer.note or "") for layer in report.quantized}
    assert seen["model.layers.0.mlp.up_proj"]
    assert not seen["model.layers.0.self_attn.q_proj"]


def test_batches_and_algorithms_go_together() -> None:
    model = tiny_llama()
    for algorithm, batches in (("gptq", None), ("mse", [tiny_ids()]), ("best", None)):
        with pytest.raises(ValueError, match=r"\[lowbit: bad-option\]"):
            quantize_(model, "int4wo-16", algorithm=algorithm, batches=batches)
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
