"""A *leaf* is one tensor on disk and the plane it is made from: an exact bijection between the two.

lowbit's own convention stores the canonical planes as they are, `<parameter>.<plane>`, and the logical shape under the
parameter's own name, where a reader that does not know lowbit meets a tensor that fits no layer. Without it,
transformers would warn of missing weights and go on with random ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.checkpoints.files import TensorInfo
from lowbit.checkpoints.manifest import VERSION, StoredWeight
from lowbit.formats.base import Plane, Tile
from lowbit.linear import BESIDE

#: The name under which leaves speak of the calibrated scale of a static activation.
ACT_SCALE = "act_scale"
METHOD = "lowbit"
#: The tile of what belongs to a weight as a whole: its shape, a scale per tensor, a codebook.
WHOLE: Tile = (None, None)


def same(t: Tensor) -> Tensor:
    return t


class Leaf(NamedTuple):
    """One stored tensor. `plane` None: it repeats what is known; `to_disk` of anything is what it has to hold.

    `inexact` leaves may lose the last bit of the plane, which the manifest then keeps. `tile` is how many weights along
    N and K one stored element covers, which decides where the tensor can be cut; None where nobody has to know.
    """

    name: str
    plane: str | None
    info: TensorInfo
    to_disk: Callable[[Tensor], Tensor] = same
    from_disk: Callable[[Tensor], Tensor] = same
    inexact: bool = False
    tile: Tile | None = None


def plane_info(plane: Plane, w: StoredWeight) -> TensorInfo:
    return TensorInfo(plane.dtype, plane.shape_for(w.n, w.k))


def canonical_leaves(parameter: str, w: StoredWeight) -> list[Leaf]:
    """The logical shape as `<parameter>`, the planes of any format by their own names; a static activation's scale as
    `<parameter>.input_scale`."""
    shape = torch.tensor(w.shape, dtype=torch.int64)
    leaves = [Leaf(parameter, None, TensorInfo(torch.int64, (len(w.shape),)), lambda _: shape, tile=WHOLE)]
    leaves += [Leaf(f"{parameter}.{p.name}", p.name, plane_info(p, w), tile=p.tile) for p in w.format.planes]
    if w.static:
        leaves.append(Leaf(f"{parameter}.input_scale", ACT_SCALE, TensorInfo(torch.float32, (1, 1)), tile=WHOLE))
    return leaves


def canonical_section(weights: Mapping[str, StoredWeight], names: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint in lowbit's own convention, which has tensors of these `names`.

    What lies beside weights is listed, so that a reader that knows nothing of it meets a key that it does not know.
    """
    section = {"quant_method": METHOD, "format_version": VERSION, "weights": {n: w.spec for n, w in weights.items()}}
    more = beside_in(names, weights)
    return section | ({"beside": more} if more else {})


def beside_in(names: Iterable[str], weights: Iterable[str]) -> dict[str, list[str]]:
    """Of the `names` of stored tensors, what lies beside quantized weights, by layer."""
    known, layers = set(names), sorted(w.removesuffix(".weight") for w in weights)
    found = {layer: [end for end in BESIDE if f"{layer}.{end}" in known] for layer in layers}
    return {layer: ends for layer, ends in found.items() if ends}
