"""Activations to 8-bit codes, or to their levels in bf16, in CUDA C++ (`act_quant.cu`).

Rows and groups of K that have scales of their own, and numbers under a given scale. What it does not take,
`triton.act_quant` does, to the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.formats.activation import Activation, parse_activation
from lowbit.formats.base import Format
from lowbit.formats.fp8 import Float8Format
from lowbit.formats.int import IntFormat
from lowbit.kernels.cuda import loader
from lowbit.kernels.problem import Problem, arch_of
from lowbit.kernels.triton.launch import multiprocessors, on_device

LEVELS = torch.bfloat16
PIECE = 8  # numbers that a thread loads at once
THREADS, MOST_THREADS = 128, 1024  # of a block of groups, of a block of a row, as in act_quant.cu
LONGEST = 65536  # of a row that the registers of a block hold
# The names of act_quant.cu.
_SCALE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {"float8_e4m3": 1, "float8_e5m2": 2}

Quantize = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


@cache
def constants(fmt: Format, given: bool, operand: torch.dtype) -> loader.Defines | str:
    """The kernel's constants for a format, or why it has no instance.

    Args:
        given: the scale is an argument: a calibrated one, or one that was found before.
        operand: dtype of what comes out, levels or codes.
    """
    scale, zero = fmt.scale_planes[0], fmt.has("zero_point")
    if type(fmt) not in (Float8Format, IntFormat):
        return f"{fmt} finds its scales in another way"
    if fmt.element.bits == 1:
        return "one bit is a sign, and its scale a mean"
    if operand != LEVELS and (fmt.element.bits != 8 or zero or operand != fmt.planes[0].dtype):
        return f"{fmt} has no codes in {operand}"
    if not given and scale.n != 1:
        return "the scale of several rows is found by other kernels"
    group = 0 if given else scale.k or 0
    if group not in (0, 32, 64, 128, 256) or (group and zero):
        return f"groups of {group}{' with zero points' if zero else ''} are not shared by lanes of a warp"
    return tuple(sorted({
        "KIND": _KINDS[fmt.variant] if isinstance(fmt, Float8Format) else 0, "BITS": fmt.element.bits,
        "ZERO": int(zero), "LEVELS": int(operand == LEVELS), "STATIC": int(given),
        "SCALE_TYPE": _SCALE_TYPES[scale.dtype], "GROUP": group,
    }.items()))  # fmt: skip


def why_not(
    act: Activation, given: bool, operand: torch.dtype, m: int, k: int, dtype: torch.dtype, arch: tuple[int, int] | None
) -> str | None:
    """Why an activation `(M, K)` in `dtype` is not quantized by this kernel, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"written for bf16 and fp16, got {dtype}"
    found = constants(act.format, given, operand)
    if isinstance(found, str):
        return found
    least = (8, 9) if isinstance(act.format, Float8Format) else (8, 0)
    if arch is None or arch < least:
        return f"needs an NVIDIA GPU of compute capability {least[0]}.{least[1]}"
    if k % PIECE:
        return f"K = {k} is no multiple of the {PIECE} numbers that a thread loads"
    by_row = not given and act.scale_tile[1] is None
    if by_row and k > LONGEST:
        return f"a row of {k} is too long for registers"
    if m * (k + 255) // PIECE >= 2**31 - 4096:
        return "its pieces are counted in 32 bits"
    return loader.missing()


class Config(NamedTuple):
    """How a launch cuts an activation.

    Attributes:
        chunks: pieces of 8 numbers that a thread holds.
        parts: blocks that share a row.
    """

    chunks: int
    parts: int
    threads: int
    blocks: int


