"""What the GPUs of one host exchange between two kernels (`all_reduce.cu`): sums with or without the RMSNorm behind
them, and parts laid side by side. For as few tokens as one step has; NCCL moves large tensors faster.

Each process lets the others write into memory of its GPU (CUDA's inter-process memory handles).
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit.kernels.cuda import loader
from lowbit.kernels.problem import capability
from lowbit.kernels.triton.launch import on_device

#: Blocks at most: fewer than there are multiprocessors, so that all of them run at once and none waits for another.
BLOCKS = 128
MOST_RANKS = 8
HANDLE_BYTES = 64  # of CUipcMemHandle
SUM, NORM, GATHER = range(3)  # as in all_reduce.cu


class _Arguments(ctypes.Structure):
    """`struct Arguments` of all_reduce.cu."""

    _fields_ = (
        ("y", ctypes.c_void_p), ("x", ctypes.c_void_p), ("weight", ctypes.c_void_p), ("total", ctypes.c_void_p),
        ("out", ctypes.c_void_p), ("calls", ctypes.c_void_p), ("memory", ctypes.c_void_p * MOST_RANKS),
        ("elements", ctypes.c_int), ("width", ctypes.c_int), ("columns", ctypes.c_int), ("rank", ctypes.c_int),
        ("eps", ctypes.c_float),
    )  # fmt: skip


class AllReduce:
    """One rank's side of the exchange. All ranks make the same calls in the same order, on one stream each.

    Tensors are bf16 or fp16. Every rank gets the same bits: terms are added in fp32 in the order of the ranks, and the
    sum is rounded once.
    """

    def __init__(self, rank: int, memory: Sequence[int], width: int, device: torch.device) -> None:
        """
        Args:
            memory: addresses of `memory_bytes(width, ranks)` zeros on each rank's GPU.
            width: elements of a row, a multiple of 8.
        """
        self.rank, self.world, self.width, self.device = rank, len(memory), width, device
        self._calls = torch.zeros(BLOCKS, dtype=torch.int32, device=device)
        self._memory = (ctypes.c_void_p * MOST_RANKS)(*memory)

    def takes(self, y: Tensor) -> bool:
        """Whether `y (..., n)` can be exchanged."""
        known = y.dtype in (torch.bfloat16, torch.float16) and y.device == self.device and y.is_contiguous()
        return known and y.shape[-1] % 8 == 0 and y.data_ptr() % 16 == 0 and 0 < y.numel() * self.world < 2**31

    def add_up(self, y: Tensor) -> Tensor:
        """The sum of all ranks' `y (..., width)`, in its place."""
        self._launch(SUM, y, y)
        return y

    def add_rms_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`decoder_ops.add_rms_norm` of `x` and the sum of all ranks' `y`, both `(..., width)`."""
        total, out = torch.empty_like(y), torch.empty_like(y)
        self._launch(NORM, y, out, x.contiguous(), weight.contiguous(), total, eps)
        return total, out

    def gather(self, y: Tensor) -> Tensor:
        """All ranks' `y (..., n)` side by side: `(..., ranks n)`."""
        out = y.new_empty(*y.shape[:-1], y.shape[-1] * self.world)
        self._launch(GATHER, y, out)
        return out

    def _launch(
        self, mode: int, y: Tensor, out: Tensor, x: Tensor | None = None, weight: Tensor | None = None,
        total: Tensor | None = None, eps: float = 0.0,
    ) -> None:  # fmt: skip
        at = [None if t is None else t.data_ptr() for t in (y, x, weight, total, out)]
        numbers = (y.numel(), self.width, y.shape[-1], self.rank, eps)
        a = _Arguments(*at, self._calls.data_ptr(), self._memory, *numbers)
        threads, _ = geometry(self.width)
        with on_device(y):
            kernel = loader.load(source(mode, self.world, self.width, y.dtype), "all_reduce", y.device.index)
            frame = loader.Frame(min(BLOCKS, -(-y.numel() // self.width)), threads, 0, (a,))
            kernel.launch(frame, torch.cuda.is_current_stream_capturing())


def geometry(width: int) -> tuple[int, int]:
    """Threads of a block, and groups of 8 elements that each has of a row."""
    groups = -(-width // 8)
    items = -(-groups // 1024)
    return -(-groups // (32 * items)) * 32, items


def memory_bytes(width: int, world: int) -> int:
    """Bytes that the ranks write into: half of them data, for two calls of every block."""
    threads, items = geometry(width)
    return BLOCKS * 2 * world * 2 * threads * items * 16


@cache
def source(mode: int, world: int, width: int, dtype: torch.dtype) -> loader.Source:
    threads, items = geometry(width)
    defines = {"WORLD": world, "THREADS": threads, "ITEMS": items, "MODE": mode, "FP16": int(dtype == torch.float16)}
    return loader.Source("all_reduce.cu", tuple(sorted(defines.items())))


# Between processes -------------------------------------------------------------------------------

#: One exchange for each group, width and device, kept until the process ends: graphs may hold its addresses.
_connected: dict[tuple[Any, ...], AllReduce | str] = {}


def connect(group: dist.ProcessGroup, width: int, device: torch.device) -> AllReduce | str:
    """The exchange between the ranks of a group, or why there is none. All of them call it; all get the same answer."""
    key = (group.group_name, width, device)
    if key not in _connected:
        _connected[key] = _connect(group, width, device)
    return _connected[key]


def _connect(group: dist.ProcessGroup, width: int, device: torch.device) -> AllReduce | str:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    mine: dict[str, Any] = {"host": _host(), "why_not": _why_not(width, world, device), "handle": b"", "at": 0}
    if mine["why_not"] is None:
        try:
            mine["at"], mine["handle"] = _shared(memory_bytes(width, world), device)
        except RuntimeError as error:
            mine["why_not"] = str(error)
    everyone: list[dict[str, Any]] = [{} for _ in range(world)]
    dist.all_gather_object(everyone, mine, group=group)
    reasons = [f"rank {i}: {of['why_not']}" for i, of in enumerate(everyone) if of["why_not"] is not None]
    if len({of["host"] for of in everyone}) > 1:
        reasons.append("the ranks are on several hosts")
    if not reasons:
        try:
            memory = [mine["at"] if i == rank else _opened(of["handle"], device) for i, of in enumerate(everyone)]
        except RuntimeError as error:
            reasons.append(f"rank {rank}: {error}")
    # Nobody writes before everyone can be written to, and one rank's failure is every rank's answer.
    failed: list[list[str]] = [[] for _ in range(world)]
    dist.all_gather_object(failed, reasons, group=group)
    found = list(dict.fromkeys(reason for of in failed for reason in of))
    return "; ".join(found) if found else AllReduce(rank, memory, width, device)


def _why_not(width: int, world: int, device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device} is no NVIDIA GPU"
    if capability(device.index or 0) < (8, 0):
        return "needs compute capability 8.0"
    if not 2 <= world <= MOST_RANKS:
        return f"written for 2 to {MOST_RANKS} ranks, there are {world}"
    if width % 8:
        return f"rows of {width} are no multiple of 8"
    return loader.missing()


def _host() -> tuple[str, str]:
    """Where this process runs; names alone can be the same in containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.exists() else ""


def _shared(size: int, device: torch.device) -> tuple[int, bytes]:
    """The address of `size` zeros on a device, and the handle by which other processes get at them."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the primary context current
        address = loader.check(driver.cuMemAlloc(size), "cuMemAlloc")
        loader.check(driver.cuMemsetD8(address, 0, size), "cuMemsetD8")
        torch.cuda.synchronize()
        handle = loader.check(driver.cuIpcGetMemHandle(address), "cuIpcGetMemHandle")
    return int(address), ctypes.string_at(handle.getPtr(), HANDLE_BYTES)


def _opened(handle: bytes, device: torch.device) -> int:
    """The address, for a device, of another process's memory."""
    from cuda.bindings import driver

    given = driver.CUipcMemHandle()
    ctypes.memmove(given.getPtr(), handle, HANDLE_BYTES)
    with torch.cuda.device(device):
        flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        return int(loader.check(driver.cuIpcOpenMemHandle(given, flags), "cuIpcOpenMemHandle"))
