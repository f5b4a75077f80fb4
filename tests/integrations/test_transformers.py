"""lowbit as a quantizer of transformers: on the fly, saved, read again, run."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit import QuantizedTensor, quantize_
from lowbit.checkpoint import CheckpointError, verify

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from tiny_transformers import IDS, llama, logits, quantized_weights, saved
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from lowbit.formats.base import CHUNK_ELEMENTS
from lowbit.integrations.transformers import LowbitConfig, packed_config

# One per family of formats, in both conventions, with and without quantized activations.
SPECS = ("int8wo", "int4wo-32", "int4wo-128-sym", "int3wo-64", "float8wo", "float8dq-block", "int8dq", "nvfp4wo",
         "nvfp4dq", "mxfp4wo", "mxfp6wo", "nf4wo-64-dq", "codebook4wo-64")  # fmt: skip
OWN = ("int3wo-64", "nvfp4dq", "mxfp6wo", "nf4wo-64-dq", "codebook4wo-64")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama(), tmp_path_factory.mktemp("float"))


def on_the_fly(source: Path, config: Any, **kwargs: Any) -> PreTrainedModel:
    kwargs.setdefault("quantization_config", config if isinstance(config, LowbitConfig) else LowbitConfig(config))
    return AutoModelForCausalLM.from_pretrained(source, **kwargs)  # type: ignore[no-any-return]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """All parameters equal to the bit, quantized ones as planes."""
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    assert left.keys() == right.keys()
    for name, w in left.items():
        assert type(w) is type(right[name]), name
        assert torch.equal(w, right[name]), name


@pytest.mark.parametrize("algorithm", ["rtn+lowrank-4", "incoherence+rtn"])
def test_what_lies_beside_weights_is_written_and_read(algorithm: str, source: Path, tmp_path: Path) -> None:
    """Dropped without a word, it would leave a model that computes something else."""
    model = AutoModelForCausalLM.from_pretrained(source)
    quantize_(model, {"re:model.layers.*": "int3wo-64"}, algorithm=algorithm)
    lowbit.save(model, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(again, model)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "twice"), model)


# On the fly -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_loading_is_quantize_(spec: str, source: Path) -> None:
    """Also the second trap: a loader that casts float weights to the dtype of codes before they are quantized."""
    got, expected = on_the_fly(source, spec), llama()
    report = quantize_(expected, {"lm_head": None, "_default": spec})
    assert_same(got, expected)
    assert torch.equal(logits(got), logits(expected))
    rows = got.hf_quantizer.report.quantized
    assert [(r.name, r.format, r.sqnr_db) for r in rows] == [(r.name, r.format, r.sqnr_db) for r in report.quantized]
    assert min(r.sqnr_db or 0.0 for r in rows) > 10


def test_the_requested_dtype_is_quantized(source: Path) -> None:
    got, expected = on_the_fly(source, "int8wo", dtype=torch.float32), llama().float()
    quantize_(expected, {"lm_head": None, "_default": "int8wo"})
    assert_same(got, expected)


def test_rules_mean_what_they_mean_in_quantize_(source: Path) -> None:
    rules = {
        "model.layers.0.mlp.down_proj": None, "re:.*self_attn.*": "int8wo", "lm_head": "float8wo",
        "model.embed_tokens": "int4wo-64", "_default": "nf4wo-64",
    }  # fmt: skip
    got, expected = on_the_fly(source, rules), llama()
    report = quantize_(expected, rules)
    assert_same(got, expected)
    assert [r.name for r in got.hf_quantizer.report.skipped] == [r.name for r in report.skipped]


@pytest.mark.parametrize(
    ("names", "left"),
    [(None, ["lm_head"]), ([], []), (["down_proj", "model.layers.0"], ["0.", "down_proj"]), (["lm_head"], ["lm_head"])],
)
def test_modules_to_not_convert(names: list[str] | None, left: list[str], source: Path) -> None:
    got = on_the_fly(source, LowbitConfig("int8wo", names))
    for name, module in got.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module.weight, QuantizedTensor) != any(part in name for part in left), name
    assert len(got.hf_quantizer.report.layers) == 15


def test_what_is_refused_before_anything_is_read(source: Path) -> None:
    with pytest.raises(ValueError, match=r"not both.*conflicting-rules"):
        LowbitConfig({"_default": "int8wo"}, ["lm_head"])
    with pytest.raises(ValueError, match=r"unknown config 'int9wo'"):
        LowbitConfig("int9wo")
    with pytest.raises(ValueError, match="rules that match no layer"):
        on_the_fly(source, {"model.layers.7": "int8wo"})
    with pytest.raises(ValueError, match=r"q_proj needs a calibrated activation scale for int8sq"):
        on_the_fly(source, "int8sq")
    rules = {"model.embed_tokens": "int8dq"}
    with pytest.raises(
        ValueError, match=r"embed_tokens cannot be quantized to int8dq: only Linear takes quantized act"
    ):
        on_the_fly(source, rules)
    got = on_the_fly(source, LowbitConfig(rules, on_unsupported="skip"))
    assert not quantized_weights(got)
    assert [r.name for r in got.hf_quantizer.report.skipped] == ["model.embed_tokens"]


def test_a_nan_is_named(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = float("nan")
    saved(model, tmp_path)
    logger = logging.getLogger("transformers")
    logger.propagate = True
    try:
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            on_the_fly(tmp_path, "int4wo-32")
    finally:
        logger.propagate = False
    assert "NaN or Inf values in model.layers.1.mlp.up_proj (1 of 32768)" in caplog.text


# Tied weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama(tie_word_embeddings=True), tmp_path_factory.mktemp("tied"))


def test_a_tied_output_projection_stays(tied: Path) -> None:
    got = on_the_fly(tied, "int4wo-32")
    assert got.lm_head.weight is got.model.embed_tokens.weight
    assert not isinstance(got.lm_head.weight, QuantizedTensor)


def test_quantizing_the_table_quantizes_both(tied: Path, tmp_path: Path) -> None:
    got = on_the_fly(tied, {"model.embed_tokens": "int8wo", "_default": "int8wo"})
    assert got.lm_head.weight is got.model.embed_tokens.weight
    assert isinstance(got.lm_head.weight, QuantizedTensor)
    expected = llama(tie_word_embeddings=True)
    quantize_(expected, {"model.embed_tokens": "int8wo", "_default": "int8wo"})
    assert torch.equal(logits(got), logits(expected))
    [head] = [row for row in got.hf_quantizer.report if row.name == "lm_head"]
    assert (head.note, head.bytes_after) == ("shares model.embed_tokens", 0)
    with pytest.raises(
        ValueError, match=r"lm_head.weight is tied to model.embed_tokens.weight, .* float8wo and int8wo"
    ):
        on_the_fly(tied, {"model.embed_tokens": "int8wo", "lm_head": "float8wo"})
    got.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same(again, got)


def test_quantizing_the_projection_alone_unties_it(tied: Path, tmp_path: Path) -> None:
    got, expected = on_the_fly(tied, {"lm_head": "int8wo"}), llama(tie_word_embeddings=True)
    quantize_(expected, {"lm_head": "int8wo"})
    assert_same(got, expected)
    assert not isinstance(got.model.embed_tokens.weight, QuantizedTensor)
    got.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, config=packed_config(tmp_path))
    assert_same(again, got)


# Saved and read again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_saved_comes_back_packed(spec: str, source: Path, tmp_path: Path) -> None:
    model = on_the_fly(source, spec)
    model.save_pretrained(tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == ("lowbit" if spec in OWN else "compressed-tensors")
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=packed_config(tmp_path), output_loading_info=True
    )
    assert not any(info.values()), info
    assert_same(again, model)
    assert torch.equal(logits(again), logits(model))
    assert_same(lowbit.load(llama(), tmp_path), model)
    again.save_pretrained(tmp_path / "again")
    a, b = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(t.view(torch.uint8), b[n].view(torch.uint8)) for n, t in a.items())
    assert section == json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]


def test_our_own_convention_needs_no_config(source: Path, tmp_path: Path) -> None:
    model = on_the_fly(source, "int3wo-64")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert verify(tmp_path).ok


@pytest.mark.parametrize("spec", ["int4wo-32", "int3wo-64", "nvfp4wo"])
def test_a_directory_that_lowbit_saved(spec: str, source: Path, tmp_path: Path) -> None:
    model = on_the_fly(source, spec)
    lowbit.save(model, tmp_path)
    config = packed_config(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, config=config), model)
    # One bit: the manifest's checksum finds it, and nothing is loaded.
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="was changed since it was saved"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=packed_config(tmp_path))
    AutoModelForCausalLM.from_pretrained(tmp_path, config=packed_config(tmp_path, verify=False))


def test_other_dtypes_and_base_models(source: Path, tmp_path: Path) -> None:
    model = on_the_fly(source, "int3wo-64")
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    codes = [m.model.layers[0].mlp.up_proj.weight.planes for m in (half, model)]
    assert all(torch.equal(plane, codes[1][name]) for name, plane in codes[0].items())
    assert half.lm_head.weight.dtype == torch.float16
    assert_same(AutoModel.from_pretrained(tmp_path), model.model)


def test_a_description_that_was_damaged(source: Path, tmp_path: Path) -> None:
    on_the_fly(source, "int3wo-64").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for text, expected in (
        ("{", "cannot be read"),
        ('{"format_version": 2, "weights": {}, "tied": {}}', "format version is not 1"),
        ('{"format_version": 1, "weights": {}, "tied": {}, "more": 1}', r"unknown keys \['more'\]"),
        ('{"format_version": 1, "weights": {}, "tied": {}}', "format_version is 1, expected None"),
    ):
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt", "lowbit.weights": text})
        with pytest.raises(CheckpointError, match=expected):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_packed_config_refuses_what_lowbit_does_not_read(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quant_method is None"):
        packed_config(source)
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(CheckpointError, match="quant_method is 'quip'"):
        packed_config(tmp_path)


# The first trap: lowbit was not imported ------------------------------------------------------------------------------

WITHOUT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(name.startswith("lowbit") for name in sys.modules)
print(model(torch.arange(8).view(1, -1)).logits.double().sum().item())
"""


