"""Layers with more than a weight, a low-rank term or a Hadamard transform: what they compute, where they are found,
what survives."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import FORMATS
from tiny_llama import CONFIG, tiny_ids, tiny_llama
from torch import Tensor, nn

import lowbit
from lowbit import QuantizedTensor, quantize_
from lowbit.calibrate import run_blocks
from lowbit.checkpoints.files import CheckpointError
from lowbit.decoder_ops import hadamard
from lowbit.integrations.engine_plans import plan_of_section
from lowbit.linear import QuantizedLinear, beside, put_beside_, random_signs, turned_moment, turned_weight
from lowbit.models import Llama
from lowbit.models.fuse import fuse_projections_, unfuse_projections_
from lowbit.models.inference import State, forward
from lowbit.recipe import ROUNDINGS, parse_recipe
from lowbit.tune import tune_scales_

LAYERS = "re:model.layers.*"
DOWN = "model.layers.1.mlp.down_proj"


def batches() -> list[Tensor]:
    return [tiny_ids(4, 60, seed=s) for s in range(6)]


def corrected(
    algorithm: str = "rtn+lowrank-6", config: str = "int3wo-16", seen: bool = False, **options: object
) -> Llama:
    model = tiny_llama()
    quantize_(model, {LAYERS: config}, algorithm=algorithm, batches=batches() if seen else None, **options)
    return model


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


# What it computes ---------------------------------------------------------------------------------


def test_words() -> None:
    assert str(parse_recipe("awq+gptq+lowrank-8")) == "awq+gptq+lowrank-8"
    assert (parse_recipe("lowrank").rounding, parse_recipe("lowrank").rank) == ("rtn", 32)
    assert (parse_recipe("awq+lowrank").rounding, parse_recipe("awq+lowrank").rank) == ("mse", 32)
    assert parse_recipe("gptq").rank == 0
    assert parse_recipe("hqq+lowrank").takes_batches
    assert not parse_recipe("hqq+lowrank").needs_batches
    for word in ("lowrank-0", "lowrank-08", "lowrank+gptq", "lowrank-4+lowrank-4", "gptq+lowrank-x", "gptq+lowrank-"):
        with pytest.raises(ValueError, match=r"\[lowbit: bad-option\]"):
            parse_recipe(word)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.spec)
def test_a_full_rank_brings_the_weight_back_in_every_format(fmt: lowbit.Format) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32).requires_grad_(False)
    original, x = copy.deepcopy(layer), torch.randn(3, 5, 48)
    report = quantize_(layer, fmt.spec, algorithm="rtn+lowrank-32")
    assert type(layer) is QuantizedLinear
    torch.testing.assert_close(layer(x), original(x), rtol=1e-4, atol=1e-4)
    row = report.quantized[0]
    assert row.bytes_after == layer.weight.nbytes_packed + 4 * 32 * (32 + 48)
    assert row.sqnr_db is not None
    assert row.sqnr_db > 80
    # A rank less than that leaves the weight of the codes what it was.
    other = copy.deepcopy(original)
    quantize_(other, fmt.spec, algorithm="rtn+lowrank-2")
    assert torch.equal(other.weight, layer.weight)
    a, b = other.lowrank_a, other.lowrank_b
    torch.testing.assert_close(other(x), F.linear(x, other.weight) + x @ a.T @ b.T + other.bias)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_inputs_decide_what_is_mended(rounding: str) -> None:
    """No layer's output has more error than without, and less with inputs than without, where both are possible."""

    def losses(algorithm: str, seen: bool) -> Tensor:
        """tr(E H E^T) of each layer of the first block, whose inputs are the same for all."""
        model, original, found = corrected(algorithm, seen=seen), tiny_llama(), dict[str, Tensor]()
        run_blocks(original, batches(), lambda m: found.update({n: x.square for n, x in m.items()}))
        out = []
        for name in [n for n in found if n.startswith("model.layers.0.")]:
            module = model.get_submodule(name)
            parts = list(beside(module).values())
            w = module.weight.dequantize() + (parts[1] @ parts[0] if parts else 0)
            e = original.get_submodule(name).weight - w
            out.append((e @ found[name]).mul(e).sum())
        return torch.stack(out)

    needs = rounding == "gptq"
    without, weighted = losses(rounding, needs), losses(f"{rounding}+lowrank-6", True)
    if rounding == "mse":  # with inputs, it searches other scales
        without = losses("mse+lowrank-1", True)
    assert bool((weighted < without).all())
    if not needs and rounding != "mse":
        plain = losses(f"{rounding}+lowrank-6", False)
        assert bool((weighted < plain).all())
        assert float(plain.sum()) < float(without.sum())


