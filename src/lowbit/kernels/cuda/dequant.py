"""Rows of a weight decoded into bf16 in CUDA C++ (`dequant.cu`), for a workspace that cuBLAS multiplies."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.kernels.cuda import decode, loader
from lowbit.kernels.problem import arch_of
from lowbit.kernels.triton.launch import on_device

THREADS = 256  # as in dequant.cu


@cache
def constants(fmt: Format) -> loader.Defines | str:
    """The kernel's constants, or why a format has no instance: a thread's chunk must lie inside a group."""
    defines = decode.constants(fmt)
    if isinstance(defines, str):
        return defines
    quad = 4 if decode.chunk(fmt, 4) >= 8 else 8
    group = fmt.plane("scale").k
    if group is not None and group % decode.chunk(fmt, quad):
        return f"groups of {group} do not line up with the {decode.chunk(fmt, quad)} weights that a thread decodes"
    found = dict(defines) | {"QUAD": quad}
    if group is not None:
        found["SCALE_MODE"] = decode.PER_STEP
    return tuple(sorted(found.items()))


def why_not(out: Tensor, fmt: Format, k: int, columns: tuple[int, int]) -> str | None:
    """Why `launch` cannot decode these columns of a weight with `k` columns."""
    if out.dtype != torch.bfloat16 or not out.is_cuda:
        return "writes bf16 on CUDA"
    if (arch_of(out.device) or (0, 0)) < (8, 0):
        return "needs compute capability 8.0"
    defines = constants(fmt)
    if isinstance(defines, str):
        return defines
    if k % decode.chunk(fmt) or any(c % 64 for c in columns) or out.stride(0) % 8:
        return "rows are cut inside of what a thread writes at once"
    return loader.missing()


def launch(
    out: Tensor, planes: Mapping[str, Tensor], fmt: Format, k: int, rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:
    """Decode rows and columns `[start, stop)` into `out`, as `triton.dequant.dequantize_into` says."""
    (n0, n1), (k0, k1) = rows, columns
    held = decode.in_order(planes, fmt)
    sizes = out.shape[0], held[0].shape[0], k
    quad, rows_of_block = dict(_defines(fmt))["QUAD"], 32 if decode.has_table(fmt) else 8
    blocks = -(-(k1 - k0) // (decode.chunk(fmt, quad) * THREADS)) * -(-(n1 - n0) // rows_of_block)
    numbers = (ctypes.c_int(v) for v in (n0, n1 - n0, k0, k1, out.stride(0)))
    frame = loader.Frame(blocks, THREADS, 0, (decode.Arguments(), *numbers))
    _keep = decode.fill(frame, out, out, held, fmt.spec, sizes, None, None)
    with on_device(out):
        loader.load(loader.Source("dequant.cu", _defines(fmt)), "dequant", out.device.index).launch(frame)
    return out


def _defines(fmt: Format) -> loader.Defines:
    defines = constants(fmt)
    assert not isinstance(defines, str), defines
    return defines