def config_for(group: int | None, m: int, k: int, sms: int) -> Config:
    """A block for a row, or four while there are multiprocessors without one; else blocks of one run of pieces.

    Args:
        group: numbers that are not parted from each other; None: whole rows.
    """
    if group is None:
        pieces = k // PIECE
        # Four loads of a thread are under way at once, unless a warp suffices with fewer.
        chunks = next(c for c in (1, 2, 4, 8) if pieces <= c * (32 if c < 4 else MOST_THREADS))
        parts = chunks if m * chunks <= sms else 1
        return Config(chunks, parts, 32 * -(-pieces // (32 * chunks)), m * parts)
    pieces = m * -(-k // group) * group // PIECE
    chunks = 4 if pieces >= 2 * sms * 4 * THREADS else 1
    return Config(chunks, 1, THREADS, -(-pieces // (chunks * THREADS)))


def _instance(
    act: Activation, given: bool, operand: torch.dtype, m: int, k: int, dtype: torch.dtype, sms: int
) -> tuple[loader.Source, Config]:
    defines = constants(act.format, given, operand)
    assert not isinstance(defines, str), defines
    group = dict(defines)["GROUP"] or PIECE
    c = config_for(None if not given and act.scale_tile[1] is None else group, m, k, sms)
    more = {"FP16": int(dtype == torch.float16), "WHOLE": int(k % group == 0), "CHUNKS": c.chunks, "PARTS": c.parts}
    return loader.Source("act_quant.cu", tuple(sorted((dict(defines) | more).items()))), c


def sources(problem: Problem, operand: str, sms: int) -> list[loader.Source]:
    """What is compiled to quantize a problem's activation on a GPU with `sms` multiprocessors.

    Args:
        operand: "levels" or "codes", as kernels of the table want it.
    """
    act = problem.activation
    if act is None or not operand or (act.grouped and operand == "levels"):  # these are multiplied by their scales
        return []
    dtype = LEVELS if operand == "levels" else act.format.planes[0].dtype
    how = act, act.static or act.scale_tile[0] is None, dtype, problem.m, problem.k, problem.dtype
    return [] if why_not(*how, problem.arch) else [_instance(*how, sms)[0]]


# Launches ----------------------------------------------------------------------------------------


class Arguments(ctypes.Structure):
    """`struct Arguments` of act_quant.cu, field by field."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("operand", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("given", ctypes.c_void_p),
        ("m", ctypes.c_int), ("k", ctypes.c_int),
    )  # fmt: skip


class Plan(NamedTuple):
    """What launches of one kind have in common.

    Attributes:
        shapes: of the operand and of its scales.
        operand: dtype.
        given: whether the scale is an argument.
    """

    shapes: tuple[tuple[int, int], tuple[int, int]]
    operand: torch.dtype
    given: bool
    kernel: loader.CudaKernel
    frames: loader.Frames

    def takes(self, x: Tensor, scale: Tensor | None) -> bool:
        """Whether the tensors are as `start` wants them; everything else is settled."""
        given = scale is not None and scale.dtype == torch.float32
        return x.data_ptr() % 16 == 0 and given >= self.given

    def start(self, x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Operand `(M, K)` and scales of `x (..., K)`, which has no gaps; `scale` is the given one."""
        frame = self.frames.take()
        operand = torch.empty(self.shapes[0], dtype=self.operand, device=x.device)
        scales = torch.empty(self.shapes[1], dtype=torch.float32, device=x.device)
        a = frame.arguments[0]
        a.x, a.operand, a.scales = x.data_ptr(), operand.data_ptr(), scales.data_ptr()
        if scale is not None:
            a.given = scale.data_ptr()
        with on_device(x):
            self.kernel.launch(frame, torch.cuda.is_current_stream_capturing())
        self.frames.give(frame)
        return operand, scales


def plan(
    act: Activation, given: bool, operand: torch.dtype, m: int, k: int, dtype: torch.dtype, device: torch.device
) -> Plan | None:
    """For calls that look alike; None where this kernel does not take them."""
    return _plan(act.spec, given, operand, m, k, dtype, device)


@lru_cache(maxsize=4096)
def _plan(
    spec: str, given: bool, operand: torch.dtype, m: int, k: int, dtype: torch.dtype, device: torch.device
) -> Plan | None:
    act = parse_activation(spec)
    assert act is not None
    if why_not(act, given, operand, m, k, dtype, arch_of(device)) is not None:
        return None
    source, c = _instance(act, given, operand, m, k, dtype, multiprocessors(device))
    group = dict(source.defines)["GROUP"]
    scales = (1, 1) if given else (m, -(-k // group) if group else 1)

    def frame() -> loader.Frame:
        return loader.Frame(c.blocks, c.threads, 0, (Arguments(m=m, k=k),))

    kernel = loader.load(source, "act_quant", device.index)
    return Plan(((m, k), scales), operand, given, kernel, loader.Frames(frame))


def quantizer(problem: Problem, operand: torch.dtype, device: int) -> Quantize:
    """Operand and scales of `x (..., K)`, which has no gaps, and its static scale, for calls that look alike."""
    act, m, k = problem.activation, problem.m, problem.k
    assert act is not None
    found = plan(act, act.static, operand, m, k, problem.dtype, torch.device("cuda", device))

    def quantize(x: Tensor, act_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        scale = act_scale if act.static else None
        if found is not None and found.takes(x, scale):
            return found.start(x, scale)
        from lowbit.kernels.triton import act_quant

        return (act_quant.split if operand == LEVELS else act_quant.codes)(x.view(m, k), act, act_scale)

    return quantize
