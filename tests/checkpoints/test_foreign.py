"""Directories of GPTQ, AWQ, bitsandbytes and FP8, each written here number by number, and read packed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_layers import RNG, K, N, awq, fp8, gptq, llm_int8, nf4, write
from torch import nn

from lowbit import QuantizedTensor, load
from lowbit.checkpoint import CheckpointError, read, verify


def weight(directory: Path) -> QuantizedTensor:
    assert verify(directory).ok, verify(directory)
    model = nn.ModuleDict({"a": nn.Linear(K, N), "b": nn.Linear(3, 2, bias=False)}).half()
    load(model, directory)
    w = model["a"].weight
    assert isinstance(w, QuantizedTensor)
    assert torch.equal(w, read(directory)["a.weight"])
    assert (w.dtype, tuple(w.shape)) == (torch.float16, (N, K))
    return w


def exact(w: QuantizedTensor) -> np.ndarray:
    return w.dequantize(torch.float32).numpy()


def problem(directory: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read(directory)
    return str(error.value)


# GPTQ -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 64), (8, 32), (2, 32)])
def test_gptq(bits: int, group: int, symmetric: bool, version: int, tmp_path: Path) -> None:
    tensors, expected, section = gptq(bits, group, symmetric, version)
    w = weight(write(tmp_path, tensors, section))
    np.testing.assert_array_equal(exact(w), expected)
    assert w.format.has("zero_point") != symmetric
    assert w.nbytes_packed <= N * K * bits // 8 + 3 * (K // group) * N
    x = torch.linspace(-1, 1, 2 * K).view(2, K).half()
    layer = nn.Linear(K, N, bias=False)
    layer.weight = nn.Parameter(w, requires_grad=False)
    got, reference = layer(x).double(), x.double() @ torch.from_numpy(expected).double().T
    assert (got - reference).norm() < 2e-3 * reference.norm()


def test_gptq_without_g_idx_and_with_one_group(tmp_path: Path) -> None:
    tensors, expected, section = gptq(4, K, False, 1)
    del tensors["a.g_idx"]
    for size in (-1, K, 10**30):
        w = weight(write(tmp_path, tensors, section | {"group_size": size}))
        np.testing.assert_array_equal(exact(w), expected)
    tensors, expected, section = gptq(4, K, True, 1)
    w = weight(write(tmp_path, tensors, section | {"group_size": 10**30}))
    np.testing.assert_array_equal(exact(w), expected)


def test_gptq_that_lowbit_does_not_read(tmp_path: Path) -> None:
    tensors, _, section = gptq(4, 16, True, 1)
    order = RNG.permutation(K)

    def found(config: dict[str, Any] | None = None, **changes: Any) -> str:
        return problem(write(tmp_path, tensors | changes, section | (config or {})))

    by_order = tensors["a.g_idx"][order]
    assert "a.g_idx holds" in found({"desc_act": True}, **{"a.g_idx": by_order})
    assert "a.qzeros holds [2004318071" in found({"checkpoint_format": "gptq_v2"})
    assert "unknown keys ['secret']" in found({"secret": 1})
    assert "bits is 3, lowbit reads 2, 4, 8" in found({"bits": 3})
    assert "bits is True" in found({"bits": True})
    assert "dynamic gives layers bits of their own" in found({"dynamic": {"+:.*": {"bits": 8}}})
    assert "is_marlin_format is True" in found({"is_marlin_format": True})
    assert "group_size" in found({"group_size": 0})
    assert "a.qzeros of a.weight" in found({"group_size": 32})
    assert "a.more does not belong" in found(**{"a.more": np.zeros(2)})
    full = np.full_like(tensors["a.qzeros"], -1)
    assert "holds 128 zero points of 16" in found({"sym": False}, **{"a.qzeros": full})
    half = tensors["a.scales"].astype(np.int16)
    assert "a.scales is I16" in found(**{"a.scales": half})


# AWQ ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [16, 32, 64])
def test_awq(group: int, tmp_path: Path) -> None:
    tensors, expected, section = awq(group)
    w = weight(write(tmp_path, tensors, section))
    np.testing.assert_array_equal(exact(w), expected)
    assert w.format.spec in (f"int4:g{group}:asym:fp16", "int4:row:asym:fp16")


def test_awq_that_lowbit_does_not_read(tmp_path: Path) -> None:
    tensors, _, section = awq(16)
    for change, expected in (
        ({"version": "gemv"}, "version is 'gemv'"), ({"zero_point": False}, "zero_point is False"),
        ({"bits": 8}, "bits is 8"), ({"surprise": 0}, "unknown keys ['surprise']"),
        ({"group_size": "16"}, "group_size must be a number"),
    ):  # fmt: skip
        assert expected in problem(write(tmp_path, tensors, section | change))


# bitsandbytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("kind", "block"), [("nf4", 64), ("nf4", 4), ("fp4", 32)])
def test_bitsandbytes_4_bits(kind: str, block: int, nested: bool, tmp_path: Path) -> None:
    tensors, expected, section = nf4(nested, block, kind)
    w = weight(write(tmp_path, tensors, section))
    np.testing.assert_array_equal(exact(w), expected)
    assert w.format.spec == f"{kind}:g{block}"


def test_bitsandbytes_8_bits(tmp_path: Path) -> None:
    tensors, expected, section = llm_int8()
    w = weight(write(tmp_path, tensors, section))
    np.testing.assert_array_equal(exact(w), expected)
    assert w.format.spec == "int8:row"
    tensors["a.weight_format"] = np.full((), 2, np.uint8)
    assert "a.weight_format holds [2], expected [0]" in problem(write(tmp_path, tensors, section))


def test_bitsandbytes_that_lowbit_does_not_read(tmp_path: Path) -> None:
    tensors, _, section = nf4(False)
    name = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name]))

    def found(text: str) -> str:
        changed = tensors | {name: np.frombuffer(text.encode(), np.uint8).copy()}
        return problem(write(tmp_path, changed, section))

    assert "is not JSON" in found("{")
    assert "unknown keys ['list']" in found("[]")
    assert "unknown keys ['x']" in found(json.dumps(state | {"x": 1}))
    assert "blocks of 40 are not whole in rows of 64" in found(json.dumps(state | {"blocksize": 40}))
    assert "its name nf4" in found(json.dumps(state | {"quant_type": "fp4"}))
    assert "has shape [32]" in found(json.dumps(state | {"shape": [32]}))
    assert "a.weight of a.weight" in found(json.dumps(state | {"shape": [64, 64]}))
    assert "unknown keys ['new']" in problem(write(tmp_path, tensors, section | {"new": 1}))
    tensors, _, section = nf4(True)
    state = json.loads(bytes(tensors[name]))
    for offset in ("x", [1], True, float("nan"), float("inf"), 10**400):
        assert "nested_offset must be a number" in found(json.dumps(state | {"nested_offset": offset}))


# FP8 ------------------------------------------------------------------------------------------------------------------


def test_fp8_in_blocks(tmp_path: Path) -> None:
    tensors, expected = fp8((1, 1))
    section = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["b"],
    }  # fmt: skip
    w = weight(write(tmp_path, tensors, section))
    np.testing.assert_array_equal(exact(w), expected)
    assert (w.format.spec, w.act_spec) == ("float8_e4m3:b128x128", "float8_e4m3:g128")
    powers = tensors | {"a.weight_scale_inv": torch.full((1, 1), 0.25).to(torch.float8_e8m0fnu)}
    w = weight(write(tmp_path, powers, section | {"scale_fmt": "ue8m0"}))
    assert torch.equal(w.dequantize(torch.float32), tensors["a.weight"].float() * 0.25)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("static", [False, True])
def test_fp8_per_tensor(static: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors, expected = fp8(shape)
    section = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic", "weight_block_size": None}
    if static:
        tensors["a.activation_scale"] = torch.full(shape, 0.125)
    w = weight(write(tmp_path, tensors, section))
    np.testing.assert_array_equal(exact(w), expected)
    assert w.act_spec == "float8_e4m3:tensor" + ("@static" if static else "")
    assert (w.act_scale is None) != static
    assert w.act_scale is None or w.act_scale.item() == 0.125


def test_fp8_that_lowbit_does_not_read(tmp_path: Path) -> None:
    tensors, _ = fp8((1, 1))
    section = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    for change, expected in (
        ({"weight_block_size": [64, 64]}, "weight_block_size is [64, 64]"), ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"activation_scheme": "static"}, "one scale per tensor"), ({"later": 1}, "unknown keys ['later']"),
    ):  # fmt: skip
        assert expected in problem(write(tmp_path, tensors, section | change))
    wide = tensors | {"a.weight_scale_inv": torch.ones(1, 1, dtype=torch.float64)}
    assert re.search("weight_scale_inv of a.weight .* is F64", problem(write(tmp_path, wide, section)))
    assert "expected F32 [1, 1]" in problem(
        write(tmp_path, tensors | {"a.weight_scale_inv": torch.ones(2, 1)}, section)
    )
