"""AWQ directories of AutoAWQ (`version` gemm): `<layer>.qweight`, `qzeros`, `scales`.

`qweight` int32 (K, N / 8) and `qzeros` int32 (K / group, N / 8) hold eight columns per word, in the order 0, 2, 4, 6,
1, 3, 5, 7 from the least significant nibble; `scales` fp16 (K / group, N); a weight is (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.files import Files, TensorInfo
from lowbit.checkpoints.foreign import Infos, OneLayerOneModule, Stored, float_scales, only, sized, transposed, words
from lowbit.checkpoints.leaves import Leaf
from lowbit.checkpoints.manifest import StoredWeight
from lowbit.formats.elements import pack_bits
from lowbit.formats.int import IntFormat
from lowbit.granularity import PerGroup, PerRow

METHOD = "awq"
#: Where in a word column 0, 1, ... of eight lies.
NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
_RECORDS = (
    "modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "backend",
    "desc_act", "sym", "format", "device_map", "max_memory",
)  # fmt: skip


class Reader(OneLayerOneModule):
    """Raises ValueError for a config that it does not know."""

    marks = frozenset({"qweight"})

    def __init__(self, section: Mapping[str, Any]) -> None:
        only(section, {"bits": (4,), "zero_point": (True,), "version": ("gemm", "GEMM")}, (*_RECORDS, "group_size"))
        self.group = section.get("group_size", 128)
        if type(self.group) is not int or (self.group < 1 and self.group != -1):
            raise ValueError(f"group_size must be a number or -1, found {self.group!r}")

    def weight(self, layer: str, within: Infos, files: Files, dtype: torch.dtype) -> Stored:
        k, packed = sized(within, "qweight", 2)
        n = packed * 8
        group = k if self.group == -1 else self.group
        groups = -(-k // group)
        scale = float_scales(layer, within)
        fmt = IntFormat(4, PerRow() if groups == 1 else PerGroup(group), False, scale)
        leaves = [
            Leaf(f"{layer}.qweight", "qdata", TensorInfo(torch.int32, (k, packed)), from_disk=_codes),
            Leaf(f"{layer}.qzeros", "zero_point", TensorInfo(torch.int32, (groups, packed)), from_disk=_columns),
            Leaf(f"{layer}.scales", "scale", TensorInfo(scale, (groups, n)), from_disk=transposed),
        ]
        return Stored(StoredWeight(fmt, None, (n, k), dtype), leaves)


def _columns(t: Tensor) -> Tensor:
    """Codes of words `(R, N / 8)` in the order of the columns: uint8 `(N, R)`."""
    nibbles = words(t, 4).view(t.shape[0], -1, 8)
    return transposed(nibbles[..., list(NIBBLE)].reshape(t.shape[0], -1))


def _codes(t: Tensor) -> Tensor:
    return pack_bits(_columns(t), 4)
