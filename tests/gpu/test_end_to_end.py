"""Whole models on the GPU: quantized onto it, saved from it, generating on it, and every config tried."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import sqnr_db
from tiny_llama import tiny_ids, tiny_llama
from torch import nn

import lowbit
from lowbit import QuantizedTensor, quantize_
from lowbit.tools.doctor import diagnose
from lowbit.tools.generate import generate


def test_every_example_config_runs() -> None:
    failing = {c.config: c.how for c in diagnose("cuda").configs if not c.runs}
    assert not failing


@pytest.mark.parametrize("spec", ["int4wo-128", "nvfp4wo", "float8dq-row"])
def test_quantizing_onto_the_gpu_needs_two_layers_beside_the_result(spec: str) -> None:
    """The float model never is on the GPU as a whole."""
    model = nn.Sequential(*(nn.Linear(4096, 8192, bias=False, dtype=torch.bfloat16) for _ in range(5)))
    layer = 4096 * 8192 * 2
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    report = quantize_(model, spec, device="cuda")
    assert torch.cuda.max_memory_allocated() - before <= report.bytes_after + 2 * layer
    assert all(m.weight.device.type == "cuda" for m in model)


@pytest.mark.parametrize("spec", ["int4wo-32", "nf4wo-32-dq", "int8dq", "nvfp4sq"])
def test_checkpoints_of_models_on_the_gpu(spec: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)).bfloat16().cuda()
    x = torch.randn(5, 96, device="cuda", dtype=torch.bfloat16)
    quantize_(model, spec, calibration=lowbit.calibrate(model, [x]))
    lowbit.save(model, tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)).bfloat16()
    again = lowbit.load(empty, tmp_path, device="cuda")
    weight = again[0].weight
    assert isinstance(weight, QuantizedTensor)
    assert weight.device.type == "cuda"
    assert torch.equal(weight, model[0].weight)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("spec", ["int8wo", "int4wo-32", "mxfp4wo"])
def test_a_language_model_says_the_same_on_both_devices(spec: str) -> None:
    logits, ids = [], tiny_ids()
    for device in ("cpu", "cuda"):
        model = tiny_llama()
        quantize_(model, spec)
        model.to(device)
        with torch.inference_mode():
            logits.append(model(ids.to(device)).cpu())
        result = generate(model, ids.to(device), max_new_tokens=8)
        assert result.ids.shape == (2, ids.shape[1] + 8)
    assert sqnr_db(*logits) > 80
