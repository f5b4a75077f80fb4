"""A format that lowbit does not have, in one class: ternary weights (BitNet b1.58, arXiv:2402.17764).

Loaded as a pytest plugin (`pytest -p toy_format`), before the tests are collected, it is registered like any other
format; the second function is its independent definition, which every family's test needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy_reference import REFERENCES, Quantized, dequantize_table, nearest_entry, spread, stored
from torch import Tensor

from lowbit.formats import Format, Plane, Planes, register
from lowbit.formats.base import safe_scale
from lowbit.formats.elements import TableElement

LEVELS = (-1.0, 0.0, 1.0, 1.0)  # two bits have four codes; the last is never chosen


@register("ternary")
@dataclass(frozen=True)
class TernaryFormat(Format):
    """-1, 0 and 1 in two bits, times the mean magnitude of the row."""

    examples = ("ternary:row",)
    spec = "ternary:row"
    element = TableElement(2)
    scale_planes = (
        Plane("scale", torch.float32, 1, None),
        Plane("codebook", torch.bfloat16, None, None, shape=(4,)),
    )

    @classmethod
    def from_spec(cls, name: str, *options: str) -> TernaryFormat:
        if options not in ((), ("row",)):
            raise ValueError(f"format {name!r}: known options: row, got {options}")
        return cls()

    def choose_params(self, w: Tensor) -> Planes:
        mean = w.double().abs().mean(dim=1, keepdim=True).float() if w.numel() else w.new_zeros(len(w), 1)
        return {"scale": safe_scale(mean), "codebook": torch.tensor(LEVELS, dtype=torch.bfloat16, device=w.device)}


def quantize_ternary(words: list[str], w: np.ndarray, planes: dict[str, np.ndarray]) -> Quantized:
    table = np.array(LEVELS, dtype=np.float32)
    scale = stored(np.abs(w.astype(np.float64)).mean(1, keepdims=True).astype(np.float32))
    codes = nearest_entry(w / spread(scale, (1, None), *w.shape), table)
    return Quantized(codes, {"scale": scale, "codebook": table})


REFERENCES["ternary"] = (quantize_ternary, dequantize_table)
