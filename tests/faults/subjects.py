"""The checkpoints that are damaged: lowbit's own in both conventions, those of other tools, and language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foreign_layers
import gguf
import torch
from foreign_layers import K, N
from tiny_llama import CONFIG, tiny_llama
from torch import Tensor, nn

from lowbit import QuantizedTensor, quantize_, save
from lowbit.checkpoint import read

OWN = {"compressed-tensors": {"a": "int4wo-32", "b": "nvfp4wo"}, "lowbit": {"a": "int3wo-64", "b": "nf4wo-64"}}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(64, 24), "b": nn.Linear(32, 40, bias=False), "norm": nn.LayerNorm(40)})


def foreign_net() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(K, N), "b": nn.Linear(3, 2, bias=False)}).half()


def own(directory: Path, convention: str) -> Path:
    """A checkpoint in one of lowbit's conventions, in two files with an index."""
    model = net()
    quantize_(model, OWN[convention], measure=False)
    save(model, directory, max_shard_bytes=1200)
    return directory


def foreign(directory: Path, kind: str) -> Path:
    """A checkpoint of another tool; no manifest vouches for it."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "compressed-tensors":
        model = foreign_net()
        quantize_(model, {"a": "int4wo-32"}, measure=False)
        save(model, directory, config={"model_type": "net", "dtype": "float16"})
        (directory / "lowbit_manifest.json").unlink()
        return directory
    tensors, section = FOREIGN[kind]()
    return foreign_layers.write(directory, tensors, section)


def _fp8() -> tuple[dict[str, Any], dict[str, Any]]:
    section = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["b"],
    }  # fmt: skip
    return foreign_layers.fp8((1, 1))[0], section


def _first_and_last(made: tuple[Any, Any, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return made[0], made[2]


FOREIGN = {
    "gptq": lambda: _first_and_last(foreign_layers.gptq(4, 16, False, 1)),
    "gptq-symmetric": lambda: _first_and_last(foreign_layers.gptq(4, 32, True, 2)),
    "awq": lambda: _first_and_last(foreign_layers.awq(16)),
    "bitsandbytes-nf4": lambda: _first_and_last(foreign_layers.nf4(True)),
    "bitsandbytes-int8": lambda: _first_and_last(foreign_layers.llm_int8()),
    "fp8": _fp8,
}
KINDS = (*FOREIGN, "compressed-tensors")


def huggingface(directory: Path) -> Path:
    """A language model as `load_model` reads it from a directory."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": CONFIG.hidden_size, "vocab_size": CONFIG.vocab_size,
        "intermediate_size": CONFIG.intermediate_size, "max_position_embeddings": CONFIG.max_positions,
        "num_attention_heads": CONFIG.num_heads, "num_hidden_layers": CONFIG.num_layers,
        "num_key_value_heads": CONFIG.num_kv_heads, "rms_norm_eps": CONFIG.norm_eps, "rope_theta": CONFIG.rope_theta,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    save_file(dict(tiny_llama().state_dict()), directory / "model.safetensors")
    return directory


def gguf_file(path: Path) -> Path:
    """The same as a GGUF file, with a vocabulary and one quantized tensor; names and order are llama.cpp's."""
    model, c = tiny_llama(), CONFIG
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    writer.add_token_types([1] * c.vocab_size)
    from lowbit.models.gguf import _GLOBAL_NAMES, _LAYER_NAMES

    theirs = {ours: name for name, ours in (_GLOBAL_NAMES | _LAYER_NAMES).items()}
    for name, tensor in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        block = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            block = f"blk.{number}."
        writer.add_tensor(f"{block}{theirs[stem]}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def state(directory: Path, verify: bool = True) -> dict[str, Tensor]:
    return read(directory, verify=verify)


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, formats, dtypes and bits."""
    if a.keys() != b.keys():
        return False
    return all(_same(a[name], b[name]) for name in a)


def _same(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, QuantizedTensor) or isinstance(b, QuantizedTensor):
        if not (isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor)):
            return False
        alike = (a.format, a.act, a.shape, a.dtype) == (b.format, b.act, b.shape, b.dtype)
        return alike and all(_same(a.planes[p], b.planes[p]) for p in a.planes)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def untouched(model: nn.Module) -> bool:
    """Whether a model on the meta device has got no value."""
    return all(t.is_meta for t in model.state_dict().values())


def on_meta(make: Any) -> nn.Module:
    with torch.device("meta"):
        return make()  # type: ignore[no-any-return]
