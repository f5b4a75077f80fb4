"""The same call for other models: a sentence encoder as MiniLM is one, Whisper, one that sees, a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit import Report, quantize_

pytest.importorskip("transformers")
from tiny_transformers import llama_config, quantized_weights, saved
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from lowbit.integrations.transformers import LowbitConfig, packed_config


def bert() -> PreTrainedModel:
    """What sentence-transformers wraps: a BERT, whose token vectors are averaged and normalized."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=100, max_position_embeddings=32, **sizes)).bfloat16().eval()


def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=80, num_mel_bins=16, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=20,
        max_target_positions=24, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).bfloat16().eval()


IDS = torch.arange(1, 13).view(2, 6)
MEL = torch.linspace(-1, 1, 16 * 40, dtype=torch.bfloat16).view(1, 16, 40)


@torch.no_grad()
def embed(model: PreTrainedModel) -> torch.Tensor:
    return nn.functional.normalize(model(IDS).last_hidden_state.float().mean(1), dim=1)


@torch.no_grad()
def hear(model: WhisperForConditionalGeneration) -> torch.Tensor:
    return model(input_features=MEL, decoder_input_ids=torch.tensor([[1, 5, 7]])).logits.float()


def linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def names(report: Report) -> set[str]:
    return {row.name for row in report.quantized}


@pytest.mark.parametrize(("spec", "cosine"), [("int8dq", 0.999), ("float8dq-row", 0.99), ("int4wo-32", 0.99)])
def test_a_sentence_encoder(spec: str, cosine: float) -> None:
    model = bert()
    expected = embed(model)
    report = quantize_(model, spec)
    assert names(report) == linears(model)
    assert len(names(report)) == 2 * 6 + 1
    assert (embed(model) * expected).sum(1).min() > cosine


@pytest.mark.parametrize(("spec", "error"), [("int8wo", 0.02), ("float8dq-row", 0.08), ("int4wo-32", 0.2)])
def test_whisper(spec: str, error: float) -> None:
    model = whisper()
    expected = hear(model)
    report = quantize_(model, spec)
    assert names(report) == linears(model)
    assert (hear(model) - expected).norm() < error * expected.norm()
    tokens = model.generate(MEL, max_new_tokens=4, do_sample=False)
    assert tokens.shape[0] == 1


def test_whispers_convolutions_stay_and_are_reported() -> None:
    model = whisper()
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)}
    assert convolutions == {"model.encoder.conv1", "model.encoder.conv2"}
    rules = {name: "int8wo" for name in sorted(convolutions)} | {"_default": "int8wo"}
    with pytest.raises(ValueError, match=r"conv1 cannot be quantized to int8wo: Conv1d is none of Linear"):
        quantize_(model, rules)
    report = quantize_(model, rules, on_unsupported="skip")
    assert {row.name for row in report.skipped} == convolutions
    assert all("Conv1d is none of" in (row.skipped or "") for row in report.skipped)
    assert all(type(model.get_submodule(name).weight) is nn.Parameter for name in convolutions)
    assert names(report) == linears(model)


def test_from_pretrained_of_a_sentence_encoder(tmp_path: Path) -> None:
    source = saved(bert(), tmp_path / "source")
    model = AutoModel.from_pretrained(source, quantization_config=LowbitConfig("int8dq", []))
    expected = bert()
    quantize_(expected, "int8dq")
    assert torch.equal(embed(model), embed(expected))
    model.save_pretrained(tmp_path / "out")
    again = AutoModel.from_pretrained(tmp_path / "out", config=packed_config(tmp_path / "out"))
    assert len(quantized_weights(again)) == 13
    assert torch.equal(embed(again), embed(expected))


def test_from_pretrained_of_whisper(tmp_path: Path) -> None:
    source = saved(whisper(), tmp_path / "source")
    config = LowbitConfig("int3wo-32")
    model = WhisperForConditionalGeneration.from_pretrained(source, quantization_config=config)
    assert names(model.hf_quantizer.report) == linears(model) - {"proj_out"}
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    model.save_pretrained(tmp_path / "out")
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(hear(again), hear(model))


# Models whose files have other names than their classes ---------------------------------------------------------------


def llava() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    return (
        LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=llama_config())).bfloat16().eval()
    )


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
    return MixtralForCausalLM(config).bfloat16().eval()


@pytest.mark.parametrize("make", [llava, mixtral])
@pytest.mark.parametrize("spec", ["int8wo", "int3wo-32", "int4wo-32"])
def test_names_of_files(make: Callable[[], PreTrainedModel], spec: str, tmp_path: Path) -> None:
    source = saved(make(), tmp_path / "source")
    kind = type(make())
    model = kind.from_pretrained(source, quantization_config=LowbitConfig(spec))
    model.save_pretrained(tmp_path / "out")
    again, info = kind.from_pretrained(
        tmp_path / "out", config=packed_config(tmp_path / "out"), output_loading_info=True
    )
    assert not any(info.values()), info
    expected = dict(model.named_parameters())
    assert quantized_weights(again).keys() == quantized_weights(model).keys()
    assert all(torch.equal(w, expected[name]) for name, w in again.named_parameters())


def test_an_older_name_is_read_by_the_package_too(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source = saved(llava(), tmp_path / "source")
    model = LlavaForConditionalGeneration.from_pretrained(source, quantization_config=LowbitConfig("int8wo-64"))
    model.save_pretrained(tmp_path / "out")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs(input_ids=torch.arange(8).view(1, -1))
    weights = dict(theirs.named_parameters())
    for name, w in quantized_weights(model).items():
        if "vision" not in name:  # decompressed with the rest when an image comes
            assert torch.equal(weights[name], w.dequantize()), name


def test_experts_are_listed_as_left_alone(tmp_path: Path) -> None:
    source = saved(mixtral(), tmp_path / "source")
    model = MixtralForCausalLM.from_pretrained(source, quantization_config=LowbitConfig("int8wo"))
    rows = {row.name: row.skipped for row in model.hf_quantizer.report.skipped}
    experts = {name for name, w in model.named_parameters() if w.dim() == 3}
    assert len(experts) == 2
    assert experts < set(rows)
    assert all("is none of Linear, Embedding, Conv2d" in (rows[name] or "") for name in experts)
