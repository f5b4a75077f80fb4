"""A program for one or two processes: SGLang's own layers with lowbit's plugin, filled by SGLang's own loaders, and
compared with lowbit's layers. Writes what it found for each scheme as JSON; test_sglang.py starts it and reads that.

    python sglang_ranks.py out.json world rank address
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engine_models import (
    DTYPE,
    HEAD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCAB,
    X,
    compare,
    quantized,
    rules_of,
    section_of,
    stored,
)
from proofs import WRITTEN
from safetensors.torch import load_file, save_file
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import (
    init_distributed_environment,
    initialize_model_parallel,
    tensor_model_parallel_all_reduce,
)
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization import get_quantization_config
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_loader.loader import DefaultModelLoader, _get_quantization_config, _initialize_model
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.models import llama as sglang_llama
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_context, get_parallel
from tiny_transformers import llama
from torch import Tensor, nn

import lowbit
from lowbit.integrations.sglang import MERGED, register
from lowbit.specs import EXAMPLES


class Parallel(nn.Module):
    """The model of engine_models.py in SGLang's layers."""

    def __init__(self, quant_config: Any) -> None:
        super().__init__()
        self.quant_config = quant_config
        q: dict[str, Any] = {"quant_config": quant_config, "params_dtype": DTYPE}
        self.embed_tokens = VocabParallelEmbedding(VOCAB, HIDDEN, prefix="embed_tokens", **q)
        self.attn = nn.Module()
        self.attn.qkv_proj = QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix="attn.qkv_proj", **q)
        self.attn.o_proj = RowParallelLinear(HEADS * HEAD, HIDDEN, bias=False, prefix="attn.o_proj", **q)
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = MergedColumnParallelLinear(
            HIDDEN, [512, 512], bias=False, prefix="mlp.gate_up_proj", **q
        )
        self.mlp.down_proj = RowParallelLinear(512, HIDDEN, prefix="mlp.down_proj", **q)
        self.fc = ColumnParallelLinear(HIDDEN, 256, gather_output=False, prefix="fc", **q)
        self.fused = MergedColumnParallelLinear(HIDDEN, [256, 256], bias=False, prefix="fused", **q)
        self.router = ReplicatedLinear(HIDDEN, 8, bias=False, prefix="router", **q)
        self.lm_head = ParallelLMHead(VOCAB, HIDDEN, prefix="lm_head", **q)
        self.config = SimpleNamespace(tie_word_embeddings=False)
        self.model = SimpleNamespace()

    #: As SGLang's Llama reads its directory.
    load_weights = sglang_llama.LlamaForCausalLM._legacy_load_weights


def config_of(section: dict[str, Any], directory: Path) -> Any:
    added = {"packed_modules_mapping": {}, "hf_config": SimpleNamespace(_name_or_path=str(directory))}
    return get_quantization_config("lowbit").from_config(section | added)


def parallel(section: dict[str, Any], directory: Path) -> Parallel:
    """SGLang's model with the weights of a directory, loaded as SGLang does it."""
    model = Parallel(config_of(section, directory))
    DefaultModelLoader.load_weights_and_postprocess(model, stored(directory), torch.device("cpu"))
    return model


CHECKS: dict[str, tuple[tuple[str, ...], Callable[[str, int, int], dict[str, str]]]] = {}


def check(specs: tuple[str, ...]) -> Callable[[Any], Any]:
    def add(f: Any) -> Any:
        CHECKS[f.__name__] = (specs, f)
        return f

    return add


def of_directory(rules: dict[str, str], method: str, world: int, rank: int) -> dict[str, str]:
    ours = quantized(rules)
    with tempfile.TemporaryDirectory() as directory:
        lowbit.save(ours, directory)
        section = section_of(Path(directory))
        assert section["quant_method"] == method
        return compare(ours, parallel(section, Path(directory)), world, rank, tensor_model_parallel_all_reduce)


@check(EXAMPLES)
def own(spec: str, world: int, rank: int) -> dict[str, str]:
    """lowbit's own convention, which quantized embeddings need."""
    return of_directory(rules_of(spec) | {"embed_tokens": "int8wo"}, "lowbit", world, rank)


