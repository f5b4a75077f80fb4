"""FP8 directories in the convention of DeepSeek-V3 and transformers (`quant_method` fp8): `<layer>.weight` and
`weight_scale_inv`.

`weight` float8_e4m3 (N, K); `weight_scale_inv` is, in spite of its name, what codes are multiplied with: fp32
(ceil(N / 128), ceil(K / 128)), or one number. Activations are quantized while running, per token and 128 values where
weights have blocks and per tensor otherwise, or with a calibrated `activation_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.files import Files, TensorInfo
from lowbit.checkpoints.foreign import Infos, OneLayerOneModule, Stored, only, sized
from lowbit.checkpoints.leaves import ACT_SCALE, Leaf
from lowbit.checkpoints.manifest import StoredWeight
from lowbit.formats.activation import Activation
from lowbit.formats.fp8 import Float8Format
from lowbit.granularity import PerBlock, PerGroup, PerTensor

METHOD = "fp8"


class Reader(OneLayerOneModule):
    """Raises ValueError for a config that it does not know."""

    marks = frozenset({"weight_scale_inv"})

    def __init__(self, section: Mapping[str, Any]) -> None:
        known: dict[str, tuple[Any, ...]] = {
            "fmt": ("e4m3",), "activation_scheme": ("dynamic", "static"), "weight_block_size": ([128, 128], None),
            "scale_fmt": (None, "float", "ue8m0"), "dequantize": (False,),
        }  # fmt: skip
        only(section, known, ("modules_to_not_convert", "ignored_layers"))
        self.block = section.get("weight_block_size", [128, 128])
        self.static = section.get("activation_scheme", "dynamic") == "static"
        if self.static and self.block is not None:
            raise ValueError(
                "activation_scheme 'static' has one scale per tensor, which goes without weight_block_size"
            )

    def weight(self, layer: str, within: Infos, files: Files, dtype: torch.dtype) -> Stored:
        n, k = sized(within, "weight", 2)
        scale = within["weight_scale_inv"]
        if self.block is None:
            weight, act = Float8Format("float8_e4m3", PerTensor()), Float8Format("float8_e4m3", PerTensor())
            if math.prod(scale.shape) != 1:
                raise ValueError(f"{layer}.weight_scale_inv is {scale}, expected one number")
            shape = scale.shape
        else:
            weight = Float8Format("float8_e4m3", PerBlock((128, 128)))
            act = Float8Format("float8_e4m3", PerGroup(128))
            shape = (-(-n // 128), -(-k // 128))
        leaves = [
            Leaf(f"{layer}.weight", "qdata", TensorInfo(torch.float8_e4m3fn, (n, k))),
            Leaf(f"{layer}.weight_scale_inv", "scale", TensorInfo(_stored_dtype(scale), shape), from_disk=_scale),
        ]
        if self.static:
            info = within.get("activation_scale", TensorInfo(torch.float32, ()))
            one = TensorInfo(torch.float32, info.shape if math.prod(info.shape) == 1 else ())
            leaves.append(Leaf(f"{layer}.activation_scale", ACT_SCALE, one, from_disk=lambda t: t.reshape(1, 1)))
        return Stored(StoredWeight(weight, Activation(act, self.static), (n, k), dtype), leaves)


def _stored_dtype(scale: TensorInfo) -> torch.dtype:
    """Powers of two may be stored as such; wider floats than fp32 are an error later on."""
    return scale.dtype if scale.dtype == torch.float8_e8m0fnu else torch.float32


def _scale(t: Tensor) -> Tensor:
    return t.float() if t.dim() == 2 else t.float().reshape(1, 1)