def test_every_step_goes_before_it() -> None:
    original = tiny_llama()
    wanted = [original(ids) for ids in batches()]

    def loss(algorithm: str) -> float:
        model = corrected(algorithm, seen=True)
        return float(sum((model(ids) - y).square().sum() for ids, y in zip(batches(), wanted)))

    assert loss("rotation+awq+align+gptq+lowrank-6") < loss("rotation+awq+align+gptq")
    assert loss("smoothquant+gptq+lowrank-6") < loss("smoothquant+gptq")


def test_layers_may_differ() -> None:
    model = tiny_llama()
    words = {"re:.*down_proj": "gptq+lowrank-4", "re:.*mlp.*": "rtn+lowrank-2", "_default": "rtn"}
    quantize_(model, {LAYERS: "int4wo-16"}, algorithm=words, batches=batches())
    ranks = {n.split(".")[-1]: m.lowrank_a.shape[0] for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert ranks == {"down_proj": 4, "gate_proj": 2, "up_proj": 2}


def test_tied_layers_share_all_of_it() -> None:
    model = tiny_llama(dataclasses.replace(CONFIG, tie_embeddings=True))
    original, ids = copy.deepcopy(model), tiny_ids()
    words = {"lm_head": "rtn+lowrank-48", "_default": "rtn"}
    quantize_(model, {"lm_head": "int3wo-16"}, algorithm=words)
    torch.testing.assert_close(model(ids), original(ids), rtol=1e-3, atol=1e-3)
    two = nn.ModuleList([nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)]).requires_grad_(False)
    two[1].weight = two[0].weight
    quantize_(two, "int4wo-16", algorithm="rtn+lowrank-2")
    assert two[0].weight is two[1].weight
    assert torch.equal(two[0].lowrank_a, two[1].lowrank_a)


# A transform of the input ------------------------------------------------------------------------


