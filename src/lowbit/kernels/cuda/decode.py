"""The host's side of `decode.cuh`: a format's declarations as constants to compile with, tensors as arguments to launch
with. The CUDA C++ kernels share it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from lowbit.formats.base import Format, parse_format
from lowbit.formats.elements import FloatElement, IntElement, TableElement
from lowbit.kernels.cuda import act_quant
from lowbit.kernels.cuda.loader import Defines, Frame
from lowbit.kernels.problem import Operand, Problem

# The names of decode.cuh.
_INT, _FLOAT, _TABLE, _VECTOR = range(4)
PER_ROW, PER_STEP, PER_CHUNK = range(3)
_SCALE_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float8_e4m3fn: 2,
    torch.float8_e8m0fnu: 3,
    torch.int8: 4,
}


def chunk(fmt: Format, quad: int = 16) -> int:
    """Weights in `quad` bytes of the widest plane."""
    main = max(width for _, width, _ in fmt.element.code_planes)
    return quad * 8 // main * fmt.element.vector


def has_table(fmt: Format) -> bool:
    """Whether codes are looked up in a table in shared memory."""
    return isinstance(fmt.element, TableElement)


@cache
def constants(fmt: Format, quads: tuple[int, ...] = (16, 8, 4)) -> Defines | str:
    """The kernels' constants for a format, or why it has no instance.

    Args:
        quads: bytes that a lane may take at once. The largest with which four lanes stay inside a group is chosen, so
            that scales multiply fp32 sums.
    """
    e, size = fmt.element, chunk(fmt)
    defines = {"QUAD": 16, "BITS": e.bits, "MANTISSA": 0, "BIAS": 0, "TABLE_FP32": 0}
    if isinstance(e, IntElement):
        defines["KIND"] = _INT
    elif isinstance(e, FloatElement):
        defines |= {"KIND": _FLOAT, "MANTISSA": e.mantissa_bits, "BIAS": e.bias}
    elif isinstance(e, TableElement) and (e.bits, e.vector) in ((2, 1), (3, 1), (4, 1), (8, 2)):
        defines["KIND"] = _TABLE if e.vector == 1 else _VECTOR
        defines["TABLE_FP32"] = int(fmt.plane("codebook").dtype == torch.float32)
    else:
        return f"no decoder for {type(e).__name__} of {e.bits} bits and {e.vector} weights per code"
    scale = fmt.plane("scale")
    if scale.dtype not in _SCALE_TYPES:
        return f"scales are {scale.dtype}"
    defines |= {"SCALE_TYPE": _SCALE_TYPES[scale.dtype], "SCALE_N": scale.n or 1, "GROUP": scale.k or 1}
    fitting = [q for q in quads if scale.k and scale.k % (4 * chunk(fmt, q)) == 0 and chunk(fmt, q) >= 8]
    if scale.k is None:
        defines["SCALE_MODE"] = PER_ROW
    elif fitting:
        defines |= {"SCALE_MODE": PER_STEP, "QUAD": fitting[0]}
    elif scale.k % size == 0 or (size % scale.k == 0 and scale.k % 8 == 0):
        defines["SCALE_MODE"] = PER_CHUNK
    else:
        return f"groups of {scale.k} do not line up with the {size} weights a lane takes"
    if fmt.has("zero_point") and fmt.plane("zero_point").tile != scale.tile:
        return "zero points and scales have different tiles"
    outer = fmt.plane("outer_scale") if fmt.has("outer_scale") else None
    if outer is not None and outer.tile != (None, None) and (outer.n, scale.n) != (1, 1):
        return f"outer scales have tiles {outer.tile}"
    if fmt.has("scale_offset") and (outer is None or outer.k is None):
        return "an offset of the scales needs outer scales per group"
    defines["OUTER_K"] = -1 if outer is None else outer.k or 0
    defines |= {"OFFSET": int(fmt.has("scale_offset")), "ZERO": int(fmt.has("zero_point"))}
    return tuple(sorted(defines.items()))


def cost(fmt: Format, own_order: bool) -> float | None:
    """How long decoding takes in `cuda_wgmma`, in times of int4 in groups of 128 for activations that are laid out.

    Fitted to times on an H100 (docs/measured.md) for 4 and 8 bits, from counts of instructions for other widths.
    None where the products of `decode.cuh` cannot meet activations in their own order: for codes that are not of 4 or 8
    bits in one plane, and groups of fewer than 32.
    """
    e, group = fmt.element, fmt.plane("scale").k
    if e.bits not in (4, 8) or len(e.code_planes) > 1 or e.vector > 1:
        return None if own_order else 1.3 if len(e.code_planes) > 1 else 0.8 if e.bits < 4 else 1.8
    if own_order and group is not None and group % 32:
        return None
    fine = group is not None and group < 64
    if e.bits == 8:
        return 2.05 if own_order else 1.4
    if isinstance(e, TableElement):
        return 2.1 if own_order else 1.8
    if isinstance(e, IntElement):
        return (1.8 if own_order else 1.27) if fine else (1.16 if own_order else 1.0)
    return 2.6 if own_order else 1.35 if group is None or group >= 32 else 1.8


def defines_of(fmt: Format) -> Defines:
    """The constants of a format that has instances."""
    found = constants(fmt)
    assert not isinstance(found, str), found
    return found


def why_not_dtype(problem: Problem) -> str | None:
    """Why the CUDA C++ kernels have no instance for a problem's activations."""
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"written for bf16 and fp16, got {problem.dtype}"
    if problem.dtype == torch.float16 and problem.act:
        return "quantized activations are multiplied in bf16"
    return None