@check(WRITTEN)
def compressed_tensors(spec: str, world: int, rank: int) -> dict[str, str]:
    return of_directory(rules_of(spec), "compressed-tensors", world, rank)


# SGLang's Llama -------------------------------------------------------------------------------------------------------

RULES = {
    "own": {"model.embed_tokens": "int8wo", "_default": "int4wo-32"},
    "compressed-tensors": {"_default": "int4wo-32"},
}


@check(tuple(RULES))
def whole(kind: str, world: int, rank: int) -> dict[str, str]:
    """SGLang's own way from a directory to its Llama; positions alone are left out, which take kernels of a GPU."""
    if world > 1:
        return {"two ranks": "equal"}  # the layers are cut in `own` and `compressed_tensors`
    sglang_llama.get_rope = lambda *args, **kwargs: nn.Identity()
    ours = llama(architectures=["LlamaForCausalLM"])
    lowbit.quantize_(ours, RULES[kind])
    with tempfile.TemporaryDirectory() as directory:
        lowbit.save(ours, directory)
        config = ModelConfig(directory, quantization=None if kind == "own" else "lowbit", dtype="bfloat16")
        quant_config = _get_quantization_config(config, LoadConfig())
        with set_default_torch_dtype(DTYPE):
            model = _initialize_model(config, LoadConfig(), quant_config)
        weights = DefaultModelLoader(LoadConfig())._get_all_weights(config, model)
        DefaultModelLoader.load_weights_and_postprocess(model, weights, torch.device("cpu"))
    return compare_llama(ours, model)


@torch.no_grad()
def compare_llama(ours: Any, model: Any) -> dict[str, str]:
    found: dict[str, str] = {}

    def note(name: str, got: Tensor, expected: Tensor) -> None:
        found[name] = "equal" if torch.equal(got, expected) else f"differs by {(got - expected).abs().max()}"

    x, wide = X[:, :128].contiguous(), X[:, :256].contiguous()
    for i, (a, b) in enumerate(zip(model.model.layers, ours.model.layers, strict=True)):
        attention, mlp = b.self_attn, b.mlp
        qkv = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
        note(f"{i} qkv", a.self_attn.qkv_proj(x)[0], torch.cat(qkv, -1))
        note(f"{i} o", a.self_attn.o_proj(x)[0], attention.o_proj(x))
        note(f"{i} gate_up", a.mlp.gate_up_proj(x)[0], torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1))
        note(f"{i} down", a.mlp.down_proj(wide)[0], mlp.down_proj(wide))
    ids = torch.arange(8)
    note("embedding", model.model.embed_tokens(ids), ours.model.embed_tokens(ids))
    plain = SimpleNamespace(use_fp32_lm_head=False, use_fp32_lm_head_output=False)
    note("logits", LogitsProcessor._compute_lm_head(plain, x, model.lm_head)[:, :64], ours.lm_head(x))
    return found


# SGLang's own reader of compressed-tensors ----------------------------------------------------------------------------


def picked() -> dict[str, str]:
    """Scheme -> the class with which SGLang would run it on a Hopper GPU, which is imitated, and whether its loader
    puts every tensor of a directory into that class's parameters."""
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    return {spec: picked_for(spec) for spec in WRITTEN}


def picked_for(spec: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        lowbit.save(quantized({"lm_head": None, "_default": spec}), directory)
        disk = load_file(Path(directory) / "model.safetensors")
        config = section_of(Path(directory)) | {"packed_modules_mapping": MERGED, "hf_config": None}
        try:
            model = Parallel(CompressedTensorsConfig.from_config(config))
            names = {type(layer.scheme).__name__ for layer in (model.fc, model.attn.qkv_proj, model.mlp.down_proj)}
            DefaultModelLoader.load_weights_only(model, stored(Path(directory)), torch.device("cpu"))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    held = dict(model.named_parameters())
    for name, tensor in disk.items():
        if name.startswith(("fc.", "router.", "mlp.down_proj.")):
            param = held[name].data
            if param.dtype.itemsize < tensor.dtype.itemsize or not torch.equal(param.reshape(tensor.shape), tensor):
                return f"{name} is not as on disk"
    return ", ".join(sorted(names)).removeprefix("CompressedTensors")


# What is refused ------------------------------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[Path], object]] = {}
EXPERTS = object.__new__(FusedMoE)  # of which only the class is asked


def refused(f: Callable[[Path], object]) -> Callable[[Path], object]:
    REFUSED[f.__name__] = f
    return f


def changed(directory: Path, rules: dict[str, str], change: Callable[[dict[str, Tensor]], object]) -> Parallel:
    lowbit.save(quantized(rules), directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return parallel(section_of(directory), directory)


@refused
def a_missing_tensor(directory: Path) -> object:
    return changed(directory, {"_default": "int4wo-128"}, lambda t: t.pop("attn.k_proj.weight_scale"))


@refused
def a_missing_tensor_of_our_own(directory: Path) -> object:
    return changed(directory, {"_default": "int3wo-64"}, lambda t: t.pop("fc.weight.scale"))


@refused
def another_dtype(directory: Path) -> object:
    return changed(directory, {"_default": "int8dq"}, lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.int32)}))