def spiky() -> Llama:
    """Few channels of what down reads are far larger than the others, and count no more for that."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[::40] *= 30
        layer.mlp.down_proj.weight[:, ::40] /= 30
    return model


def lost(algorithm: str, config: str, seen: bool = False) -> float:
    original, model = spiky(), spiky()
    quantize_(model, {LAYERS: config}, algorithm=algorithm, batches=batches() if seen else None)
    return float(sum((model(ids) - original(ids)).square().sum() for ids in batches()))


def test_a_turned_model_computes_the_same() -> None:
    """Before anything is quantized."""
    model, original, ids = tiny_llama(), tiny_llama(), tiny_ids()
    for layer in model.model.layers:
        down, signs = layer.mlp.down_proj, random_signs(80)
        down.weight = nn.Parameter(turned_weight(down.weight, signs).float(), requires_grad=False)
        put_beside_(down, {"input_signs": signs})
    torch.testing.assert_close(model(ids), original(ids), rtol=0, atol=1e-5 * float(original(ids).abs().max()))
    x = torch.randn(50, 80)
    torch.testing.assert_close(
        turned_moment(x.T @ x, signs), hadamard(x, signs).T @ hadamard(x, signs), rtol=0, atol=1e-3
    )


def test_quantized_activations_keep_more_of_outliers() -> None:
    assert lost("hadamard", "int8dq") < 0.5 * lost("rtn", "int8dq")
    # float8 is as exact for large values as for small ones: nothing is to be gained there.
    assert lost("hadamard", "float8dq-row") > lost("rtn", "float8dq-row")


def test_every_rounding_goes_behind_it() -> None:
    for rounding in ROUNDINGS:
        assert lost(f"hadamard+{rounding}", "int4wo-16", rounding == "gptq") < lost("hadamard+rtn", "int3wo-16")
    assert lost("hadamard+gptq", "int3wo-16", True) < lost("hadamard+rtn", "int3wo-16")
    assert lost("rotation+align+hadamard+gptq+lowrank-4", "mxfp4dq", True) < lost(
        "align+hadamard+gptq", "mxfp4dq", True
    )


def test_only_down_projections_are_turned() -> None:
    model = corrected("hadamard", "int8dq")
    found = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert found == {"down_proj"}
    layers = lowbit.explain(model).layers
    assert {x.beside for x in layers if "down" in x.name} == {"a Hadamard transform of its input"}
    ids = tiny_ids()
    fuse_projections_(model)
    torch.testing.assert_close(forward(model, ids, State(model, len(ids), 32)), model(ids)[:, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"no down projection is quantized.*layer-not-quantizable"):
        quantize_(tiny_llama(), {"re:.*up_proj": "int8dq"}, algorithm="hadamard")
    with pytest.raises(ValueError, match=r"static activation scale, measured before hadamard"):
        quantize_(tiny_llama(), lowbit.Int8StaticActivationInt8WeightConfig(scale=0.1), algorithm="hadamard")


# Transforms of both sides ------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(32, 64), (48, 80), (1, 3)])
def test_a_layer_turned_on_both_sides_computes_the_same(n: int, k: int) -> None:
    layer, x = nn.Linear(k, n).requires_grad_(False), torch.randn(2, 5, k)
    wanted, signs = layer(x), (random_signs(k, 0), random_signs(n, 1))
    layer.weight = nn.Parameter(turned_weight(layer.weight, *signs).float(), requires_grad=False)
    put_beside_(layer, dict(zip(("input_signs", "output_signs"), signs)))
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-5)


def test_incoherence_leaves_no_weight_that_stands_out() -> None:
    """Lemma 3.1 of QuIP#: after both transforms no entry is larger than a few times the root mean square; rounding
    with a scale per row then keeps more. Gaussian weights are so already, and gain nothing."""

    def heavy() -> nn.Linear:
        torch.manual_seed(0)
        layer = nn.Linear(96, 64).requires_grad_(False)
        layer.weight.normal_().mul_(torch.randn(64, 1).exp()).mul_(torch.randn(96).exp())
        layer.weight[3, 5] = 60
        return layer

    w = heavy().weight
    turned = turned_weight(w, random_signs(96), random_signs(64, 1))
    assert float(w.abs().max() / w.square().mean().sqrt()) > 10
    assert float(turned.abs().max() / turned.square().mean().sqrt()) < 5
    for config in ("int2wo", "int3wo", "int4wo-32", "codebook2wo-32"):
        sqnr = [quantize_(heavy(), config, algorithm=word).quantized[0].sqnr_db for word in ("rtn", "incoherence+rtn")]
        assert sqnr[1] > sqnr[0] + 1, config  # type: ignore[operator]


def test_incoherence_needs_no_known_architecture() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.ModuleList([nn.Linear(32, 32)]), nn.Linear(32, 8)).requires_grad_(False)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m[1](m[0][0](x))  # type: ignore[index]

    x = [torch.randn(40, 32) @ torch.randn(32, 32) for _ in range(4)]
    model = copy.deepcopy(original)
    report = quantize_(model, "int3wo-16", algorithm="incoherence", batches=x, forward=run)
    assert [type(m) for m in (model[0][0], model[1])] == [QuantizedLinear] * 2
    assert report.quantized[0].note is None
    error = (run(model, x[0]) - run(original, x[0])).norm() / run(original, x[0]).norm()
    assert float(error) < 0.5


def test_incoherence_goes_with_all_else() -> None:
    words = {"re:.*down_proj": "awq+incoherence+gptq+lowrank-2", "re:.*mlp.*": "awq+gptq", "_default": "awq+gptq"}
    model, ids = tiny_llama(), tiny_ids()
    quantize_(model, {LAYERS: "int4wo-16"}, algorithm=words, batches=batches())
    layers = {x.name.split(".")[-1]: x.beside for x in lowbit.explain(model).layers}
    assert layers["down_proj"] == "a Hadamard transform of its input and its output and a low-rank term of rank 2"
    assert layers["up_proj"] == ""
    assert lost("rotation+align+incoherence+gptq+lowrank-4", "int3wo-16", True) < lost("gptq", "int3wo-16", True)
    torch.testing.assert_close(forward(model, ids, State(model, len(ids), 32)), model(ids)[:, -1], rtol=1e-4, atol=1e-4)
    for word in ("hadamard+incoherence", "incoherence+align"):
        with pytest.raises(ValueError, match=r"out of order.*hadamard with incoherence.*\[lowbit: bad-option\]"):
            parse_recipe(word)


def test_vectors_of_four_keep_more_than_scalars_of_two_bits(tmp_path: Path) -> None:
    """QuIP#'s point: of turned weights, which are Gaussian, points in several dimensions waste fewer of their codes."""
    results = {
        config: lost("incoherence+gptq", config, True)
        for config in ("int2wo-16-asym", "codebook2wo-16", "codebook2v4wo-16")
    }
    assert results["codebook2v4wo-16"] < 0.8 * min(results["int2wo-16-asym"], results["codebook2wo-16"])
    model, ids = corrected("incoherence+gptq", "codebook2v4wo-16", True), tiny_ids()
    lowbit.save(model, tmp_path)
    assert torch.equal(lowbit.load(Llama(CONFIG).eval(), tmp_path)(ids), model(ids))
    with lowbit.use_kernel("reference"):
        exact = model(ids)
    torch.testing.assert_close(model(ids), exact, rtol=1e-3, atol=1e-3)


