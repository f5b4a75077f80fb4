"""Layers as GPTQ, AWQ, bitsandbytes and FP8 store them, written number by number: tensors, the weights that they stand
for, and the config. Tests read them, and fault tests damage them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

N, K = 32, 64
RNG = np.random.default_rng(0)


def write(directory: Path, tensors: dict[str, Any], section: dict[str, Any]) -> Path:
    """A checkpoint of one layer `a` with these tensors, and of `b`, which is not quantized."""
    full = {
        name: t if isinstance(t, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(t))
        for name, t in tensors.items()
    }
    full |= {"a.bias": torch.zeros(N, dtype=torch.float16), "b.weight": torch.ones(2, 3)}
    save_file(full, directory / "model.safetensors", {"format": "pt"})
    config = {"model_type": "net", "dtype": "float16", "quantization_config": section}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def gptq(bits: int, group: int, symmetric: bool, version: int) -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    """Tensors, the weights (N, K) that they stand for, and the config."""
    groups = K // group
    codes = RNG.integers(0, 2**bits, (N, K))
    zeros = np.full((groups, N), 2 ** (bits - 1)) if symmetric else RNG.integers(1, 2**bits, (groups, N))
    scales = (RNG.random((groups, N)) + 0.5).astype(np.float16)
    per_word = 32 // bits
    qweight, qzeros = np.zeros((K // per_word, N), np.uint32), np.zeros((groups, N // per_word), np.uint32)
    for k in range(K):
        qweight[k // per_word] |= (codes[:, k] << (bits * (k % per_word))).astype(np.uint32)
    for n in range(N):
        stored = zeros[:, n] - (1 if version == 1 else 0)
        qzeros[:, n // per_word] |= (stored << (bits * (n % per_word))).astype(np.uint32)
    of_group = np.arange(K) // group
    weights = (codes - zeros[of_group].T).astype(np.float32) * scales[of_group].T.astype(np.float32)
    tensors = {
        "a.qweight": qweight.view(np.int32), "a.qzeros": qzeros.view(np.int32), "a.scales": scales,
        "a.g_idx": of_group.astype(np.int32),
    }  # fmt: skip
    section = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "damp_percent": 0.01, "true_sequential": True,
    }  # fmt: skip
    return tensors, weights, section


def awq(group: int) -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # which column the i-th nibble holds
    codes, zeros = RNG.integers(0, 16, (K, N)), RNG.integers(0, 16, (K // group, N))
    scales = (RNG.random((K // group, N)) + 0.5).astype(np.float16)

    def packed(t: np.ndarray) -> np.ndarray:
        out = np.zeros((t.shape[0], N // 8), np.uint32)
        for word in range(N // 8):
            for nibble, column in enumerate(order):
                out[:, word] |= (t[:, 8 * word + column] << (4 * nibble)).astype(np.uint32)
        return out.view(np.int32)

    of_group = np.arange(K) // group
    weights = (codes - zeros[of_group]).astype(np.float32) * scales[of_group].astype(np.float32)
    tensors = {"a.qweight": packed(codes), "a.qzeros": packed(zeros), "a.scales": scales}
    section = {
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    return tensors, weights.T, section


def nf4(nested: bool, block: int = 32, kind: str = "nf4") -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    table = np.sort(RNG.standard_normal(16)).astype(np.float32)
    codes = RNG.integers(0, 16, N * K)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [N, K]}
    tensors: dict[str, Any] = {
        "a.weight": ((codes[0::2] << 4) | codes[1::2]).astype(np.uint8).reshape(-1, 1), "a.weight.quant_map": table,
    }  # fmt: skip
    blocks = N * K // block
    if nested:
        indices, map8 = RNG.integers(0, 256, blocks), np.linspace(-1, 1, 256).astype(np.float32)
        outer = (RNG.random(-(-blocks // 256)) + 0.5).astype(np.float32)
        offset = 1.5
        absmax = map8[indices] * outer[np.arange(blocks) // 256] + np.float32(offset)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {
            "a.weight.absmax": indices.astype(np.uint8), "a.weight.nested_absmax": outer,
            "a.weight.nested_quant_map": map8,
        }  # fmt: skip
    else:
        absmax = (RNG.random(blocks) + 0.5).astype(np.float32)
        tensors["a.weight.absmax"] = absmax
    name = f"a.weight.quant_state.bitsandbytes__{kind}"
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    weights = (table[codes] * absmax[np.arange(N * K) // block]).reshape(N, K)
    section = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": nested, "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": None, "_load_in_4bit": True, "_load_in_8bit": False,
    }  # fmt: skip
    return tensors, weights, section


def llm_int8() -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    codes, scb = RNG.integers(-127, 128, (N, K)).astype(np.int8), (RNG.random(N) + 0.5).astype(np.float32)
    tensors = {"a.weight": codes, "a.SCB": scb, "a.weight_format": np.zeros((), np.uint8)}
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
    return tensors, codes.astype(np.float32) * (scb / np.float32(127))[:, None], section


def fp8(shape: tuple[int, ...]) -> tuple[dict[str, Any], np.ndarray]:
    codes = (torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    return {"a.weight": codes, "a.weight_scale_inv": scale}, (codes.float() * scale).numpy()
