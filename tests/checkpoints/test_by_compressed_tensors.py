"""Unmodified transformers with the package compressed-tensors reads what lowbit wrote, and lowbit what they wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit import calibrate, load, quantize_, save
from lowbit.checkpoint import read

pytest.importorskip("compressed_tensors")
pytest.importorskip("transformers")
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from proofs import DECODED_TO_BF16, PRESETS, REFUSED_BY_THE_PLAIN_CALL, WRITTEN
from tiny_model_dir import write_model
from tiny_transformers import IDS, dequantized, llama, logits, quantized_weights
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel
from typer.testing import CliRunner

from lowbit.cli.app import app

WEIGHT_ONLY = tuple(s for s in WRITTEN if "dq" not in s and "sq" not in s)
# transformers warns that a config is given although the directory has one, and then takes its loading options from it.
DEQUANTIZE = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


def quantized(spec: str, dtype: torch.dtype) -> PreTrainedModel:
    model = llama(dtype)
    statistics = calibrate(model, [IDS])
    quantize_(model, {"lm_head": None, "_default": spec}, calibration=statistics, measure=False)
    return model


@DEQUANTIZE
@pytest.mark.parametrize("spec", WRITTEN)
def test_dequantized_by_transformers(spec: str, tmp_path: Path) -> None:
    """Weights equal to the last bit of bf16, and so are the logits of the model that holds them."""
    ours = quantized(spec, torch.bfloat16)
    save(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    weights = dict(theirs.named_parameters())
    assert len(quantized_weights(ours)) == 14
    for name, w in quantized_weights(ours).items():
        assert weights[name].dtype == torch.bfloat16
        assert torch.equal(weights[name], w.dequantize()), name
    assert torch.equal(logits(theirs), logits(dequantized(ours)))


@pytest.mark.parametrize("spec", [s for s in WRITTEN if s not in REFUSED_BY_THE_PLAIN_CALL])
def test_run_by_transformers(spec: str, tmp_path: Path) -> None:
    """The plain call: compressed until the first forward. Activations are quantized there, too."""
    dtype = torch.bfloat16 if spec in DECODED_TO_BF16 else torch.float32
    ours = quantized(spec, dtype)
    save(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    got, expected = logits(theirs), logits(ours)
    weights = dict(theirs.named_parameters())
    for name, w in quantized_weights(ours).items():
        assert torch.equal(weights[name], w.dequantize()), name
    if spec in WEIGHT_ONLY and dtype == torch.float32:
        assert torch.equal(got, expected)
    else:
        # Sums in another order, after which an activation may round to the neighbouring code; MX scales of activations
        # are chosen by another rule there.
        bound = 1e-3 if dtype == torch.float32 else 0.01 if spec in WEIGHT_ONLY else 0.3 if "4" in spec else 0.06
        assert (got - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("spec", REFUSED_BY_THE_PLAIN_CALL)
def test_asymmetric_integers_are_refused_unless_dequantized(spec: str, tmp_path: Path) -> None:
    """A fault of that reader, which refuses the package's own files in the same way; see below."""
    save(quantized(spec, torch.float32), tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("spec", WRITTEN)
def test_the_packages_own_decompressor(spec: str, tmp_path: Path) -> None:
    """The tensors as they lie in the file, without a model around them."""
    from safetensors.torch import load_file

    ours = quantized(spec, torch.bfloat16)
    save(ours, tmp_path)
    config = QuantizationConfig.model_validate(_section(tmp_path))
    scheme = QuantizationScheme.model_validate(config.config_groups["group_0"])
    stored = load_file(tmp_path / "model.safetensors")
    for name, w in quantized_weights(ours).items():
        layer = name.removesuffix("weight")
        own = {leaf.removeprefix(layer): t for leaf, t in stored.items() if leaf.startswith(layer)}
        weight = BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)["weight"]
        assert torch.equal(weight, w.dequantize(weight.dtype)), name


def _section(directory: Path) -> dict[str, Any]:
    import json

    return json.loads((directory / "config.json").read_text())["quantization_config"]  # type: ignore[no-any-return]


