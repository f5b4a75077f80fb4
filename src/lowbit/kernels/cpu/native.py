"""Fused CPU matmul for every format: native.c, compiled once by the machine's C compiler and called through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit.cache import cache_dir
from lowbit.formats.base import Format
from lowbit.formats.elements import Element, FloatElement, IntElement
from lowbit.kernels.blocked import split_input
from lowbit.kernels.hadamard import factors, hartley, transformed
from lowbit.kernels.problem import Operand, Problem

# No contraction to fused multiply-adds in the decoder: weights come out bit-equal to `Format.dequantize`.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-shared", "-fPIC", "-std=c11")
# Up to this many tokens a decoded row is used at once; above, blocks of rows are decoded for a matrix product.
MAX_FUSED_TOKENS = 8
# fp32 weights of a decoded block: small enough for the L2 caches, large enough to keep every thread busy.
BLOCK_ELEMENTS = 1 << 19


class _Weight(ctypes.Structure):
    """`struct weight` of native.c, field by field."""

    _fields_ = (
        ("n", ctypes.c_int64), ("k", ctypes.c_int64), ("planes", ctypes.c_int64),
        ("codes", ctypes.c_void_p * 3), ("width", ctypes.c_int64 * 3), ("stride", ctypes.c_int64 * 3),
        ("vector", ctypes.c_int64), ("by_byte", ctypes.c_int64), ("table", ctypes.c_void_p),
        ("float_shift", ctypes.c_int64), ("float_scale", ctypes.c_float), ("levels", ctypes.c_void_p),
        ("scale", ctypes.c_void_p), ("scale_kind", ctypes.c_int64), ("scale_table", ctypes.c_void_p),
        ("scale_n", ctypes.c_int64), ("scale_k", ctypes.c_int64), ("scale_columns", ctypes.c_int64),
        ("outer", ctypes.c_void_p), ("outer_k", ctypes.c_int64), ("outer_columns", ctypes.c_int64),
        ("offset", ctypes.c_void_p), ("zero", ctypes.c_void_p),
    )  # fmt: skip


def missing() -> str | None:
    """Why native code cannot be used here, or None. Compiles it at the first call (about a second, then cached)."""
    library = _library()
    return library if isinstance(library, str) else None


@cache
def _library() -> ctypes.CDLL | str:
    if os.environ.get("LOWBIT_NATIVE") == "0":
        return "switched off by LOWBIT_NATIVE=0"
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return "no C compiler (cc, gcc, clang) was found"
    try:
        library = ctypes.CDLL(str(_compile(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"{compiler} could not build native.c: {str(detail).strip().splitlines()[-1]}"
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.lowbit_linear.argtypes = (pointer, integer, pointer, pointer, pointer, integer, integer)
    library.lowbit_dequantize.argtypes = (pointer, integer, integer, pointer, integer, pointer, integer, integer)
    library.lowbit_linear.restype = library.lowbit_dequantize.restype = None
    library.lowbit_hadamard.argtypes = (
        pointer, integer, integer, integer, integer, pointer, pointer, integer, ctypes.c_float, pointer, pointer,
        integer,
    )  # fmt: skip
    library.lowbit_hadamard.restype = None
    quantize = library.lowbit_quantize_rows
    quantize.argtypes = (integer, pointer, integer, integer, integer, ctypes.c_float, pointer, pointer, integer)
    quantize.restype = integer
    return library


def _compile(compiler: str) -> Path:
    """The shared library in the cache; built beside it and renamed, so that processes never see half of one."""
    source = resources.files("lowbit.kernels.cpu").joinpath("native.c").read_text()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = hashlib.sha256("\0".join((source, *FLAGS, version, _cpu())).encode()).hexdigest()[:24]
    folder = cache_dir("native")
    for found in folder.glob(f"{key}-*.so"):
        if found == _named(folder, key, found.read_bytes()):
            return found
        found.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        code, built = Path(scratch, "native.c"), Path(scratch, "native.so")
        code.write_text(source)
        command = [compiler, *FLAGS, "-o", str(built), str(code)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        target = _named(folder, key, built.read_bytes())
        os.replace(built, target)
    return target


def _named(folder: Path, key: str, library: bytes) -> Path:
    """The name says what the file must hold: half of one, as a crash of the machine can leave, is made again."""
    return folder / f"{key}-{hashlib.sha256(library).hexdigest()[:16]}.so"


def _cpu() -> str:
    """What -march=native depends on: caches are shared between machines that share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor() + platform.machine()


