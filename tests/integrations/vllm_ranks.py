"""A program for one or two processes: vLLM's own layers with lowbit's plugin, filled by vLLM's own loaders, compared
with lowbit's layers. Writes what it found for each scheme as JSON; test_vllm.py starts it and reads that.

    python vllm_ranks.py out.json world rank address
"""

from __future__ import annotations

import json
import os
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
    Float,
    compare,
    quantized,
    rules_of,
    section_of,
    stored,
)
from proofs import WRITTEN
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as reader
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_processing
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

import lowbit
from lowbit import parse_config
from lowbit.integrations.vllm import register
from lowbit.specs import EXAMPLES

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
STACKED = WeightsMapper(orig_to_new_stacked={
    ".q_proj": (".qkv_proj", "q"), ".k_proj": (".qkv_proj", "k"), ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1),
})  # fmt: skip


class Parallel(nn.Module):
    """The same model of vLLM's layers."""

    def __init__(self, quant_config: Any) -> None:
        super().__init__()
        self.quant_config = quant_config
        quant_config.packed_modules_mapping = MERGED
        quant_config.apply_vllm_mapper(STACKED.get_rename_mapper())
        q: dict[str, Any] = {"quant_config": quant_config}
        self.embed_tokens = VocabParallelEmbedding(VOCAB, HIDDEN, params_dtype=DTYPE, **q)
        self.attn = nn.Module()
        self.attn.qkv_proj = QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV_HEADS, params_dtype=DTYPE, prefix="attn.qkv_proj", **q
        )
        self.attn.o_proj = RowParallelLinear(
            HEADS * HEAD, HIDDEN, bias=False, params_dtype=DTYPE, prefix="attn.o_proj", **q
        )
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = MergedColumnParallelLinear(
            HIDDEN, [512, 512], bias=False, params_dtype=DTYPE, prefix="mlp.gate_up_proj", **q
        )
        self.mlp.down_proj = RowParallelLinear(512, HIDDEN, params_dtype=DTYPE, prefix="mlp.down_proj", **q)
        self.fc = ColumnParallelLinear(HIDDEN, 256, params_dtype=DTYPE, prefix="fc", **q)
        self.fused = MergedColumnParallelLinear(HIDDEN, [256, 256], bias=False, params_dtype=DTYPE, prefix="fused", **q)
        self.router = ReplicatedLinear(HIDDEN, 8, bias=False, params_dtype=DTYPE, prefix="router", **q)
        self.lm_head = ParallelLMHead(VOCAB, HIDDEN, params_dtype=DTYPE, prefix="lm_head", **q)


def parallel(config: dict[str, Any], directory: Path) -> Parallel:
    """vLLM's model with the weights of a directory, loaded as vLLM does it."""
    quant_config = get_quantization_config("lowbit").from_config(config)
    quant_config.maybe_update_config(str(directory))
    model = Parallel(quant_config)
    AutoWeightsLoader(model).load_weights(stored(directory), mapper=STACKED)
    loader_config = SimpleNamespace(word_embeddings_untied_by_checkpoint=False, dtype=DTYPE, quantization="lowbit")
    finalize_layerwise_processing(model, loader_config)
    process_weights_after_loading(model, loader_config, torch.device("cpu"))
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


@check(tuple(s for s in EXAMPLES if (act := parse_config(s).scheme.act) is None or not act.static))
def online(spec: str, world: int, rank: int) -> dict[str, str]:
    """A float directory, quantized while it is loaded."""
    rules = rules_of(spec) | {"embed_tokens": "int8wo"}
    with tempfile.TemporaryDirectory() as directory:
        lowbit.save(Float(), directory)
        model = parallel({"quant_method": "lowbit", "config": rules}, Path(directory))
        if world == 1:
            ours = quantized(rules)
        else:  # each rank finds the scales of what it has
            ours = Float()
            lowbit.quantize_(ours, {"embed_tokens": "int8wo"})
            for name, layer in ours.named_modules():
                layer.config = rules.get(name, spec)  # type: ignore[assignment]
        ours.fused = Float().fused  # each of its parts has scales of its own
        ours.fused.config = spec  # type: ignore[assignment]
        return compare(ours, model, world, rank, tensor_model_parallel_all_reduce)


REFUSED: dict[str, Callable[[Path], object]] = {}


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
def another_dtype(directory: Path) -> object:
    return changed(directory, {"_default": "int8dq"}, lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.int32)}))


@refused
def parts_that_differ(directory: Path) -> object:
    return parallel({"quant_method": "lowbit", "config": {"attn.q_proj": "int8wo", "_default": "int4wo-32"}}, directory)


@refused
def static_activations_online(directory: Path) -> object:
    return parallel({"quant_method": "lowbit", "config": "float8sq"}, directory)


@refused
def a_rule_without_a_layer(directory: Path) -> object:
    lowbit.save(Float(), directory)
    return parallel({"quant_method": "lowbit", "config": {"attn.q": "int8wo", "re:.*proj": "int8wo"}}, directory)


@refused
def rules_that_all_miss(directory: Path) -> object:
    lowbit.save(Float(), directory)
    return parallel({"quant_method": "lowbit", "config": {"re:.*proj[0-9]": "int8wo"}}, directory)


