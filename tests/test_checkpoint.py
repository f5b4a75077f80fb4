"""Saved and loaded models: equal to the last bit for every format, and never half written or half loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import each_format, same_bits, weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit import QuantizedTensor, calibrate, parse_format, quantize_
from lowbit.checkpoint import CheckpointError, load, read, save, verify
from lowbit.checkpoints import files
from lowbit.formats.activation import Activation
from lowbit.formats.base import register, unregister
from lowbit.formats.int import IntFormat
from lowbit.specs import EXAMPLES

N, K = 48, 512  # whole groups for every format's default size


class Net(nn.Module):
    """One of everything that can be quantized, a norm, a buffer, and a head that may share the embedding's table."""

    def __init__(self, n: int = N, k: int = K, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(n, k)
        self.conv = nn.Conv2d(3, 4, (3, 2))
        self.up = nn.Linear(k, n)
        self.down = nn.Linear(n, k, bias=False)
        self.norm = nn.LayerNorm(k)
        self.head = nn.Linear(k, n, bias=False)
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("scratch", torch.zeros(2, device="cpu"), persistent=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.down(self.up(self.embed(ids)))))


def net(dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs).to(dtype)


def meta(**kwargs: Any) -> Net:
    with torch.device("meta"):
        return Net(**kwargs)


def put(model: nn.Module, name: str, w: QuantizedTensor) -> None:
    model.get_submodule(name).weight = nn.Parameter(w, requires_grad=False)  # type: ignore[assignment]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal names, and equal tensors down to planes, activations and logical dtypes."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert isinstance(x, QuantizedTensor) == isinstance(y, QuantizedTensor), name
        if not isinstance(x, QuantizedTensor):
            assert same_bits(x.detach(), y.detach()), name
            continue
        assert isinstance(y, QuantizedTensor)
        assert (x.format, x.act) == (y.format, y.act), name
        for plane, t in x.planes.items():
            assert t.shape == y.planes[plane].shape, (name, plane)
            assert same_bits(t, y.planes[plane]), (name, plane)
        assert (x.act_scale is None) == (y.act_scale is None), name
        assert x.act_scale is None or same_bits(x.act_scale, y.act_scale), name


def round_trip(model: nn.Module, directory: Path, **kwargs: Any) -> dict[str, Any]:
    """Save, verify, load into a model on the meta device, compare. Returns the `quantization_config`."""
    save(model, directory)
    assert verify(directory).ok
    assert_same(dict(model.state_dict()), dict(load(meta(**kwargs), directory).state_dict()))
    assert_same(dict(model.state_dict()), read(directory))
    return json.loads((directory / "config.json").read_text()).get("quantization_config")  # type: ignore[no-any-return]


# Every format ---------------------------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("kind", ["normal", "zeros"])
def test_every_format_comes_back_bit_by_bit(fmt: Any, kind: str, tmp_path: Path) -> None:
    model = net(torch.float16)
    for name in ("up", "down", "head"):
        w = model.get_submodule(name).weight
        put(model, name, QuantizedTensor.from_float(weights(kind, *w.shape).to(w.dtype), fmt))  # type: ignore[operator]
    round_trip(model, tmp_path / "linear")
    for name in ("embed", "conv"):
        put(model, name, QuantizedTensor.from_float(model.get_submodule(name).weight, fmt))  # type: ignore[arg-type]
    assert round_trip(model, tmp_path / "all")["quant_method"] == "lowbit"


@each_format
def test_partial_tiles_come_back(fmt: Any, tmp_path: Path) -> None:
    model = net(torch.float32, n=5, k=77)
    for name in ("up", "down", "head"):
        put(model, name, QuantizedTensor.from_float(model.get_submodule(name).weight, fmt))  # type: ignore[arg-type]
    round_trip(model, tmp_path, n=5, k=77)