def native(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """`x (M, K)` times the weight `(N, K)`; at most one block of rows is ever decoded.

    Arithmetic is fp32; many bf16 tokens on a CPU that multiplies bf16 meet weights rounded to bf16.
    """
    library = _library()
    assert isinstance(library, ctypes.CDLL)
    operand: Tensor
    row_scale: Tensor | None
    if problem.activation is None and isinstance(x, Tensor):
        operand, row_scale = x, None
    else:
        fast = quantize_rows(x, problem.act) if isinstance(x, Tensor) else None
        operand, row_scale = fast or split_input(x, problem.activation, act_scale)
    (m, k), n, threads = x.shape, problem.n, torch.get_num_threads()
    # Not for quantized activations: their row scale is still to come, and the product would be rounded twice.
    few, plain = m <= MAX_FUSED_TOKENS, problem.activation is None
    bf16 = plain and not few and problem.dtype == torch.bfloat16 and _multiplies_bf16()
    dtype = torch.bfloat16 if bf16 else torch.float32
    operand, y = operand.to(dtype), torch.empty(m, n, dtype=dtype)
    weight, keep = _describe(problem.weight, planes, n, k)
    size = k + 16 + 3 * planes["scale"].shape[1]
    scratch = torch.empty(threads * size, dtype=torch.float32)
    pool = (scratch.data_ptr(), size, threads)
    if few:
        library.lowbit_linear(ctypes.byref(weight), m, operand.data_ptr(), y.data_ptr(), *pool)
    else:
        blocks = list(problem.weight.row_blocks(n, k, BLOCK_ELEMENTS))
        room = _workspace(max(stop - start for start, stop in blocks) * k * dtype.itemsize).view(dtype)
        for start, stop in blocks:
            w = room[: (stop - start) * k].view(stop - start, k)
            library.lowbit_dequantize(ctypes.byref(weight), start, stop, w.data_ptr(), int(bf16), *pool)
            torch.mm(operand, w.T, out=y[:, start:stop])
    del keep
    if row_scale is not None:
        y = y * row_scale
    if bias is not None:
        y = y + bias
    return y.to(problem.dtype)


_kept = threading.local()


def _workspace(nbytes: int) -> Tensor:
    """At least so many bytes, uint8, that hold anything: this thread's own, which stay allocated.

    In new memory, a block of weights would cost as many page faults as it has pages.
    """
    found: Tensor | None = getattr(_kept, "block", None)
    if found is None or found.numel() < nbytes:
        with torch.inference_mode(False):
            found = _kept.block = torch.empty(-(-nbytes // 64) * 64, dtype=torch.uint8)
    return found


# `enum operand` of native.c and the magnitude that a row's largest gets, for activations that it quantizes.
_LEVELS = {"int8:row": (1, 127.5), "float8_e4m3:row": (2, 448.0)}


def quantize_rows(x: Tensor, act: str, codes: bool = False) -> tuple[Tensor, Tensor] | None:
    """The same values as `act` gives for `x (M, K)`: fp32 levels, or int8 `codes`, and scales fp32 `(M, 1)`.

    None where native code is missing, for other formats than `int8:row` (codes, levels) and `float8_e4m3:row` (levels),
    and for rows that are not ordinary (NaN, Inf, scales near the ends of fp32).
    """
    library = _library()
    if not isinstance(library, ctypes.CDLL) or act not in _LEVELS:
        return None
    kind, top = _LEVELS[act]
    x = (x if x.dtype in (torch.bfloat16, torch.float32) else x.float()).contiguous()
    (m, k), bf16 = x.shape, int(x.dtype == torch.bfloat16)
    out, scale = torch.empty(m, k, dtype=torch.int8 if codes else torch.float32), torch.empty(m, 1, dtype=torch.float32)
    to = out.data_ptr(), scale.data_ptr()
    left = library.lowbit_quantize_rows(
        0 if codes else kind, x.data_ptr(), bf16, m, k, top, *to, torch.get_num_threads()
    )
    return None if left else (out, scale)


def hadamard(x: Tensor, signs: Tensor | None, inverse: bool) -> Tensor:
    """What `transformed` gives for `x (..., K)`, bit by bit where K is a power of two."""
    library = _library()
    if not isinstance(library, ctypes.CDLL) or x.dtype == torch.float64 or not x.numel():
        return transformed(x, signs, inverse)
    k, threads = x.shape[-1], torch.get_num_threads()
    odd, two = factors(k)
    given = (x if x.dtype == torch.bfloat16 else x.float()).contiguous()
    signs = None if signs is None else signs.contiguous()
    out, scratch = torch.empty_like(given), torch.empty(threads * 2 * k, dtype=torch.float32)
    rows, mixing = given.numel() // k, hartley(odd, x.device)
    library.lowbit_hadamard(
        given.data_ptr(), int(given.dtype == torch.bfloat16), rows, odd, two, mixing.data_ptr(),
        None if signs is None else signs.data_ptr(), int(inverse), two**-0.5, out.data_ptr(), scratch.data_ptr(),
        threads,
    )  # fmt: skip
    return out.to(x.dtype)


@cache
def _multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bf16 products; emulated ones are slower than fp32."""
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported() for supported in known if supported is not None)


def _describe(fmt: Format, planes: Mapping[str, Tensor], n: int, k: int) -> tuple[_Weight, list[Tensor]]:
    """The C description of a weight, and the tensors that must live as long as it is used."""
    keep: list[Tensor] = []

    def address(t: Tensor | None) -> int | None:
        if t is None:
            return None
        keep.append(t.contiguous())
        return keep[-1].data_ptr()

    w = _Weight(n=n, k=k, planes=len(fmt.code_planes), vector=fmt.element.vector)
    for i, (name, width, _) in enumerate(fmt.element.code_planes):
        w.codes[i], w.width[i] = address(planes[name]), width
        w.stride[i] = keep[-1].shape[1]
    w.by_byte = int(len(fmt.code_planes) == 1)
    if not _converted(fmt.element):
        levels, table = _learned(fmt.element, planes["codebook"]) if "codebook" in planes else _fixed(fmt.element)
        w.levels, w.table = address(levels), address(table)
    if isinstance(fmt.element, FloatElement) and fmt.element.bits == 8:
        w.float_shift, w.float_scale = 10 - fmt.element.mantissa_bits, 2.0 ** (15 - fmt.element.bias)
    scale, plane = planes["scale"], fmt.plane("scale")
    if scale.dtype == torch.bfloat16:
        w.scale_kind = 1
    elif scale.dtype.itemsize == 1:
        w.scale_kind, w.scale_table = 2, address(_byte_values(scale.dtype))
    w.scale = address(scale if w.scale_kind else scale.float())
    w.scale_n, w.scale_k, w.scale_columns = plane.n or 0, plane.k or 0, scale.shape[1]
    if "outer_scale" in planes:
        w.outer, outer = address(planes["outer_scale"]), fmt.plane("outer_scale")
        w.outer_k, w.outer_columns = outer.k or 0, planes["outer_scale"].shape[1]
    w.offset = address(planes.get("scale_offset"))
    w.zero = address(planes.get("zero_point"))
    return w, keep


@cache
def _byte_values(dtype: torch.dtype) -> Tensor:
    """The value of each of the 256 bytes read as `dtype`."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _converted(element: Element) -> bool:
    """Whether codes are signed bytes that are converted, not looked up."""
    return isinstance(element, IntElement) and element.bits == 8 and element.symmetric


@cache
def _fixed(element: Element) -> tuple[Tensor, Tensor]:
    """`_tables` of an element without a codebook."""
    return _tables(element, element.decode(torch.arange(1 << element.bits, dtype=torch.uint8).unsqueeze(1), {}))


# Of codebooks, as long as they live, with the element and the version of their values.
_remembered = WeakTensorKeyDictionary()


def _learned(element: Element, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """`_tables` of a codebook, made anew where its values have changed; making them takes as long as a small layer."""
    if codebook.is_inference():  # nobody counts its versions
        return _tables(element, codebook)
    key, found = (element, codebook._version), _remembered.get(codebook)
    if found is None or found[0] != key:
        found = _remembered[codebook] = (key, _tables(element, codebook))
    tables: tuple[Tensor, Tensor] = found[1]
    return tables


def _tables(element: Element, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The level of every code, padded to the 16 entries that a vector register holds, and the table that is indexed:
    by byte where a byte holds whole codes, else the levels."""
    flat = levels.float().flatten()
    padded = torch.nn.functional.pad(flat, (0, max(0, 16 - flat.numel())))
    return padded, _by_byte(element, flat) if len(element.code_planes) == 1 else padded


def _by_byte(element: Element, levels: Tensor) -> Tensor:
    """The weights of every byte, `(256, 8 / bits * vector)`: what a byte of whole codes decodes to."""
    return levels.reshape(-1, element.vector)[_byte_codes(element.bits)].flatten(1)


@cache
def _byte_codes(width: int) -> Tensor:
    """The codes `(256, 8 / width)` packed in each byte, first weight first."""
    byte = torch.arange(256).unsqueeze(1)
    return (byte >> torch.arange(0, 8, width)) & ((1 << width) - 1)