@DEQUANTIZE
def test_rules_become_groups_that_they_read(tmp_path: Path) -> None:
    ours = llama()
    rules = {
        "model.layers.0.self_attn.q_proj": "int8wo", "re:.*down_proj": "float8wo-block", "re:.*layers.1.*": "nvfp4wo",
    }  # fmt: skip
    quantize_(ours, rules, measure=False)
    save(ours, tmp_path)
    assert _section(tmp_path)["format"] == "mixed-precision"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits(theirs)
    weights = dict(theirs.named_parameters())
    for name, w in quantized_weights(ours).items():
        exact = w.dequantize() if "q_proj" not in name and "down" not in name else _with_bf16_scale(w)
        assert torch.equal(weights[name], exact), name
    for name, w in ours.named_parameters():
        if name not in quantized_weights(ours):
            assert torch.equal(weights[name], w), name


def _with_bf16_scale(w: Any) -> torch.Tensor:
    """What the plain call makes of fp32 scales in a bf16 model: they are rounded to its dtype when they are loaded."""
    scale = w.scale.bfloat16()
    return w.with_planes(w.planes | {"scale": scale.float()}).dequantize()  # type: ignore[no-any-return]


@pytest.mark.parametrize("spec", ["int4wo-32-sym", "float8wo"])
def test_the_command_line_writes_the_same(spec: str, tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "source", model_type="llama"), tmp_path / "out"
    done = CliRunner().invoke(app, ["quantize", str(source), str(out), "--config", spec, "--dtype", "fp32"])
    assert done.exit_code == 0, done.output
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    logits(theirs)
    weights = dict(theirs.named_parameters())
    state = read(out)
    packed = {name: w for name, w in state.items() if hasattr(w, "planes")}
    assert packed
    for name, w in packed.items():
        assert torch.equal(weights[name], w.dequantize()), name  # type: ignore[attr-defined]


# The other direction --------------------------------------------------------------------------------------------------


def compressed(preset: str, directory: Path) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A directory that the package's own compressor makes, calibrated by its formulas; and its weights, dequantized."""
    model = llama()
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    exact: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        w, args = module.weight.data, module.quantization_scheme.weights
        if args.strategy == "tensor_group":
            module.weight_global_scale.data.copy_(generate_gparam(w.amin(), w.amax()))
        low, high = _range(w, args)
        scale, zero_point = calculate_qparams(low, high, args, getattr(module, "weight_global_scale", None))
        module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
        if not args.symmetric:
            module.weight_zero_point.data.copy_(zero_point)
        for scalar in ("input_scale", "input_global_scale"):
            if hasattr(module, scalar):
                getattr(module, scalar).data.fill_(0.25)
        compressor = BaseCompressor.get_value_from_registry(_format(module.quantization_scheme))
        state = {n: p.data for n, p in module.named_parameters(recurse=False)}
        packed = compressor.compress(state, module.quantization_scheme)
        exact[f"{name}.weight"] = compressor.decompress(packed, module.quantization_scheme)["weight"]
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    return model, exact


def _format(scheme: Any) -> str:
    from compressed_tensors.compressors.format import infer_module_format

    return infer_module_format(nn.Linear, scheme).value  # type: ignore[no-any-return]


def _range(w: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight that share a scale."""
    n, k = w.shape
    if args.strategy == "tensor":
        return w.amin().view(1), w.amax().view(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        grid = torch.nn.functional.pad(w, (0, -k % columns, 0, -n % rows))
        grid = grid.view(-(-n // rows), rows, -(-k // columns), columns)
        return grid.amin((1, 3)), grid.amax((1, 3))
    groups = w.view(n, -1, args.group_size or k)
    return groups.amin(2), groups.amax(2)


@pytest.mark.parametrize("preset", PRESETS)
def test_we_read_what_the_package_wrote(preset: str, tmp_path: Path) -> None:
    _, exact = compressed(preset, tmp_path)
    ours = load(llama(), tmp_path)
    packed = quantized_weights(ours)
    assert packed.keys() == exact.keys()
    for name, w in packed.items():
        decoded = w.dequantize(torch.float32)
        if "FP4" in preset or "MXFP8" in preset:
            assert torch.equal(decoded.bfloat16(), exact[name].bfloat16()), name
        else:
            # The package multiplies in bf16, in one step as lowbit does, and so rounds the exact product once.
            assert torch.equal(decoded.bfloat16(), exact[name]), name
    logits(ours)


def test_their_reader_refuses_their_own_asymmetric_file(tmp_path: Path) -> None:
    compressed("W4A16_ASYM", tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
