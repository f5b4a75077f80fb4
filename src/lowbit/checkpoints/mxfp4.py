"""gpt-oss directories (`quant_method` mxfp4): the weights of all experts of a layer in one tensor.

`<name>_blocks` uint8 (experts, N, K / 32, 16) holds E2M1 pairs, the earlier in the low half; `<name>_scales` uint8
(experts, N, K / 32) E8M0. Together they are lowbit's MXFP4 as it is, the weight `<name>` with shape (experts, N, K).
transformers keeps that parameter as (experts, K, N), and no layer of its runs on packed experts: what is read here is
for `read`, not for `load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowbit.checkpoints.files import Files, TensorInfo
from lowbit.checkpoints.foreign import Infos, OneLayerOneModule, Stored, only, sized
from lowbit.checkpoints.leaves import Leaf
from lowbit.checkpoints.manifest import StoredWeight
from lowbit.formats.mx import BLOCK, MXFormat

METHOD = "mxfp4"


class Reader(OneLayerOneModule):
    """Raises ValueError for a config that it does not know."""

    marks = frozenset({"blocks", "scales"})

    def __init__(self, section: Mapping[str, Any]) -> None:
        only(section, {"dequantize": (False,)}, ("modules_to_not_convert",))

    def split(self, name: str) -> tuple[str, str]:
        """`experts.down_proj_blocks` belongs to `experts.down_proj`."""
        weight, _, part = name.rpartition("_")
        return (weight, part) if part in self.marks else super().split(name)

    def parameter(self, layer: str) -> str:
        return layer

    def weight(self, layer: str, within: Infos, files: Files, dtype: torch.dtype) -> Stored:
        experts, n, blocks, packed = sized(within, "blocks", 4)
        if packed != BLOCK // 2:
            raise ValueError(f"{layer}_blocks has {packed} bytes per block, expected {BLOCK // 2}")
        stored = [
            Leaf(
                f"{layer}_blocks", "qdata", TensorInfo(torch.uint8, (experts, n, blocks, packed)),
                from_disk=lambda t: t.reshape(experts, -1),
            ),
            Leaf(
                f"{layer}_scales", "scale", TensorInfo(torch.uint8, (experts, n, blocks)),
                from_disk=lambda t: t.reshape(experts, -1).view(torch.float8_e8m0fnu),
            ),
        ]  # fmt: skip
        return Stored(StoredWeight(MXFormat("mxfp4"), None, (experts, n, blocks * BLOCK), dtype), stored)
