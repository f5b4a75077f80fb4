"""bitsandbytes directories: NF4 and FP4 (`<layer>.weight`, `weight.absmax`, ...) and LLM.int8() (`weight`, `SCB`).

4 bits: `weight` uint8 (N * K / 2, 1) holds the flattened matrix, the earlier of two codes in the high half of a byte;
`weight.quant_map` fp32 (16) is the table, `weight.absmax` one scale per block of consecutive weights. With double
quantization absmax is uint8 (0 to 255, an index into `weight.nested_quant_map`), times `weight.nested_absmax` of its
256 blocks, plus an offset; lowbit keeps those scales in fp32, exactly. `weight.quant_state.bitsandbytes__nf4` is JSON
with the logical shape. Blocks have to be whole in each row.
8 bits: int8 (N, K) times SCB / 127 per row. The columns of outliers that LLM.int8() looks for while it runs are a
matter of activations; here weights alone are quantized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.files import Files, TensorInfo
from lowbit.checkpoints.foreign import Infos, OneLayerOneModule, Stored, constant, only, sized
from lowbit.checkpoints.leaves import Leaf
from lowbit.checkpoints.manifest import StoredWeight
from lowbit.formats.base import divide
from lowbit.formats.codebook import TableFormat
from lowbit.formats.int import IntFormat
from lowbit.granularity import PerRow

METHOD = "bitsandbytes"
_RECORDS = (
    "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage", "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold", "_load_in_4bit", "_load_in_8bit",
)  # fmt: skip
_STATE = "weight.quant_state.bitsandbytes__"
_STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}


class Reader(OneLayerOneModule):
    """Raises ValueError for a config that it does not know."""

    marks = frozenset({f"{_STATE}nf4", f"{_STATE}fp4", "SCB"})

    def __init__(self, section: Mapping[str, Any]) -> None:
        known = {"load_in_4bit": (True, False), "load_in_8bit": (True, False), "bnb_4bit_quant_type": ("nf4", "fp4")}
        only(section, known, _RECORDS)

    def split(self, name: str) -> tuple[str, str]:
        """`a.weight.absmax` belongs to layer `a`, as `weight.absmax`."""
        layer, dot, rest = name.partition(".weight.")
        if dot:
            return layer, f"weight.{rest}"
        return super().split(name)

    def weight(self, layer: str, within: Infos, files: Files, dtype: torch.dtype) -> Stored:
        return self._int8(layer, within, dtype) if "SCB" in within else self._four(layer, within, files, dtype)

    def _int8(self, layer: str, within: Infos, dtype: torch.dtype) -> Stored:
        n, k = sized(within, "weight", 2)
        leaves = [
            Leaf(f"{layer}.weight", "qdata", TensorInfo(torch.int8, (n, k))),
            Leaf(
                f"{layer}.SCB", "scale", TensorInfo(torch.float32, (n,)), from_disk=lambda t: divide(t, 127).view(-1, 1)
            ),
        ]
        if "weight_format" in within:  # 0: rows as they are; other numbers are layouts of old GPUs
            leaves.append(
                constant(f"{layer}.weight_format", torch.zeros(within["weight_format"].shape, dtype=torch.uint8))
            )
        return Stored(StoredWeight(IntFormat(8, PerRow()), None, (n, k), dtype), leaves)

    def _four(self, layer: str, within: Infos, files: Files, dtype: torch.dtype) -> Stored:
        [mark] = [m for m in sorted(self.marks) if m in within]
        kind = mark.removeprefix(_STATE)
        state = files.get(f"{layer}.{mark}")
        n, k, block, offset = _state(state, kind, layer)
        absmax = TensorInfo(torch.float32 if offset is None else torch.uint8, (n * k // block,))
        leaves = [
            Leaf(f"{layer}.weight", "qdata", TensorInfo(torch.uint8, (n * k // 2, 1)), from_disk=_codes(n)),
            Leaf(f"{layer}.weight.quant_map", "codebook", TensorInfo(torch.float32, (16,))),
            constant(f"{layer}.{mark}", state),
        ]

        def scale(t: Tensor) -> Tensor:
            return t.view(n, -1)

        if offset is not None:
            sized(within, "weight.nested_quant_map", 1)
            sized(within, "weight.nested_absmax", 1)
            table, outer = (files.get(f"{layer}.weight.nested_{part}") for part in ("quant_map", "absmax"))
            if table.shape != (256,) or outer.shape != (-(-absmax.shape[0] // 256),):
                raise ValueError(f"{layer}: {tuple(outer.shape)} nested scales do not fit {absmax.shape[0]} of weights")
            leaves += [constant(f"{layer}.weight.nested_quant_map", table)]
            leaves += [constant(f"{layer}.weight.nested_absmax", outer)]

            def scale(t: Tensor) -> Tensor:
                spread = outer.to(t.device).repeat_interleave(256)[: t.numel()]
                return (table.to(t.device)[t.long()] * spread + offset).view(n, -1)

        leaves.append(Leaf(f"{layer}.weight.absmax", "scale", absmax, from_disk=scale))
        return Stored(StoredWeight(TableFormat(kind, block), None, (n, k), dtype), leaves)


def _codes(n: int) -> Any:
    def codes(t: Tensor) -> Tensor:
        return ((t >> 4) | (t << 4)).view(n, -1)  # the earlier code goes to the low half

    return codes


def _state(raw: Tensor, kind: str, layer: str) -> tuple[int, int, int, float | None]:
    """N, K, block size and, with double quantization, the offset of the scales."""
    try:
        state = json.loads(bytes(raw.tolist()))
    except (ValueError, TypeError):
        raise ValueError(f"{layer}: its quant_state is not JSON") from None
    unknown = set(state) - _STATE_KEYS if isinstance(state, dict) else {type(state).__name__}
    if unknown:
        raise ValueError(f"{layer}: unknown keys {sorted(unknown)} in its quant_state")
    shape, block = state.get("shape"), state.get("blocksize")
    if state.get("quant_type") != kind or state.get("dtype") not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"{layer}: its quant_state says {state}, its name {kind}")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(s) is int and s > 0 for s in [*shape, block])):
        raise ValueError(f"{layer}: its quant_state has shape {shape} and blocksize {block}")
    if shape[1] % block or block % 2:
        raise ValueError(f"{layer}: blocks of {block} are not whole in rows of {shape[1]}")
    offset = state.get("nested_offset")
    if offset is not None and (type(offset) not in (int, float) or not abs(offset) < 2**127):
        raise ValueError(f"{layer}: nested_offset must be a number, found {offset!r}")
    if offset is not None and (state.get("nested_blocksize"), state.get("nested_dtype")) != (256, "float32"):
        raise ValueError(f"{layer}: nested scales must be float32 in blocks of 256, found {state}")
    return shape[0], shape[1], block, offset
