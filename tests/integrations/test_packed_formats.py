"""Directories of other quantizers through `packed_config`, and what those quantizers themselves decode them to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit import QuantizedTensor
from lowbit.checkpoint import CheckpointError, read, verify

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from tiny_transformers import IDS, llama, logits, quantized_weights, saved
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lowbit.integrations.transformers import packed_config
from lowbit.tools.sources import find_source

Tensors = dict[str, torch.Tensor]


def rewritten(directory: Path, convert: Any, section: dict[str, Any]) -> Tensors:
    """The tiny model with every layer but the head converted by `convert(weight) -> tensors`; their exact weights."""
    saved(llama(), directory)
    tensors = load_file(directory / "model.safetensors")
    exact: Tensors = {}
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        parts, exact[name] = convert(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + leaf: t for leaf, t in parts.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return exact


def fp8(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    n, k = w.shape
    grid = nn.functional.pad(w.float(), (0, -k % 128, 0, -n % 128)).view(-(-n // 128), 128, -(-k // 128), 128)
    scale = grid.abs().amax((1, 3)) / 448
    codes = (w.float() / scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]).to(torch.float8_e4m3fn)
    exact = codes.float() * scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return {"weight": codes, "weight_scale_inv": scale}, exact


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8 |= {"modules_to_not_convert": ["lm_head"], "fmt": "e4m3"}


def gptq(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Version 1, symmetric, 4 bits in groups of 32."""
    n, k = w.shape
    groups = w.float().view(n, k // 32, 32)
    scale = (groups.abs().amax(2) / 7.5).half()
    codes = ((groups / scale.float()[..., None]).round() + 8).clamp(0, 15)
    exact = ((codes - 8) * scale.float()[..., None]).view(n, k)
    words = (codes.view(n, k // 8, 8).long() << (4 * torch.arange(8))).sum(2)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    zeros = torch.full((k // 32, n // 8), 0x77777777, dtype=torch.int32)
    parts = {"qweight": words.t().contiguous(), "qzeros": zeros, "scales": scale.t().contiguous()}
    return parts | {"g_idx": (torch.arange(k) // 32).to(torch.int32)}, exact


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


@pytest.mark.parametrize(("convert", "section"), [(fp8, FP8), (gptq, GPTQ)])
def test_packed(convert: Any, section: dict[str, Any], tmp_path: Path) -> None:
    exact = rewritten(tmp_path, convert, section)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=packed_config(tmp_path), output_loading_info=True
    )
    assert not any(info.values()), info
    assert quantized_weights(model).keys() == exact.keys()
    for name, w in quantized_weights(model).items():
        assert torch.equal(w.dequantize(torch.float32), exact[name]), name
    assert torch.equal(logits(lowbit.load(llama(), tmp_path)), logits(model))
    # The command line runs it, too.
    ours = find_source(str(tmp_path)).model()
    assert {n for n, w in ours.named_parameters() if isinstance(w, QuantizedTensor)} == exact.keys()
    assert ours(IDS).argmax(-1).eq(logits(model).argmax(-1)).float().mean() > 0.9
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", config=packed_config(tmp_path / "ours"))
    for name, w in quantized_weights(again).items():
        assert torch.equal(w.dequantize(torch.float32), exact[name]), name


def test_fp8_as_transformers_decodes_it(tmp_path: Path) -> None:
    rewritten(tmp_path, fp8, FP8)
    config = FineGrainedFP8Config(modules_to_not_convert=["lm_head"], dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    ours = read(tmp_path)
    for name, w in theirs.named_parameters():
        if isinstance(ours[name], QuantizedTensor):
            assert torch.equal(w, ours[name].dequantize(torch.float32)), name  # type: ignore[operator]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_itself_wrote(kind: str, nested: bool, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 64, compress_statistics=nested, quant_type=kind, bias=False)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16(), requires_grad=False,
        compress_statistics=nested, quant_type=kind,
    )  # fmt: skip
    layer = nn.ModuleDict({"a": layer.to("cpu")})
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    save_file(dict(layer.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": section}))
    assert verify(tmp_path).ok, verify(tmp_path)
    w = read(tmp_path)["a.weight"]
    assert isinstance(w, QuantizedTensor)
    theirs = bnb.functional.dequantize_4bit(layer["a"].weight.data, layer["a"].weight.quant_state)
    # In bf16; bitsandbytes rounds the product of two fp32 numbers once, too.
    assert torch.equal(w.dequantize(torch.bfloat16), theirs)


def test_gpt_oss_experts_as_transformers_decodes_them(tmp_path: Path) -> None:
    experts, n, k = 3, 24, 64
    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(110, 140, (experts, n, k // 32), dtype=torch.uint8, generator=random)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.zeros(experts, n)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    def section(**more: Any) -> None:
        quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]} | more
        config = {"model_type": "gpt_oss", "dtype": "bfloat16", "quantization_config": quantization}
        (tmp_path / "config.json").write_text(json.dumps(config))

    section()
    assert verify(tmp_path).ok, verify(tmp_path)
    state = read(tmp_path)
    w = state[name]
    assert isinstance(w, QuantizedTensor)
    assert state.keys() == {name, f"{name}_bias"}
    assert w.nbytes_packed == blocks.numel() + scales.numel()
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(w.dequantize(), theirs.transpose(1, 2))
    with pytest.raises(CheckpointError, match="quant_method is 'mxfp4'"):
        packed_config(tmp_path)
    section(surprise=1)
    with pytest.raises(CheckpointError, match="unknown keys"):
        read(tmp_path)
    section()
    save_file(tensors | {f"{name}_scales": scales[:2].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scales of .* is U8"):
        read(tmp_path)