@refused
def parts_that_differ(directory: Path) -> object:
    lowbit.save(quantized({"attn.q_proj": "int8wo", "_default": "int4wo-32"}), directory)
    return parallel(section_of(directory), directory)


@refused
def a_config_to_quantize_by(directory: Path) -> object:
    return config_of({"quant_method": "lowbit", "config": "int4wo-128"}, directory)


@refused
def an_unknown_section(directory: Path) -> object:
    return config_of({"quant_method": "lowbit", "format_version": 2, "weights": {}}, directory)


@refused
def experts_by_name(directory: Path) -> object:
    weights = {"layers.0.experts.gate_up_proj": "int4:g128"}
    config = config_of({"quant_method": "lowbit", "format_version": 1, "weights": weights}, directory)
    return config.get_quant_method(EXPERTS, "layers.0.experts")


@refused
def a_cut_through_words_of_the_vocabulary(directory: Path) -> object:
    config = config_of({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["lm_head"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}}},
    }, directory)  # fmt: skip
    return ParallelLMHead(500, HIDDEN, params_dtype=DTYPE, prefix="lm_head", quant_config=config)


@refused
def nothing_where_no_weights_are_asked_for(directory: Path) -> object:
    lowbit.save(quantized({"_default": "int4wo-128"}), directory)
    with get_context().override_server_args(load_format="dummy", tp_size=1, device="cpu"):
        model = Parallel(config_of(section_of(directory), directory))
        return DefaultModelLoader.load_weights_and_postprocess(model, iter(()), torch.device("cpu"))


def messages() -> dict[str, str]:
    """What each of `REFUSED` says."""
    found = {}
    for name, f in REFUSED.items():
        with tempfile.TemporaryDirectory() as directory:
            try:
                f(Path(directory))
                found[name] = "nothing"
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found


def examine(world: int, rank: int, only: str) -> dict[str, dict[str, Any]]:
    notes: dict[str, dict[str, Any]] = {}
    for name, (specs, f) in CHECKS.items():
        for spec in specs:
            if only in f"{name} {spec}":
                try:
                    notes[f"{name} {spec}"] = f(spec, world, rank)
                except Exception as error:
                    notes[f"{name} {spec}"] = {
                        "error": f"{type(error).__name__}: {error}",
                        "at": traceback.format_exc(),
                    }
    return notes


def main() -> None:
    out, world, rank, address, *only = sys.argv[1:]
    torch.set_num_threads(1)
    load_plugins()
    found = get_quantization_config("lowbit").__module__
    register()  # SGLang may call it more than once
    with get_context().override_server_args(tp_size=int(world), device="cpu", quantization="lowbit"):
        ranks = {"tp_rank": int(rank), "attn_tp_rank": int(rank)}
        get_parallel().override_permanently(**ranks, pp_rank=0, attn_dp_rank=0, attn_cp_rank=0)
        init_distributed_environment(int(world), int(rank), address, int(rank), "gloo")
        initialize_model_parallel("gloo")
        notes = examine(int(world), int(rank), *(only or [""]))
        if world == "1":
            notes |= {"refused": messages(), "picked": picked(), "plugin": {"module": found}}
    Path(f"{out}.{rank}").write_text(json.dumps(notes))


if __name__ == "__main__":
    main()
