"""transformers on the GPU: quantized there while loading, read there packed, within two layers of the packed size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowbit import quantize_

pytest.importorskip("transformers")
from tiny_transformers import IDS, llama, logits, quantized_weights, saved
from transformers import AutoModelForCausalLM

from lowbit.integrations.transformers import LowbitConfig, packed_config


@pytest.mark.parametrize("spec", ["int4wo-32", "int8dq", "float8dq-row", "nvfp4wo", "nf4wo-64"])
def test_loading_onto_the_gpu_is_quantize_(spec: str, tmp_path: Path) -> None:
    source = saved(llama(), tmp_path / "source")
    config = LowbitConfig(spec)
    got = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cuda")
    expected = llama().cuda()
    quantize_(expected, {"lm_head": None, "_default": spec})
    weights = dict(expected.named_parameters())
    assert len(quantized_weights(got)) == 14
    assert all(torch.equal(w, weights[name]) for name, w in got.named_parameters())
    got.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", config=packed_config(tmp_path / "out"), device_map="cuda"
    )
    assert all(w.is_cuda and torch.equal(w, weights[name]) for name, w in again.named_parameters())
    assert torch.equal(logits(again, IDS.cuda()), logits(expected, IDS.cuda()))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:The CUDA Graph is empty")
def test_generate_with_a_static_cache(tmp_path: Path) -> None:
    """With a static cache on a GPU, transformers compiles the forward by itself."""
    source = saved(llama(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=LowbitConfig("int4wo-32"), device_map="cuda"
    )
    ids = IDS[:, :5].cuda()
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    static = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert plain.shape == static.shape == (1, 11)
    assert torch.equal(plain[:, :6], static[:, :6])  # later tokens of random weights may be near ties


def test_peak_memory(tmp_path: Path) -> None:
    source = saved(llama(hidden_size=2048, intermediate_size=8192, num_hidden_layers=4), tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(source, quantization_config=LowbitConfig("int4wo-128"), device_map="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=LowbitConfig("int4wo-128"), device_map="cuda"
    )
    held = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before <= held + 2 * (2048 * 8192 * 2)
    assert len(quantized_weights(model)) == 28