# Where it goes ------------------------------------------------------------------------------------


def test_hooks_copies_and_dtypes() -> None:
    model, seen = tiny_llama(), list[str]()
    down = model.get_submodule(DOWN)
    down.register_forward_hook(lambda *_: seen.append("hooked"))
    quantize_(model, {LAYERS: "int4wo-16"}, algorithm="rtn+lowrank-2")
    assert model.get_submodule(DOWN) is down
    model(tiny_ids())
    assert seen == ["hooked"]
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert {t.dtype for t in beside(other.get_submodule(DOWN)).values()} == {torch.bfloat16}
    assert other(tiny_ids()).dtype == torch.bfloat16
    x = torch.randn(2, 80, requires_grad=True)
    down(x).sum().backward()
    dense = down.weight.dequantize() + down.lowrank_b @ down.lowrank_a
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)
    assert "rank 2" in repr(down)


def test_it_compiles() -> None:
    layer = nn.Linear(32, 16).requires_grad_(False)
    quantize_(layer, "int4wo-16", algorithm="rtn+lowrank-4")
    x = torch.randn(3, 32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_generation_runs_all_of_it() -> None:
    """Joined projections would leave the terms out, so these layers stay apart."""
    model, ids = corrected(config="int8dq"), tiny_ids()
    wanted = model(ids)[:, -1]
    reasons = {f.reason for f in fuse_projections_(model)}
    assert len(reasons) == 1
    assert "QuantizedLinear is more than a Linear" in reasons.pop()
    torch.testing.assert_close(forward(model, ids, State(model, len(ids), 32)), wanted, rtol=1e-4, atol=1e-4)


def test_joined_projections_can_have_one() -> None:
    model, ids = tiny_llama(), tiny_ids()
    fuse_projections_(model)
    quantize_(model, {LAYERS: "int4wo-16"}, algorithm="rtn+lowrank-2")
    torch.testing.assert_close(forward(model, ids, State(model, len(ids), 32)), model(ids)[:, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"qkv_proj is more than a Linear.*\[lowbit: op-not-defined\]"):
        unfuse_projections_(model)


def test_explain_and_warmup_see_it() -> None:
    model = corrected()
    layer = lowbit.explain(model).layers[0]
    assert layer.beside == "a low-rank term of rank 6"
    assert layer.bytes == linears(model)[0].weight.nbytes_packed + 4 * 6 * (48 + 48)
    assert "with a low-rank term of rank 6" in str(lowbit.explain(model))
    assert len(lowbit.warmup(model, tokens=[1]).layers) == len(
        {(m.out_features, m.in_features) for m in linears(model)}
    )


def test_scales_are_trained_beside_it() -> None:
    model, original = corrected("gptq+lowrank-4", seen=True), tiny_llama()
    before = beside(model.get_submodule(DOWN))["lowrank_a"].clone()
    losses = tune_scales_(model, original, batches(), epochs=4)
    ids = tiny_ids(4, 60, seed=0)
    p, q = original(ids).log_softmax(-1), model(ids).log_softmax(-1)
    now = F.kl_div(q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean", log_target=True)
    assert float(now) < losses[0]
    # The first loss is that of the model as it was: what lies beside the weights took part.
    model2 = corrected("gptq+lowrank-4", seen=True)
    q = model2(ids).log_softmax(-1)
    first = F.kl_div(q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean", log_target=True)
    assert losses[0] == pytest.approx(float(first), rel=1e-4)
    assert torch.equal(beside(model.get_submodule(DOWN))["lowrank_a"], before)


# What survives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["int4wo-16", "codebook4wo-16"])
@pytest.mark.parametrize("algorithm", ["rtn+lowrank-6", "hadamard", "incoherence+rtn+lowrank-6"])
def test_checkpoints_keep_it(config: str, algorithm: str, tmp_path: Path) -> None:
    model, ids = corrected(algorithm, config), tiny_ids()
    lowbit.save(model, tmp_path)
    assert lowbit.verify(tmp_path)
    for device in ("meta", "cpu"):
        with torch.device(device):
            empty = Llama(CONFIG)
        loaded = lowbit.load(empty, tmp_path).eval()
        assert torch.equal(loaded(ids), model(ids))
        assert type(loaded.get_submodule(DOWN)) is QuantizedLinear
    again = lowbit.load(loaded, tmp_path)  # into layers that have one already
    assert torch.equal(again(ids), model(ids))


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(16, 8)).requires_grad_(False)
    quantize_(layer, "int4wo-16", algorithm="rtn+lowrank-2")
    lowbit.save(layer, tmp_path / "a")

    class Other(nn.Linear):
        pass

    model = nn.Sequential(Other(16, 8))
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"only nn\.Linear itself can have more than a weight, this is Other"):
            lowbit.load(model, tmp_path / "a", strict=strict)
    assert not any(isinstance(p, QuantizedTensor) for p in model.parameters())
    layer[0].input_signs = torch.ones(9, dtype=torch.int8)
    lowbit.save(layer, tmp_path / "signs")
    with pytest.raises(CheckpointError, match=r"input_signs of a weight \[8, 16\] are int8 \[16\]"):
        lowbit.load(nn.Sequential(nn.Linear(16, 8)), tmp_path / "signs")
    layer[0].input_signs, layer[0].lowrank_b = None, nn.Parameter(torch.zeros(8, 3), requires_grad=False)
    lowbit.save(layer, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"lowrank_a \[r, 16\] and lowrank_b \[8, r\]"):
        lowbit.load(nn.Sequential(nn.Linear(16, 8)), tmp_path / "b")
    plain = nn.Sequential(nn.Linear(16, 8)).requires_grad_(False)
    quantize_(plain, "int4wo-16")
    lowbit.save(plain, tmp_path / "c")
    quantize_(fresh := nn.Sequential(nn.Linear(16, 8)).requires_grad_(False), "int4wo-16", algorithm="lowrank-2")
    with pytest.raises(CheckpointError, match=r"0.lowrank_a \[2, 16\] is in the model, but not in the checkpoint"):
        lowbit.load(fresh, tmp_path / "c")


def test_engines_refuse_it(tmp_path: Path) -> None:
    import json

    lowbit.save(corrected(), tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "lowbit"
    with pytest.raises(CheckpointError, match="has lowrank_a, lowrank_b beside its weight, which engines do not run"):
        plan_of_section(section)


@pytest.mark.parametrize("algorithm", ["awq+lowrank-3", "awq+hadamard+gptq", "incoherence"])
def test_a_journal_keeps_it(algorithm: str, tmp_path: Path) -> None:
    def stop(done: int, layers: int, name: str) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corrected(algorithm, seen=True, journal=tmp_path, progress=stop)
    resumed, whole = corrected(algorithm, seen=True, journal=tmp_path), corrected(algorithm, seen=True)
    for name, t in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], t), name


def test_a_failure_puts_plain_layers_back() -> None:
    def stop(done: int, layers: int, name: str) -> None:
        if done == 9:
            raise RuntimeError("stop")

    model, ids = tiny_llama(), tiny_ids()
    state, wanted = set(model.state_dict()), model(ids)
    with pytest.raises(RuntimeError, match="stop"):
        quantize_(model, {LAYERS: "int3wo-16"}, algorithm="rtn+lowrank-2", restore=True, progress=stop)
    assert {type(m) for m in linears(model)} == {nn.Linear}
    assert set(model.state_dict()) == state
    assert torch.equal(model(ids), wanted)


# What is refused ----------------------------------------------------------------------------------


def test_what_cannot_have_one_is_refused() -> None:
    class Other(nn.Linear):
        pass

    for module, rule, match in (
        (nn.Linear(16, 8), "rtn+lowrank-9", r"the rank of a weight \(8, 16\) is at most 8"),
        (Other(16, 8), "rtn+lowrank-2", "this is Other"),
        (nn.Embedding(8, 16), "rtn+lowrank-2", "this is Embedding"),
        (nn.Embedding(8, 16), "incoherence+rtn", "this is Embedding"),
    ):  # fmt: skip
        model = nn.Sequential(module)
        with pytest.raises(
            ValueError, match=rf"0 cannot have (lowrank-\d|incoherence): .*{match}.*layer-not-quantizable"
        ):
            quantize_(model, {"0": "int4wo-16"}, algorithm=rule)
        assert not isinstance(model[0].weight, QuantizedTensor)