@pytest.mark.parametrize("spec", EXAMPLES)
def test_every_config_comes_back(spec: str, tmp_path: Path) -> None:
    model = net()
    statistics = calibrate(model, [torch.arange(N).view(1, N)])
    quantize_(model, {"up": spec, "head": spec}, calibration=statistics, measure=False)
    round_trip(model, tmp_path)


def test_several_formats_in_one_model(tmp_path: Path) -> None:
    model = net()
    quantize_(model, {"up": "int4wo-128", "down": "float8dq-row", "head": None}, measure=False)
    config = round_trip(model, tmp_path / "standard")
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "mixed-precision"
    quantize_(model, {"head": "nf4wo-64", "embed": "int8wo"}, measure=False)
    config = round_trip(model, tmp_path / "own")
    assert config == {
        "quant_method": "lowbit",
        "format_version": 1,
        "weights": {
            "embed.weight": "int8:row",
            "up.weight": "int4:g128:asym",
            "down.weight": "float8_e4m3:row->float8_e4m3:row",
            "head.weight": "nf4:g64",
        },
    }


def test_a_new_format_needs_nothing_here(tmp_path: Path) -> None:
    @register("toy")
    class ToyFormat(IntFormat):
        spec = "toy:g32"  # type: ignore[assignment]

        @classmethod
        def from_spec(cls, name: str, *options: str) -> ToyFormat:
            return cls(3, parse_format("int3:g32").granularity, False)  # type: ignore[attr-defined]

    try:
        model = net()
        put(model, "up", QuantizedTensor.from_float(model.up.weight, parse_format("toy:g32")))
        round_trip(model, tmp_path)
    finally:
        unregister("toy")
    with pytest.raises(CheckpointError, match="toy"):
        load(meta(), tmp_path)
    with pytest.raises(CheckpointError, match="toy:g32, which is not registered"):
        save(model, tmp_path)


def test_global_scales_without_an_exact_inverse(tmp_path: Path) -> None:
    """NVFP4's global scale is stored as its inverse; where that loses the last bit, the manifest keeps it."""
    model, lost = net(), 0
    for seed in range(12):
        w = QuantizedTensor.from_float(weights("normal", N, K, seed), parse_format("nvfp4"))
        lost += not torch.equal(w.outer_scale.reciprocal().reciprocal(), w.outer_scale)
        put(model, "up", w)
        assert round_trip(model, tmp_path)["quant_method"] == "compressed-tensors"
    assert 0 < lost < 12


# On disk --------------------------------------------------------------------------------------------------------------


