"""The compressed-tensors convention, which vLLM, SGLang and transformers read: `<layer>.weight_packed` and friends.

Facts of the format (version 0.20 of its package): integers of 4 or 8 bits without quantized activations are packed
into int32 as value + 2**(bits - 1), least significant bits first along K, zero points the same way along N; float4
pairs are uint8 with the even k in the low half; E8M0 scales are uint8; NVFP4's global scale is stored as its inverse.
lowbit's planes hold the same codes in the same order, so most tensors are the plane under another dtype.

`describe` says what a scheme is called there; `resolve` is its inverse, found by describing candidates, so that the two
cannot disagree and anything that lowbit would not write itself is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.checkpoints.files import TensorInfo
from lowbit.checkpoints.leaves import ACT_SCALE, WHOLE, Leaf, plane_info
from lowbit.checkpoints.manifest import StoredWeight
from lowbit.formats.activation import Activation
from lowbit.formats.base import Format
from lowbit.formats.elements import pack_bits, unpack_bits
from lowbit.formats.fp8 import Float8Format
from lowbit.formats.int import IntFormat
from lowbit.formats.mx import MXFormat
from lowbit.formats.nvfp4 import NVFP4Format
from lowbit.granularity import Granularity, PerBlock, PerGroup, PerRow, PerTensor

METHOD = "compressed-tensors"
BLOCK = PerBlock((128, 128))
Args = dict[str, Any]


class Description(NamedTuple):
    """A scheme in the words of compressed-tensors."""

    format: str
    weights: Args
    input_activations: Args | None


# Scheme <-> description -----------------------------------------------------------------------------------------------


def describe(weight: Format, act: Activation | None) -> Description | None:
    """What a scheme is called in `config_groups`, or None if the format has no exact word for it."""
    w = _weight_args(weight)
    a = _act_args(act) if act else None
    if w is None or (act is not None and a is None):
        return None
    if isinstance(weight, IntFormat):
        if act is None:
            return Description("pack-quantized", w, None)
        whole = weight.bits == 8 and weight.symmetric and isinstance(weight.granularity, PerRow)
        return Description("int-quantized", w, a) if whole and isinstance(act.format, IntFormat) else None
    if act is not None and type(act.format) is not type(weight):
        return None
    if isinstance(weight, Float8Format):
        per_group = isinstance(weight.granularity, PerBlock)
        if a is not None and per_group != (a["strategy"] == "group"):
            return None
        return Description("float-quantized", w, a)
    if isinstance(weight, NVFP4Format):
        return Description("nvfp4-pack-quantized", w, a)
    if act is not None and act.format.element != weight.element:
        return None
    return Description("mxfp4-pack-quantized" if weight.element.bits == 4 else "mxfp8-quantized", w, a)


def _args(bits: int, kind: str, strategy: Args, symmetric: bool = True, dynamic: bool | str = False) -> Args:
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": dynamic, **strategy}


def _strategy(g: Granularity) -> Args:
    if isinstance(g, PerTensor):
        return {"strategy": "tensor"}
    if isinstance(g, PerRow):
        return {"strategy": "channel"}
    if isinstance(g, PerGroup):
        return {"strategy": "group", "group_size": g.group_size}
    return {"strategy": "block", "block_structure": list(g.block_size)}


def _weight_args(f: Format) -> Args | None:
    if isinstance(f, IntFormat) and f.bits in (4, 8) and isinstance(f.granularity, (PerRow, PerGroup)):
        return _args(f.bits, "int", _strategy(f.granularity), f.symmetric)
    if isinstance(f, Float8Format) and f.variant == "float8_e4m3":
        whole = isinstance(f.granularity, (PerRow, PerTensor)) or f.granularity == BLOCK
        return _args(8, "float", _strategy(f.granularity)) if whole else None
    if isinstance(f, NVFP4Format):
        tiles = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        return _args(4, "float", tiles)
    if isinstance(f, MXFormat) and f.variant in ("mxfp4", "mxfp8_e4m3"):
        tiles = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        return _args(f.element.bits, "float", tiles)
    return None


def _act_args(act: Activation) -> Args | None:
    f = act.format
    if isinstance(f, NVFP4Format):  # readers expect a calibrated global scale; block scales are found while running
        return (_weight_args(f) or {}) | {"dynamic": "local"} if act.static else None
    if isinstance(f, MXFormat):
        w = _weight_args(f)
        return w and w | {"dynamic": True}
    if not isinstance(f, (IntFormat, Float8Format)) or f.element.bits != 8:
        return None
    if isinstance(f, Float8Format) and f.variant != "float8_e4m3":
        return None
    kind = "int" if isinstance(f, IntFormat) else "float"
    symmetric = not f.has("zero_point")
    if isinstance(f.granularity, PerRow):
        return _args(8, kind, {"strategy": "token"}, symmetric, True)
    if isinstance(f.granularity, PerTensor) and (act.static or kind == "float"):
        return _args(8, kind, _strategy(f.granularity), symmetric, not act.static)
    if f.granularity == PerGroup(128) and kind == "float":
        return _args(8, kind, _strategy(f.granularity), symmetric, True)
    return None


def expressible(w: StoredWeight) -> bool:
    """Whether readers of compressed-tensors take this weight: a scheme they know, and whole groups along K."""
    if describe(w.format, w.act) is None:
        return False
    scale = w.format.plane("scale")
    whole = scale.k is None or scale.n != 1 or w.k % scale.k == 0
    return len(w.shape) == 2 and whole


def _candidates(args: Args) -> Iterable[tuple[Format, Activation | None]]:
    size = args.get("group_size") or 128
    tiles: tuple[Granularity, ...] = (PerRow(), PerTensor(), PerGroup(size), BLOCK)
    weights: list[Format] = [NVFP4Format(), MXFormat("mxfp4"), MXFormat("mxfp8_e4m3")]
    weights += [IntFormat(bits, g, symmetric) for bits in (4, 8) for g in tiles for symmetric in (True, False)]
    weights += [Float8Format("float8_e4m3", g) for g in tiles]
    eight: list[Format] = [Float8Format("float8_e4m3", g) for g in (PerRow(), PerTensor(), PerGroup(128))]
    eight += [IntFormat(8, PerRow()), IntFormat(8, PerRow(), False), IntFormat(8, PerTensor())]
    acts: list[Activation | None] = [None, Activation(NVFP4Format(), static=True)]
    acts += [Activation(f) for f in (*weights[1:3], *eight)]
    acts += [Activation(f, static=True) for f in eight if f.scale_planes[0].tile == (None, None)]
    return ((weight, act) for weight in weights for act in acts)


def resolve(found: Description) -> tuple[Format, Activation | None] | None:
    """The scheme that a description with plain arguments (`plain_args`) names, or None if lowbit has none."""
    for weight, act in _candidates(found.weights):
        known = describe(weight, act)
        if known and (known.format, _bare(known.weights), _bare(known.input_activations)) == (
            found.format,
            _bare(found.weights),
            _bare(found.input_activations),
        ):
            return weight, act
    return None


def _bare(args: Args | None) -> Args | None:
    """Without the dtype of the scales, which other writers leave out and the stored tensors show."""
    return args and {key: value for key, value in args.items() if key != "scale_dtype"}


# Planes <-> tensors ---------------------------------------------------------------------------------------------------


def leaves(parameter: str, w: StoredWeight) -> list[Leaf]:
    """The tensors of one linear layer; `parameter` is the name of its weight, `<layer>.weight`."""
    known = describe(w.format, w.act)
    assert known is not None, w.spec
    layer = parameter.removesuffix("weight")
    out = [_codes(layer, w, known.format), _scale(layer, w)]
    if w.format.has("zero_point"):
        out.append(_zero_point(layer, w))
    if known.format == "pack-quantized":
        shape = torch.tensor(w.shape, dtype=torch.int64)
        out.append(Leaf(f"{layer}weight_shape", None, TensorInfo(torch.int64, (2,)), lambda _: shape, tile=WHOLE))
    one = TensorInfo(torch.float32, (1,))
    inverse = partial(Leaf, info=one, to_disk=_invert, from_disk=_uninvert, inexact=True, tile=WHOLE)
    if w.format.has("outer_scale"):
        out.append(inverse(f"{layer}weight_global_scale", "outer_scale"))
    if w.static and isinstance(w.act and w.act.format, NVFP4Format):
        out.append(inverse(f"{layer}input_global_scale", ACT_SCALE))
    elif w.static:
        out.append(Leaf(f"{layer}input_scale", ACT_SCALE, one, _flat, _square, tile=WHOLE))
    return out


def _flat(t: Tensor) -> Tensor:
    return t.reshape(1)


def _square(t: Tensor) -> Tensor:
    return t.reshape(1, 1)


def _invert(t: Tensor) -> Tensor:
    return t.reshape(1).reciprocal()


def _uninvert(t: Tensor) -> Tensor:
    return t.reshape(1, 1).reciprocal()


def _view(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda t: t.view(dtype)


def _codes(layer: str, w: StoredWeight, ct_format: str) -> Leaf:
    plane = w.format.code_planes[0]
    if ct_format == "pack-quantized":
        used = plane.shape_for(w.n, w.k)[1]
        info = TensorInfo(torch.int32, (w.n, -(-used // 4)))
        flip = 0x80 if plane.dtype == torch.int8 else 0  # two's complement to offset binary
        return Leaf(
            f"{layer}weight_packed", plane.name, info,
            partial(_to_words, flip=flip), partial(_from_words, used=used, flip=flip, dtype=plane.dtype),
            tile=(1, 4 * (plane.k or 1)),
        )  # fmt: skip
    name = "weight_packed" if w.format.element.bits == 4 else "weight"
    return Leaf(layer + name, plane.name, plane_info(plane, w), tile=plane.tile)


def _to_words(t: Tensor, flip: int = 0) -> Tensor:
    """Bytes `(N, B)` as int32 `(N, ceil(B / 4))`, zeros at the end."""
    t = t.view(torch.uint8)
    if flip:
        t = t ^ flip
    if t.shape[1] % 4:
        t = torch.nn.functional.pad(t, (0, -t.shape[1] % 4))
    flat = t.contiguous().reshape(-1)
    flat = flat.clone() if flat.storage_offset() % 4 else flat  # a view may start anywhere
    return flat.view(torch.int32).view(t.shape[0], -1)


def _from_words(t: Tensor, used: int, flip: int, dtype: torch.dtype) -> Tensor:
    t = t.view(torch.uint8)[:, :used]
    return (t ^ flip if flip else t.contiguous()).view(dtype)


def _scale(layer: str, w: StoredWeight) -> Leaf:
    plane = w.format.plane("scale")
    name, info = f"{layer}weight_scale", plane_info(plane, w)
    if plane.tile == (None, None):
        return Leaf(name, "scale", TensorInfo(plane.dtype, (1,)), _flat, _square, tile=WHOLE)
    if plane.dtype == torch.float8_e8m0fnu:
        raw = TensorInfo(torch.uint8, info.shape)
        return Leaf(name, "scale", raw, _view(torch.uint8), _view(plane.dtype), tile=plane.tile)
    return Leaf(name, "scale", info, tile=plane.tile)


def _zero_point(layer: str, w: StoredWeight) -> Leaf:
    plane, bits = w.format.plane("zero_point"), w.format.element.bits
    n, groups = plane_info(plane, w).shape
    info = TensorInfo(torch.int32, (-(-n * bits // 32), groups))

    def to_disk(t: Tensor) -> Tensor:
        return _to_words(pack_bits(t.t().contiguous(), bits)).t().contiguous()

    def from_disk(t: Tensor) -> Tensor:
        # Flat in between: the stride of a dimension of size 1 is arbitrary, and views care about it.
        packed = t.t().reshape(-1).view(torch.uint8).view(groups, -1)
        return unpack_bits(packed, bits, n).t().contiguous()

    # Rows share words; what a word has beyond the last row of a weight is zero.
    return Leaf(f"{layer}weight_zero_point", "zero_point", info, to_disk, from_disk, tile=(32 // bits, plane.k))
