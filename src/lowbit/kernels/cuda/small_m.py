"""Weight-only matmul for up to 32 tokens in CUDA C++ (`small_m.cu`): reads the canonical planes once, at the speed of
memory. Here a format's declarations become the kernel's constants."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.elements import FloatElement, IntElement, TableElement
from lowbit.kernels.cuda import loader
from lowbit.kernels.cuda.loader import Defines
from lowbit.kernels.problem import Problem
from lowbit.kernels.triton.launch import multiprocessors, on_device

MAX_TOKENS = 16
THREADS = 256

# The names of small_m.cu.
_INT, _FLOAT, _TABLE, _VECTOR = range(4)
_PER_ROW, _PER_STEP, _PER_CHUNK = range(3)
_SCALE_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float8_e4m3fn: 2,
    torch.float8_e8m0fnu: 3,
    torch.int8: 4,
}


class _Arguments(ctypes.Structure):
    """`struct Arguments` of small_m.cu, field by field."""

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


def chunk(fmt: Format) -> int:
    """Weights of a row that one lane takes at once: 16 bytes of the widest plane."""
    main = max(width for _, width, _ in fmt.element.code_planes)
    return 128 // main * fmt.element.vector


@cache
def constants(fmt: Format) -> Defines | str:
    """The kernel's constants for a format, or why it has no instance of this kernel."""
    e, size, step = fmt.element, chunk(fmt), 4 * chunk(fmt)
    defines = {"BITS": e.bits, "MANTISSA": 0, "RESCALE": 0, "TABLE_FP32": 0}
    if isinstance(e, IntElement):
        defines["KIND"] = _INT
    elif isinstance(e, FloatElement):
        defines |= {"KIND": _FLOAT, "MANTISSA": e.mantissa_bits, "RESCALE": 127 - e.bias}
    elif isinstance(e, TableElement) and (e.bits, e.vector) in ((2, 1), (3, 1), (4, 1), (8, 2)):
        defines["KIND"] = _TABLE if e.vector == 1 else _VECTOR
        defines["TABLE_FP32"] = int(fmt.plane("codebook").dtype == torch.float32)
    else:
        return f"no decoder for {type(e).__name__} of {e.bits} bits and {e.vector} weights per code"
    scale = fmt.plane("scale")
    if scale.dtype not in _SCALE_TYPES:
        return f"scales are {scale.dtype}"
    defines |= {"SCALE_TYPE": _SCALE_TYPES[scale.dtype], "SCALE_N": scale.n or 1, "GROUP": scale.k or 1}
    if scale.k is None:
        defines["SCALE_MODE"] = _PER_ROW
    elif scale.k % step == 0:
        defines["SCALE_MODE"] = _PER_STEP
    elif scale.k % size == 0 or (size % scale.k == 0 and scale.k % 8 == 0):
        defines["SCALE_MODE"] = _PER_CHUNK
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


def max_tokens(fmt: Format) -> int:
    """How many tokens this kernel is the fastest for, as measured on an H100 (docs/measured.md).

    Above 8 it reads the activations from L2 too often, and the Triton kernel wins where decoding costs that one
    little: integers of 4 and 8 bits, and 8-bit floats with one scale per row.
    """
    e, group = fmt.element, fmt.plane("scale").k
    by_row = group is None or group % 128 == 0
    cheap = isinstance(e, IntElement) and e.bits in (4, 8) and (by_row or group == 32)
    cheap = cheap or (isinstance(e, FloatElement) and e.bits == 8 and by_row)
    return 8 if cheap else MAX_TOKENS


def why_not(problem: Problem) -> str | None:
    """The condition of the table of kernels."""
    fmt, act = problem.weight, problem.activation
    if problem.m > max_tokens(fmt):
        return f"M = {problem.m} is above {max_tokens(fmt)}, where other kernels are faster"
    if problem.dtype != torch.bfloat16:
        return f"written for bf16, got {problem.dtype}"
    if problem.arch is not None and problem.arch < (8, 0):
        return f"needs compute capability 8.0, this GPU has {problem.arch[0]}.{problem.arch[1]}"
    if act is not None and act.grouped:
        return "scales per group of the activation change along K"
    if problem.k % chunk(fmt):
        return f"K = {problem.k} is no multiple of the {chunk(fmt)} weights that a lane takes"
    reason = constants(fmt)
    return reason if isinstance(reason, str) else loader.missing()


