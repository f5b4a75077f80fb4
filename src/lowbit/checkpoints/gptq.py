"""GPTQ directories of AutoGPTQ and GPTQModel: `<layer>.qweight`, `qzeros`, `scales`, `g_idx`.

`qweight` int32 (K * bits / 32, N) packs codes along K, `qzeros` int32 (K / group, N * bits / 32) zero points along N,
both least significant first; `scales` fp16 (K / group, N); a weight is (code - zero) * scale. Version 1 (`gptq`) stores
each zero point less one, version 2 (`gptq_v2`) as it is. Symmetric ones are always 2**(bits - 1), which is checked and
then left away. `g_idx` says the group of each column and has to be k // group: with activation order the columns of a
group lie apart, which no kernel of lowbit reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.files import Files, TensorInfo
from lowbit.checkpoints.foreign import (
    Infos,
    OneLayerOneModule,
    Stored,
    constant,
    float_scales,
    only,
    sized,
    transposed,
    words,
)
from lowbit.checkpoints.leaves import Leaf
from lowbit.checkpoints.manifest import StoredWeight
from lowbit.formats.int import IntFormat
from lowbit.granularity import PerGroup, PerRow

METHOD = "gptq"
_RECORDS = (
    "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path",
    "model_file_base_name", "dataset", "tokenizer", "batch_size", "block_name_to_quantize",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "model_seqlen", "pad_token_id", "use_cuda_fp16", "use_exllama", "exllama_config",
    "max_input_length", "cache_block_outputs", "disable_exllama", "backend", "meta", "lm_head", "dynamic", "mse",
)  # fmt: skip


class Reader(OneLayerOneModule):
    """Raises ValueError for a config that it does not know."""

    marks = frozenset({"qweight"})

    def __init__(self, section: Mapping[str, Any]) -> None:
        known: dict[str, tuple[Any, ...]] = {
            "bits": (2, 4, 8), "sym": (True, False), "desc_act": (False, True), "is_marlin_format": (False,),
            "checkpoint_format": ("gptq", "gptq_v2"), "pack_dtype": ("int32",),
        }  # fmt: skip
        only(section, known, (*_RECORDS, "group_size", "version", "quantizer"))
        group = section.get("group_size")
        if "bits" not in section or type(group) is not int or (group < 1 and group != -1):
            raise ValueError(f"needs bits and a group_size, which is a number or -1; found {group!r}")
        if section.get("dynamic"):
            raise ValueError(f"dynamic gives layers bits of their own, which is not supported: {section['dynamic']!r}")
        self.bits, self.group = section["bits"], group
        self.symmetric = section.get("sym", True)
        self.less_one = section.get("checkpoint_format", "gptq") == "gptq"

    def weight(self, layer: str, within: Infos, files: Files, dtype: torch.dtype) -> Stored:
        rows, n = sized(within, "qweight", 2)
        bits, k = self.bits, rows * 32 // self.bits
        group = k if self.group == -1 else min(self.group, k)
        groups = -(-k // group)
        scale = float_scales(layer, within)
        if n * bits % 32:
            raise ValueError(f"{layer}: {n} zero points of {bits} bits do not fill whole words")
        fmt = IntFormat(bits, PerRow() if groups == 1 else PerGroup(group), self.symmetric, scale)
        flip = 0x80 if bits == 8 and self.symmetric else 0

        def codes(t: Tensor) -> Tensor:
            packed = transposed(t).view(torch.uint8)
            return (packed ^ flip).view(torch.int8) if flip else packed

        leaves = [
            Leaf(f"{layer}.qweight", "qdata", TensorInfo(torch.int32, (rows, n)), from_disk=codes),
            Leaf(f"{layer}.scales", "scale", TensorInfo(scale, (groups, n)), from_disk=transposed),
        ]
        zeros = TensorInfo(torch.int32, (groups, n * bits // 32))
        if self.symmetric:
            value = (1 << (bits - 1)) - self.less_one
            word = sum(value << shift for shift in range(0, 32, bits))
            same = torch.full(zeros.shape, word - (1 << 32) if word >> 31 else word, dtype=torch.int32)
            leaves.append(constant(f"{layer}.qzeros", same))
        else:
            if within.get("qzeros") == zeros and self.less_one:
                # 2**bits as a zero point: some readers take it, in others it wraps to 0.
                full = int((words(files.get(f"{layer}.qzeros"), bits) == (1 << bits) - 1).sum())
                if full:
                    raise ValueError(
                        f"{layer}.qzeros holds {full} zero points of {1 << bits}, more than {bits} bits say"
                    )
            leaves.append(Leaf(f"{layer}.qzeros", "zero_point", zeros, from_disk=self._zero_points))
        if "g_idx" in within:
            leaves.append(constant(f"{layer}.g_idx", (torch.arange(k) // group).to(torch.int32)))
        return Stored(StoredWeight(fmt, None, (n, k), dtype), leaves)

    def _zero_points(self, t: Tensor) -> Tensor:
        zeros = transposed(words(t, self.bits))
        return zeros + 1 if self.less_one else zeros
