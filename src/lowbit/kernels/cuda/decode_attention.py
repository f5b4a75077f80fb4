"""Attention of few new tokens over the KV cache in CUDA C++ (`decode_attention.cu`), where blocks form clusters."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.kernels.cache_layout import check_heads
from lowbit.kernels.cuda import loader
from lowbit.kernels.problem import arch_of, starts_early
from lowbit.kernels.triton.launch import multiprocessors, on_device

CHUNK = 16  # as in decode_attention.cu
MOST_ROWS = 32
MOST_CLUSTER = 8
MOST_STAGES = 5


class _Arguments(ctypes.Structure):
    """`struct Arguments` of decode_attention.cu."""

    _fields_ = (
        ("qkv", ctypes.c_void_p), ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
        ("positions", ctypes.c_void_p), ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p), ("k_norm", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("groups", ctypes.c_int), ("capacity", ctypes.c_int), ("eps", ctypes.c_float), ("scale_log2", ctypes.c_float),
    )  # fmt: skip


def why_not(
    qkv: Tensor, keys: Tensor, values: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, heads: int
) -> str | None:
    """Why the kernel does not take these, whose shapes are those of `decoder_ops.decode_attention`."""
    d, rows = keys.shape[3], qkv.shape[1] * (heads // keys.shape[1])
    if (arch_of(qkv.device) or (0, 0)) < (9, 0):
        return "needs compute capability 9.0"
    given = [t for t in (qkv, keys, values, q_norm, k_norm) if t is not None]
    if qkv.dtype not in (torch.bfloat16, torch.float16) or any(t.dtype != qkv.dtype for t in given):
        return "written for bf16 and fp16"
    if d % 32 or d > 128:
        return f"heads of {d} numbers are no multiple of 32 up to 128"
    if rows > MOST_ROWS:
        return f"{rows} heads of new tokens share a key head, more than {MOST_ROWS}"
    if not (keys.is_contiguous() and values.is_contiguous()) or any(t.data_ptr() % 16 for t in given):
        return "the cache has gaps, or something is not aligned"
    return loader.missing()


class Shape(NamedTuple):
    """Of a launch.

    Attributes:
        cluster: blocks for each key head of a sequence.
        warps: of a block, each of which has its own chunks.
        stages: chunks of a warp that there is room for.
    """

    cluster: int
    warps: int
    stages: int


def shape_for(sequences: int, capacity: int, rows: int, d: int, sms: int, arch: tuple[int, int]) -> Shape:
    """One multiprocessor for each block, and a chunk for each warp at least; two small blocks share one if they must.

    Args:
        sequences: of the cache, times its key heads.
        rows: heads of new tokens that share a key head.
    """
    chunks = -(-capacity // CHUNK)
    most = min(MOST_CLUSTER, sms // sequences, -(-chunks // 4))
    cluster = 1 << max(1, most).bit_length() - 1
    if sequences * cluster > sms:
        return Shape(cluster, 4, 2)
    # Sums of 32 rows take all the registers of four warps.
    warps = 8 if chunks > 4 * 4 * cluster and rows <= 16 else 4
    room = 200 << 10 if arch[0] in (9, 10) else 97 << 10
    turns = max(2, -(-chunks // (cluster * warps)))
    fitting = [s for s in range(2, min(turns, MOST_STAGES) + 1) if shared_bytes(d, rows, warps, s) <= room]
    return Shape(cluster, warps, max(fitting)) if fitting else Shape(cluster, 4, 2)


def shared_bytes(d: int, rows: int, warps: int, stages: int) -> int:
    """Of a block: queries, new keys and values, and the rings of its warps."""
    return CHUNK * (2 * d + 16) * (-(-rows // 16) + 2 + warps * stages * 2)


@cache
def source(d: int, shared: int, tokens: int, shape: Shape, norm: bool, dtype: torch.dtype) -> loader.Source:
    defines = {
        "WIDTH": d, "SHARED": shared, "TOKENS": tokens, "CLUSTER": shape.cluster, "WARPS": shape.warps,
        "STAGES": shape.stages, "NORM": int(norm), "FP16": int(dtype == torch.float16),
    }  # fmt: skip
    return loader.Source("decode_attention.cu", tuple(sorted(defines.items())))


def decode_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, heads: int, shape: Shape | None = None,
) -> Tensor:  # fmt: skip
    """`decoder_ops.decode_attention`, for what `why_not` has nothing against.

    Args:
        shape: up to 8 blocks, a power of two, of 4 or 8 warps, instead of the rule's choice.
    """
    check_heads(qkv, keys, heads)
    qkv = qkv.contiguous()
    tokens, (batch, groups, capacity, d) = qkv.shape[1], keys.shape
    rows, arch = tokens * heads // groups, arch_of(qkv.device) or (9, 0)
    shape = shape or shape_for(batch * groups, capacity, rows, d, multiprocessors(qkv.device), arch)
    found = source(d, heads // groups, tokens, shape, q_norm is not None, qkv.dtype)
    out = qkv.new_empty(batch, tokens, heads * d)
    given = (qkv, keys, values, positions, cos, sin, q_norm, k_norm, out)
    addresses = [None if t is None else t.data_ptr() for t in given]
    a = _Arguments(*addresses, groups, capacity, eps, math.log2(math.e) / math.sqrt(d))
    with on_device(qkv):
        kernel = loader.load(found, "decode_attention", qkv.device.index)
        shared = shared_bytes(d, rows, shape.warps, shape.stages)
        frame = loader.Frame(batch * groups * shape.cluster, 32 * shape.warps, shared, (a,))
        kernel.launch(frame, starts_early())
    return out