@refused
def an_unknown_config(directory: Path) -> object:
    return parallel({"quant_method": "lowbit", "config": "int9wo"}, directory)


@refused
def an_unknown_section(directory: Path) -> object:
    return parallel({"quant_method": "lowbit", "format_version": 2, "weights": {}}, directory)


@refused
def neither_config_nor_rules(directory: Path) -> object:
    return parallel({"quant_method": "lowbit", "config": 4}, directory)


@refused
def an_unknown_format(directory: Path) -> object:
    weights = {"fc.weight": "int9:g128"}
    return parallel({"quant_method": "lowbit", "format_version": 1, "weights": weights}, directory)


@refused
def another_section_of_compressed_tensors(directory: Path) -> object:
    lowbit.save(quantized({"_default": "int8wo"}), directory)
    return parallel(section_of(directory) | {"kv_cache_scheme": {"num_bits": 8}}, directory)


@refused
def a_quantized_embedding_with_activations(directory: Path) -> object:
    return parallel({"quant_method": "lowbit", "config": {"embed_tokens": "int8dq"}}, directory)


@refused
def weights_that_are_not_finite(directory: Path) -> object:
    model = Float()
    model.mlp["up_proj"].weight.data[3, 5] = float("nan")
    lowbit.save(model, directory)
    return parallel({"quant_method": "lowbit", "config": "int8wo"}, directory)


@refused
def a_cut_through_words_of_the_vocabulary(directory: Path) -> object:
    config = get_quantization_config("lowbit").from_config({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["lm_head"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}}},
    })  # fmt: skip
    return ParallelLMHead(500, HIDDEN, params_dtype=DTYPE, prefix="lm_head", quant_config=config)


@refused
def a_head_tied_to_a_float_embedding(directory: Path) -> object:
    config = get_quantization_config("lowbit").from_config(
        {"quant_method": "lowbit", "config": {"lm_head": "int8wo", "_default": "int8wo"}}
    )
    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, params_dtype=DTYPE, quant_config=config)
    head = ParallelLMHead(VOCAB, HIDDEN, params_dtype=DTYPE, prefix="lm_head", quant_config=config)
    return head.tie_weights(embedding)


EXPERTS = object.__new__(RoutedExperts)  # of which only the class is asked


@refused
def experts_by_name(directory: Path) -> object:
    weights = {"layers.0.experts.gate_up_proj": "int4:g128"}
    config = {"quant_method": "lowbit", "format_version": 1, "weights": weights}
    return get_quantization_config("lowbit").from_config(config).get_quant_method(EXPERTS, "layers.0.experts")


@refused
def experts_by_class(directory: Path) -> object:
    lowbit.save(quantized({"_default": "int8wo"}), directory)
    config = get_quantization_config("lowbit").from_config(section_of(directory))
    return config.get_quant_method(EXPERTS, "layers.0.experts")


@refused
def no_experts_by_the_manifest(directory: Path) -> object:
    lowbit.save(quantized({"_default": "int8wo"}), directory)
    config = get_quantization_config("lowbit").from_config(section_of(directory))
    config.maybe_update_config(str(directory))
    return config.get_quant_method(EXPERTS, "layers.0.experts")


def picked() -> dict[str, str]:
    """Scheme -> the class with which vLLM's own reader of compressed-tensors would run it on a Hopper GPU.

    The GPU is imitated, and constructors, which look for compiled kernels, do nothing; what is asked is the choice.
    """
    platform = type(current_platform)
    platform.get_device_capability = classmethod(lambda cls, *args: DeviceCapability(9, 0))
    for name, kind in vars(reader).items():
        if name.startswith("CompressedTensorsW") and isinstance(kind, type):
            kind.__init__ = lambda self, *args, **kwargs: None
    return {spec: picked_for(spec) for spec in WRITTEN}


def picked_for(spec: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        lowbit.save(quantized({"lm_head": None, "_default": spec}), directory)
        config = reader.CompressedTensorsConfig.from_config(section_of(Path(directory)))
    config.packed_modules_mapping = MERGED
    layers = {"fc": ColumnParallelLinear, "attn.qkv_proj": QKVParallelLinear, "mlp.down_proj": RowParallelLinear}
    names = {type(config.get_scheme(object.__new__(kind), name)).__name__ for name, kind in layers.items()}
    return ", ".join(sorted(names)).removeprefix("CompressedTensors")


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
    os.environ["VLLM_DIST_IDENT"] = address.rpartition(":")[2]  # vLLM's executors name their groups so
    config = VllmConfig(compilation_config=CompilationConfig(mode=0))
    config.parallel_config.tensor_parallel_size = int(world)
    with set_current_vllm_config(config):
        init_distributed_environment(int(world), int(rank), address, int(rank), "gloo")
        initialize_model_parallel(int(world))
        register()
        register()  # vLLM may call it more than once
        notes = examine(int(world), int(rank), *(only or [""]))
        if world == "1":
            notes["refused"] = messages()
            notes["picked"] = picked()
    Path(f"{out}.{rank}").write_text(json.dumps(notes))


if __name__ == "__main__":
    main()