@pytest.mark.parametrize("how", ["save_pretrained", "save"])
def test_without_lowbit_our_own_convention_is_refused(how: str, source: Path, tmp_path: Path) -> None:
    """transformers only warns of an unknown method; what stops it is that the weight's name holds another shape."""
    model = on_the_fly(source, "int3wo-64")
    model.save_pretrained(tmp_path) if how == "save_pretrained" else lowbit.save(model, tmp_path)
    done = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "Unknown quantization type, got lowbit" in done.stderr
    assert "q_proj.weight" in done.stderr
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_without_lowbit_compressed_tensors_are_read_right(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = on_the_fly(source, "int8wo-128")
    model.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = logits(model, torch.arange(8).view(1, -1)).double().sum().item()
    assert abs(float(done.stdout) - expected) <= 0.02 * abs(expected) + 0.5


# Running --------------------------------------------------------------------------------------------------------------


def test_generate_compiled_with_a_static_cache(source: Path) -> None:
    model = on_the_fly(source, "int4wo-32", dtype=torch.float32)
    plain = model.generate(IDS[:, :5], max_new_tokens=6, do_sample=False)
    static = model.generate(IDS[:, :5], max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert plain.shape == (1, 11)
    assert torch.equal(plain, static)
    expected = logits(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits(model), expected)
    compiled = model.generate(IDS[:, :5], max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(plain, compiled)


def test_the_model_is_a_model(source: Path) -> None:
    model = on_the_fly(source, "int4wo-32")
    assert model.is_quantized
    assert model.hf_quantizer.is_trainable
    assert not on_the_fly(source, "int8dq").hf_quantizer.is_trainable
    twin = copy.deepcopy(model)
    assert_same(twin, model)
    packed = sum(w.nbytes_packed for w in quantized_weights(model).values())
    rest = sum(w.numel() * 2 for n, w in model.named_parameters() if n not in quantized_weights(model))
    quantizer = model.hf_quantizer
    planned = sum(quantizer.param_element_size(model, n, w) * w.numel() for n, w in model.named_parameters())
    assert planned == packed + rest


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_learns_on_top(source: Path) -> None:
    peft = pytest.importorskip("peft")
    base = on_the_fly(source, "int4wo-32")
    before = [w.dequantize() for w in quantized_weights(base).values()]
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    trainable = [w for w in model.parameters() if w.requires_grad]
    assert len(trainable) == 8
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-2), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    after = quantized_weights(model).values()
    assert all(torch.equal(w.dequantize(), old) for w, old in zip(after, before, strict=True))
    with pytest.raises(NotImplementedError, match="op-not-defined"):
        model.merge_and_unload()


def test_the_config_can_be_written_down(source: Path) -> None:
    config = LowbitConfig({"lm_head": None, "_default": lowbit.Int4WeightOnlyConfig(64)})
    assert config.to_dict() == {"quant_method": "lowbit", "config": {"lm_head": None, "_default": "int4wo-64"}}
    assert "int8wo" in LowbitConfig("int8wo").to_json_string()
    with pytest.raises(CheckpointError, match="with the format of each weight"):
        LowbitConfig.from_dict(config.to_dict())
    assert AutoConfig.from_pretrained(source).model_type == "llama"


# Memory ---------------------------------------------------------------------------------------------------------------

MEMORY = """
import re, sys, threading, time
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from lowbit.integrations.transformers import LowbitConfig, packed_config

torch.set_num_threads(1)

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak(load):
    top, stop = [anonymous()], threading.Event()
    before = top[0]
    def watch():
        while not stop.wait(0.0005):
            top[0] = max(top[0], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    model = load()
    stop.set()
    thread.join()
    return top[0] - before, model

small, big, out = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(small, quantization_config=LowbitConfig("int4wo-128"))  # what is loaded once
used, model = peak(lambda: AutoModelForCausalLM.from_pretrained(big, quantization_config=LowbitConfig("int4wo-128")))
model.save_pretrained(out)
del model
again, _ = peak(lambda: AutoModelForCausalLM.from_pretrained(out, config=packed_config(out)))
print(used, again)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_the_float_model_exists_at_no_time(source: Path, tmp_path: Path) -> None:
    model = llama(hidden_size=1024, intermediate_size=2048, num_hidden_layers=12, vocab_size=64)
    saved(model, tmp_path / "big")
    floats = sum(w.numel() * w.element_size() for w in model.parameters())
    quantize_(model, {"lm_head": None, "_default": "int4wo-128"}, measure=False)
    packed = sum(w.nbytes_packed if isinstance(w, QuantizedTensor) else w.nbytes for w in model.parameters())
    # Two layers, the few fp32 copies of some rows that quantizing takes, and what malloc keeps for later.
    allowed = packed + 2 * (1024 * 2048 * 2) + 16 * 4 * CHUNK_ELEMENTS
    # glibc keeps freed blocks of up to 32 MB for later, unless told to give back all that are larger than this.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", MEMORY, source, tmp_path / "big", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    used, again = map(int, done.stdout.split())
    print("MB: float", floats / 1e6, "packed", packed / 1e6, "on the fly", used / 1e6, "read again", again / 1e6)
    assert used <= allowed < 0.6 * floats
    assert again <= allowed