# Launches ----------------------------------------------------------------------------------------


class Arguments(ctypes.Structure):
    """`struct Arguments` of decode.cuh, field by field."""

    _fields_ = (
        ("codes", ctypes.c_void_p), ("codes2", ctypes.c_void_p), ("codes1", ctypes.c_void_p),
        ("stride", ctypes.c_longlong), ("stride2", ctypes.c_longlong), ("stride1", ctypes.c_longlong),
        ("scale", ctypes.c_void_p), ("zero", ctypes.c_void_p), ("outer", ctypes.c_void_p), ("offset", ctypes.c_void_p),
        ("table", ctypes.c_void_p), ("x", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("row_scale", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int), ("n", ctypes.c_int), ("k", ctypes.c_int), ("scale_columns", ctypes.c_int),
        ("scale_rows", ctypes.c_int), ("outer_columns", ctypes.c_int), ("row_scales", ctypes.c_int),
        ("bias_fp32", ctypes.c_int),
    )  # fmt: skip


def operand(x: Tensor | Operand, problem: Problem, act_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What is multiplied, and the scale of its rows: a quantized activation is split into levels and scales."""
    if problem.activation is None:
        assert isinstance(x, Tensor)
        return x, None
    from lowbit.kernels.triton import act_quant as triton  # late: not every installation of torch brings triton

    return triton.split(x, problem.activation, act_scale)


#: Multiplies `x (..., K)`, without gaps between rows, into `y (..., N)`, given the planes in the format's order, bias
#: and the scale of a static activation, which is None where activations are not quantized.
Launch = Callable[[Tensor, Tensor, Sequence[Tensor], Tensor | None, Tensor | None], None]


def with_operand(start: Launch, problem: Problem, device: int) -> Launch:
    """`start`, which takes the scale of the rows last, behind the quantization of the activation."""
    if problem.activation is None:
        return start

    quantize = act_quant.quantizer(problem, act_quant.LEVELS, device)

    def launch(x: Tensor, y: Tensor, planes: Sequence[Tensor], bias: Tensor | None, act_scale: Tensor | None) -> None:
        levels, row_scale = quantize(x, act_scale)
        start(levels, y, planes, bias, row_scale)

    return launch


def in_order(planes: Mapping[str, Tensor], fmt: Format) -> list[Tensor]:
    """The planes as `fill` takes them."""
    return [planes[name] for name in fmt.plane_names]


def fill(
    frame: Frame, x: Tensor, y: Tensor, planes: Sequence[Tensor], spec: str, sizes: tuple[int, int, int],
    bias: Tensor | None, row_scale: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Write the first parameter, `struct Arguments`, of a launch; gives the tensors that must live until then.

    Args:
        x, y: `(..., K)` and `(..., N)`, without gaps between rows.
        planes: in the order of the format `spec`.
        sizes: M, N and K.
    """
    address = x.data_ptr()
    keep = []
    if address % 16 or not x.is_contiguous():
        x = _aligned(x, 16)
        keep, address = [x], x.data_ptr()
    weight = _of_weight(spec, _layout(planes))
    if weight is None:
        fmt = parse_format(spec)
        apart = _bytes_at_once(fmt)
        planes = [_aligned(t, apart.get(name)) for name, t in zip(fmt.plane_names, planes, strict=True)]
        keep += planes
        weight = _of_weight(spec, _layout(planes))
        assert weight is not None
    frame.first[:] = weight
    a = frame.arguments[0]
    a.x, a.y, (a.m, a.n, a.k) = address, y.data_ptr(), sizes
    if row_scale is not None:
        keep.append(row_scale.contiguous())
        a.row_scale, a.row_scales = keep[-1].data_ptr(), row_scale.shape[0]
    if bias is not None:
        # Read as it is in fp32 or in the dtype of the outputs; else widened.
        keep.append((bias if bias.dtype in (y.dtype, torch.float32) else bias.float()).contiguous())
        a.bias, a.bias_fp32 = keep[-1].data_ptr(), int(keep[-1].dtype == torch.float32)
    return keep


#: Address, shape and strides of every plane: all that a launch depends on beside the format.
Layout = tuple[tuple[int, torch.Size, tuple[int, ...]], ...]


def _layout(planes: Sequence[Tensor]) -> Layout:
    return tuple([(t.data_ptr(), t.shape, t.stride()) for t in planes])


@lru_cache(maxsize=4096)
def _of_weight(spec: str, layout: Layout) -> bytes | None:
    """The part of `struct Arguments` that is the weight's; None where planes lie so that they must be copied.

    Remembered, since filling a structure costs an eager call more than anything else here. It holds no tensor: where
    memory is used again, the same addresses mean the same arguments.
    """
    fmt = parse_format(spec)
    at = dict(zip(fmt.plane_names, layout, strict=True))
    apart = _bytes_at_once(fmt)
    for plane, lies in zip(fmt.planes, layout, strict=True):
        if not _lies_well(*lies, plane.dtype.itemsize, apart.get(plane.name)):
            return None
    a = Arguments()
    for i, (name, width, _) in enumerate(fmt.element.code_planes):
        field = "" if i == 0 else str(width)
        setattr(a, f"codes{field}", at[name][0])
        setattr(a, f"stride{field}", at[name][2][0])
    a.scale, (a.scale_rows, a.scale_columns), _ = at["scale"]
    for field, name in (("zero", "zero_point"), ("outer", "outer_scale"), ("offset", "scale_offset"),
                        ("table", "codebook")):  # fmt: skip
        setattr(a, field, at[name][0] if name in at else None)
    a.outer_columns = at["outer_scale"][1][-1] if "outer_scale" in at else 0
    return bytes(a)


@cache
def _bytes_at_once(fmt: Format) -> dict[str, int]:
    """Bytes of a row that are copied at once from each plane of codes: 16 of the widest, and what goes with them."""
    planes = fmt.element.code_planes
    widest = max(width for _, width, _ in planes)
    return {name: 16 * width // widest for name, width, _ in planes}


def _lies_well(address: int, shape: torch.Size, strides: tuple[int, ...], size: int, at_once: int | None) -> bool:
    """Whether loads find aligned addresses: rows `at_once` bytes at a time may lie apart, else there are no gaps."""
    if at_once is not None:
        return address % 16 == 0 and strides[-1] == 1 and strides[0] * size % at_once == 0
    dense, step = True, 1
    for length, stride in zip(reversed(shape), reversed(strides)):
        dense, step = dense and (length == 1 or stride == step), step * length
    return address % 16 == 0 and dense


def _aligned(t: Tensor, at_once: int | None) -> Tensor:
    """`t`, or a copy that lies well."""
    lies_well = _lies_well(t.data_ptr(), t.shape, t.stride(), t.element_size(), at_once)
    return t if lies_well else t.clone(memory_format=torch.contiguous_format)