@each_format
def test_the_file_is_a_header_the_planes_and_the_shape(fmt: Any, tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(33, 100)})
    put(model, "embed", QuantizedTensor.from_float(model["embed"].weight, fmt))  # type: ignore[arg-type]
    save(model, tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + fmt.nbytes(33, 100) + 2 * 8


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for run in ("a", "b"):
        model = net()
        quantize_(model, "int4wo-128-sym", lambda m, name: name in ("up", "head"), measure=False)
        save(model, tmp_path / run, config={"architectures": ["Net"]})
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["config.json", "lowbit_manifest.json", "model.safetensors"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shards(tmp_path: Path) -> None:
    model = net()
    quantize_(model, {"up": "nvfp4wo"}, measure=False)
    save(model, tmp_path, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in tmp_path.glob("*.safetensors")}
    sizes = [
        len(raw) - 8 - int.from_bytes(raw[:8], "little")
        for raw in (p.read_bytes() for p in tmp_path.glob("*.safetensors"))
    ]
    assert len(sizes) > 3
    assert sum(sizes) == index["metadata"]["total_size"]
    largest = model.embed.weight.nbytes  # one tensor alone may be larger than a shard
    assert all(size <= 30_000 or size == largest for size in sizes)
    assert_same(dict(model.state_dict()), read(tmp_path))
    save(model, tmp_path)  # one file again: the shards and their index go
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "lowbit_manifest.json", "model.safetensors"]
    assert_same(dict(model.state_dict()), dict(load(meta(), tmp_path).state_dict()))


def test_the_models_own_config_is_kept(tmp_path: Path) -> None:
    model = net()
    quantize_(model, {"up": "int8wo"}, measure=False)
    given = {"hidden_size": K, "quantization_config": {"quant_method": "other"}}
    save(model, tmp_path / "given", config=given)
    written = json.loads((tmp_path / "given" / "config.json").read_text())
    assert written["hidden_size"] == K
    assert written["quantization_config"]["quant_method"] == "compressed-tensors"
    assert given["quantization_config"] == {"quant_method": "other"}  # the caller's dict is left alone

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text('{"vocab_size": 48}')
    save(model, tmp_path / "there")
    assert json.loads((tmp_path / "there" / "config.json").read_text())["vocab_size"] == 48

    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {"model_type": "net"}

    model.config = Config()  # type: ignore[assignment]
    save(model, tmp_path / "there")
    assert json.loads((tmp_path / "there" / "config.json").read_text())["model_type"] == "net"
    with pytest.raises(CheckpointError, match="config"):
        save(model, tmp_path / "bad", config={"dtype": torch.float32})
    assert not (tmp_path / "bad").exists()


def test_a_float_model_is_saved_too(tmp_path: Path) -> None:
    assert round_trip(net(torch.float32), tmp_path) is None


def test_views_are_stored_as_what_they_show(tmp_path: Path) -> None:
    model = net()
    whole = QuantizedTensor.from_float(weights("normal", 2 * N, K), parse_format("int4:g128"))
    put(model, "up", whole[N:])
    model.norm.weight = nn.Parameter(torch.randn(2 * K, dtype=torch.bfloat16)[::2])
    round_trip(model, tmp_path)


# Tied weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{}, {"embed": "int8wo", "head": "int8wo"}], ids=["float", "int8"])
def test_tied_weights_are_stored_once(rule: dict[str, str], tmp_path: Path) -> None:
    model = net(tie=True)
    if rule:
        quantize_(model, rule, measure=False)
    save(model, tmp_path)
    names = {t for t in files.Files(tmp_path).info if t.startswith(("embed", "head"))}
    assert all(t.startswith("embed") for t in names)
    for other in (meta(tie=True), meta(tie=False)):
        load(other, tmp_path)
        assert other.head.weight is other.embed.weight
        assert_same(dict(model.state_dict()), dict(other.state_dict()))
    state = read(tmp_path)
    assert state["head.weight"] is state["embed.weight"]


def test_a_head_quantized_apart_from_its_embedding(tmp_path: Path) -> None:
    model = net(tie=True)
    quantize_(model, {"head": "int4wo-32"}, measure=False)
    save(model, tmp_path)
    other = load(meta(tie=True), tmp_path)
    assert isinstance(other.head.weight, QuantizedTensor)
    assert not isinstance(other.embed.weight, QuantizedTensor)


# Loading --------------------------------------------------------------------------------------------------------------


class LargestFloat(TorchDispatchMode):
    """Remembers the largest float tensor that any op makes, and how many bytes all ops made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_stored(t)}
        for t in tree_leaves(out):
            if is_stored(t) and t.untyped_storage().data_ptr() not in before:
                self.bytes += t.nbytes
                if t.dtype in (torch.float16, torch.bfloat16, torch.float32):
                    self.elements = max(self.elements, t.numel())
        return out


def is_stored(t: Any) -> bool:
    return isinstance(t, Tensor) and not isinstance(t, QuantizedTensor) and not t.is_meta


@pytest.mark.parametrize(
    "spec", ["int4wo-128", "int8wo", "float8dq-row", "nvfp4wo", "mxfp4wo", "int3wo-64", "nf4wo-64"]
)
def test_loading_never_makes_float_weights(spec: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1024, 512, bias=False)).bfloat16()
    quantize_(model, spec, measure=False)
    save(model, tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(1024, 512, bias=False))
    with LargestFloat() as seen:
        load(empty, tmp_path)
    packed = empty[0].weight.nbytes_packed  # type: ignore[operator,union-attr]
    assert seen.elements <= 1024 * 512 // 32  # scales
    assert seen.bytes <= 2 * packed + 4096  # one copy out of the file, at most one conversion of each plane


def test_load_puts_weights_where_it_is_told(tmp_path: Path) -> None:
    model = net()
    quantize_(model, {"up": "int8wo"}, measure=False)
    save(model, tmp_path)
    other = net()
    trainable = other.down.weight.requires_grad
    load(other, tmp_path, device="cpu")
    assert other.up.weight.device.type == "cpu"
    assert not other.up.weight.requires_grad
    assert other.down.weight.requires_grad == trainable
    x = torch.arange(7).view(1, 7)
    assert torch.equal(model(x), other(x))


def test_read_gives_what_load_state_dict_takes(tmp_path: Path) -> None:
    model = net()
    quantize_(model, {"up": "codebook4wo-64", "embed": "int8wo"}, measure=False)
    save(model, tmp_path)
    other = meta()
    other.load_state_dict(read(tmp_path), assign=True)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


def test_everything_that_does_not_fit_the_model_is_listed_and_nothing_changes(tmp_path: Path) -> None:
    model = net()
    quantize_(model, {"up": "int4wo-128", "down": "int8dq"}, measure=False)
    save(model, tmp_path)
    other = net()
    other.up = nn.Linear(K, N + 1)
    del other.down
    other.extra = nn.Linear(2, 2)
    other.steps = torch.zeros(5)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load(other, tmp_path)
    text = "\n".join(error.value.problems)
    assert f"up.weight has shape [{N}, {K}] in the checkpoint, [{N + 1}, {K}] in the model" in text
    assert "down.weight is in the checkpoint, but not in the model" in text
    assert "extra.weight [2, 2] is in the model, but not in the checkpoint" in text
    assert "steps is I64 [5], the model has torch.float32" in text
    assert len(error.value.problems) == 6  # and two biases
    assert_same(before, dict(other.state_dict()))


def test_strict_false_takes_what_both_have(tmp_path: Path) -> None:
    model = net()
    quantize_(model, {"up": "int4wo-128"}, measure=False)
    save(model, tmp_path)
    other = net()
    other.extra = nn.Linear(2, 2)
    del other.norm
    load(other, tmp_path, strict=False)
    assert isinstance(other.up.weight, QuantizedTensor)


def test_quantized_activations_need_a_linear(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(64, 8, bias=False)})
    quantize_(model, "int8dq", measure=False)
    save(model, tmp_path)
    with pytest.raises(CheckpointError, match="needs a Linear; the model has a Embedding"):
        load(nn.ModuleDict({"layer": nn.Embedding(8, 64)}), tmp_path)


def test_buffers_that_are_never_stored_must_exist(tmp_path: Path) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", torch.ones(3), persistent=False)

    save(Rotary(), tmp_path)
    load(Rotary(), tmp_path)
    with torch.device("meta"):
        empty = Rotary()
    with pytest.raises(CheckpointError, match="angles"):
        load(empty, tmp_path)


# What save refuses ----------------------------------------------------------------------------------------------------


def test_save_names_every_unfit_weight_and_writes_nothing(tmp_path: Path) -> None:
    model = net()
    quantize_(model, {"up": "int4wo-128", "down": "nvfp4wo", "head": "int8wo"}, measure=False)
    model.up.weight.scale[3, 1] = float("nan")  # type: ignore[index,union-attr]
    model.down.weight.outer_scale.fill_(float("inf"))  # type: ignore[operator,union-attr]
    model.head.weight.scale[:2] = 0  # type: ignore[index,operator,union-attr]
    model.norm.to("meta")
    with pytest.raises(CheckpointError) as error:
        save(model, tmp_path / "out")
    found = "\n".join(error.value.problems)
    assert f"up.weight: scale (int4:g128:asym) holds 1 NaN or Inf of {N * K // 128} values" in found
    assert "down.weight: outer_scale (nvfp4) holds 1 NaN or Inf of 1 values" in found
    assert f"head.weight: scale (int8:row) holds 2 zeros of {N} values" in found
    assert "norm.weight is on the meta device" in found
    assert len(error.value.problems) == 5  # and the bias of norm
    assert not (tmp_path / "out").exists()


def test_zero_scales_where_they_mean_zero(tmp_path: Path) -> None:
    """Symmetric one-bit codes are -1 and 1; a group of zeros has scale 0. Asymmetric ones have a code for zero."""
    model = net()
    put(model, "up", QuantizedTensor.from_float(torch.zeros(N, K), parse_format("int1:g128")))
    assert not model.up.weight.scale.any()  # type: ignore[operator,union-attr]
    round_trip(model, tmp_path)
    put(model, "up", QuantizedTensor.from_float(torch.randn(N, K), parse_format("int1:g64:asym")))
    model.up.weight.scale.zero_()  # type: ignore[operator,union-attr]
    with pytest.raises(CheckpointError, match="zeros"):
        save(model, tmp_path)


def test_a_static_activation_without_its_scale(tmp_path: Path) -> None:
    model, fmt = net(), parse_format("float8_e4m3:tensor")
    put(model, "up", QuantizedTensor.from_float(model.up.weight, fmt, Activation(fmt, static=True)))
    with pytest.raises(CheckpointError, match="calibrated"):
        save(model, tmp_path)


def test_fp64_weights(tmp_path: Path) -> None:
    model = net(torch.float64)
    quantize_(model, {"up": "int8wo"}, measure=False)
    with pytest.raises(CheckpointError, match=r"up.weight computes in torch.float64"):
        save(model, tmp_path)
    model.float()
    round_trip(model, tmp_path)


def test_weights_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"theirs")
    with pytest.raises(CheckpointError, match="model-00001-of-00002"):
        save(net(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]


def test_more_than_tensors(tmp_path: Path) -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> object:
            return {"python": "object"}

        def set_extra_state(self, state: object) -> None: ...

    with pytest.raises(CheckpointError, match="only tensors"):
        save(Extra(), tmp_path)


# Interrupted saves ----------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_an_interrupted_save_never_looks_complete(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before any step, a directory has the old model, or the new one, or none that loads: the last only where
    putting the old files back is what fails, too."""
    old, new = net(), net()
    quantize_(old, {"up": "int8wo"}, measure=False)
    quantize_(new, {"up": "int4wo-128", "down": "int8wo"}, measure=False)
    states = [dict(old.state_dict()), dict(new.state_dict())]
    original = getattr(os, function)
    outcomes = set()
    for step in range(100):
        directory = tmp_path / str(step)
        save(old, directory, max_shard_bytes=30_000)
        left = iter([True] * step)

        def stop(*args: Any, left: Any = left) -> Any:
            if not next(left, False):
                raise Crash
            return original(*args)

        monkeypatch.setattr(os, function, stop)
        try:
            save(new, directory, max_shard_bytes=60_000)
            crashed = False
        except Crash:
            crashed = True
        monkeypatch.setattr(os, function, original)
        assert not list(directory.glob(".*.tmp"))
        try:
            got = read(directory)
            assert_same(next(s for s in states if quantized(s) == quantized(got)), got)
            outcomes.add("loads")
        except CheckpointError:
            assert crashed
            with pytest.raises(CheckpointError):  # not by the checksums alone
                read(directory, verify=False)
            outcomes.add("refused")
            save(new, directory)  # and the next attempt repairs it
            assert_same(states[1], read(directory))
        if not crashed:
            break
    assert not crashed
    assert outcomes == ({"loads", "refused"} if function == "replace" else {"loads"})


def quantized(state: dict[str, Tensor]) -> set[str]:
    return {name for name, t in state.items() if isinstance(t, QuantizedTensor)}