def small_m(
    x: Tensor, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None
) -> Tensor:
    """The table's entry: `y (M, N)` bf16 from `x (M, K)` bf16 and the planes; a quantized activation is split first."""
    row_scale = None
    if problem.activation is not None:
        from lowbit.kernels.triton import act_quant

        x, row_scale = act_quant.split(x, problem.activation, act_scale)
    return launch(x, planes, problem.weight, problem.n, bias, row_scale)


def row_tiles_for(fmt: Format, m: int, n: int, device: torch.device) -> int:
    """Tiles of 16 rows of W per block. Two read the activations half as often, which pays for more than 8 tokens, and
    for codes of less than 8 bits where that leaves blocks enough for every multiprocessor."""
    if m > 8:
        return 2
    blocks = multiprocessors(device)
    return 2 if fmt.element.bits // fmt.element.vector < 8 and n >= 32 * blocks else 1


def launch(
    x: Tensor,
    planes: Mapping[str, Tensor],
    fmt: Format,
    n: int,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_tiles: int | None = None,
) -> Tensor:
    """`y (M, N)` bf16 from `x (M, K)` bf16, M <= 16.

    Args:
        row_scale: fp32 `(M or 1, 1)`, multiplied into the result.
        row_tiles: 1 or 2, instead of the rule's choice.
    """
    m, k = x.shape
    y = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
    row_tiles = row_tiles or row_tiles_for(fmt, m, n, x.device)
    kernel = _kernel(fmt, 1 if m <= 8 else 2, row_tiles, x.device.index)
    a, keep = arguments(x, y, planes, fmt, bias, row_scale)
    with on_device(x):
        kernel(-(-n // (16 * row_tiles)), THREADS, a)
    return y


def arguments(
    x: Tensor, y: Tensor, planes: Mapping[str, Tensor], fmt: Format, bias: Tensor | None, row_scale: Tensor | None
) -> tuple[_Arguments, list[Tensor]]:
    """`struct Arguments` for `x (M, K)` and `y (M, N)`, and the tensors that must live until the launch."""
    x = _aligned(x)
    keep = [x]

    def address(t: Tensor | None) -> int | None:
        if t is None:
            return None
        keep.append(t.contiguous())
        return keep[-1].data_ptr()

    a = _Arguments(x=x.data_ptr(), y=y.data_ptr(), m=x.shape[0], n=y.shape[1], k=x.shape[1])
    for i, (name, width, _) in enumerate(fmt.element.code_planes):
        field = "" if i == 0 else str(width)
        keep.append(_aligned(planes[name]))
        setattr(a, f"codes{field}", keep[-1].data_ptr())
        setattr(a, f"stride{field}", keep[-1].stride(0))
    a.scale, (a.scale_rows, a.scale_columns) = address(planes["scale"]), planes["scale"].shape
    a.zero, a.outer = address(planes.get("zero_point")), address(planes.get("outer_scale"))
    a.outer_columns = keep[-1].shape[1] if a.outer else 0
    a.offset, a.table = address(planes.get("scale_offset")), address(planes.get("codebook"))
    if row_scale is not None:
        a.row_scale, a.row_scales = address(row_scale), row_scale.shape[0]
    if bias is not None:
        # fp16 is widened; bf16 and fp32 are read as they are.
        a.bias = address(bias.float() if bias.dtype == torch.float16 else bias)
        a.bias_fp32 = int(bias.dtype != torch.bfloat16)
    return a, keep


@cache
def _kernel(fmt: Format, token_tiles: int, row_tiles: int, device: int) -> loader.CudaKernel:
    defines = constants(fmt)
    assert not isinstance(defines, str), defines
    more = (("TOKEN_TILES", token_tiles), ("ROW_TILES", row_tiles), ("MIN_BLOCKS", 2))
    return loader.load("small_m.cu", "small_m", defines + more, device)


def _aligned(t: Tensor) -> Tensor:
    """16-byte loads need 16-byte addresses and row strides; views cut at other places are copied."""
    fits = t.data_ptr() % 16 == 0 and t.stride(-1) == 1 and t.stride(0) * t.element_size() % 16 == 0
    return t if fits else t.clone(memory_format=torch.contiguous_format)
