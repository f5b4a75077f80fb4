"""The Hadamard transform of rows in CUDA C++ (`hadamard.cu`): each is read once and written once."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.cuda import loader
from lowbit.kernels.hadamard import factors
from lowbit.kernels.problem import arch_of
from lowbit.kernels.triton.launch import on_device

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
#: Products of an odd factor are written out one by one.
MOST_ODD = 47
#: Steps of a pass, if three passes suffice: 2^4 pairs of numbers are in a thread's registers.
STEPS = 4
MOST_SHARED = 96 << 10  # bytes of a block that every GPU has room for
HOPPERS_SHARED = 220 << 10


def why_not(x: Tensor) -> str | None:
    """Why the kernel does not take rows `x (..., K)`."""
    odd, two = factors(x.shape[-1])
    arch = arch_of(x.device) or (0, 0)
    if arch < (8, 0):
        return "needs compute capability 8.0"
    if x.dtype not in TYPES:
        return f"written for bf16, fp16 and fp32, got {x.dtype}"
    if odd > MOST_ODD or two < 4:
        return f"{x.shape[-1]} has the odd factor {odd}, beyond {MOST_ODD}, or is no multiple of 4"
    if shared_bytes(x.shape[-1]) > (HOPPERS_SHARED if arch[0] in (9, 10) else MOST_SHARED):
        return f"rows of {x.shape[-1]} numbers do not fit into shared memory"
    return loader.missing()


def radices(k: int) -> list[int]:
    """Steps of each pass over pairs of neighbours, as equal as can be."""
    steps = (factors(k)[1] // 2).bit_length() - 1
    passes = min(3, -(-steps // STEPS))
    return [steps // passes + (i < steps % passes) for i in range(passes)]


def shared_bytes(k: int) -> int:
    """A row in fp32, and a gap in front of every 2^r pairs."""
    return (k // 2 + (k // 2 >> radices(k)[0])) * 8


@cache
def source(k: int, dtype: torch.dtype, signed: bool, inverse: bool) -> tuple[loader.Source, int]:
    """What is compiled, and threads of a block."""
    odd, two = factors(k)
    first, second, third, *_ = [*radices(k), 0, 0]
    threads = min(512, max(64, -(-(k // 2 >> first) // 32) * 32))
    defines = {
        "ODD": odd, "LOG2": two.bit_length() - 1, "RADIX_1": first, "RADIX_2": second, "RADIX_3": third,
        "THREADS": threads, "TYPE": TYPES[dtype], "SIGNED": int(signed), "INVERSE": int(inverse),
    }  # fmt: skip
    return loader.Source("hadamard.cu", tuple(sorted(defines.items()))), threads


@cache
def _angles(odd: int) -> tuple[list[float], list[float]]:
    angles = [2 * math.pi * m / odd for m in range(odd)]
    return [math.cos(v) for v in angles], [math.sin(v) for v in angles]


@cache
def _arguments(odd: int) -> type[ctypes.Structure]:
    class Arguments(ctypes.Structure):
        """`struct Arguments` of hadamard.cu."""

        _fields_ = (
            ("x", ctypes.c_void_p), ("signs", ctypes.c_void_p), ("out", ctypes.c_void_p), ("scale", ctypes.c_float),
            ("cosine", ctypes.c_float * odd), ("sine", ctypes.c_float * odd),
        )  # fmt: skip

    return Arguments


def hadamard(x: Tensor, signs: Tensor | None, inverse: bool) -> Tensor:
    """`decoder_ops.hadamard` of rows that `why_not` has nothing against."""
    k = x.shape[-1]
    x = x.contiguous()
    signs = None if signs is None else signs.contiguous()
    out = torch.empty_like(x)
    odd, two = factors(k)
    cosine, sine = _angles(odd)
    a = _arguments(odd)(
        x.data_ptr(), None if signs is None else signs.data_ptr(), out.data_ptr(), two**-0.5 / math.sqrt(odd),
        (ctypes.c_float * odd)(*cosine), (ctypes.c_float * odd)(*sine),
    )  # fmt: skip
    found, threads = source(k, x.dtype, signs is not None, inverse)
    with on_device(x):
        kernel = loader.load(found, "hadamard", x.device.index)
        frame = loader.Frame(x.numel() // k, threads, shared_bytes(k), (a,))
        kernel.launch(frame, torch.cuda.is_current_stream_capturing())
    return out
