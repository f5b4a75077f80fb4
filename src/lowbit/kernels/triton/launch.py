"""What every launch shares: compile options and the right device."""

from __future__ import annotations

import contextlib
from functools import cache

import torch
from torch import Tensor

from lowbit.kernels.problem import capability, starts_early

# Products and sums round one after the other, as in the definitions of the formats.
OPTIONS = {"enable_fp_fusion": False}
_NOTHING = contextlib.nullcontext()


def on_device(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels start on the current device; make it the one that holds `t`."""
    # PyTorch runs on the GPU that holds `t`: nothing has to be initialized, as `torch.cuda.current_device` would.
    if t.is_cuda and t.get_device() != torch._C._cuda_getDevice():
        return torch.cuda.device(t.device)
    return _NOTHING


def ceil_pow2(n: int, least: int = 1) -> int:
    """The smallest power of two from `n` on, and from `least` on."""
    return max(least, 1 << (n - 1).bit_length())


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere (the interpreter runs programs one by one)."""
    return _count(device.index or 0) if device.type == "cuda" else 1


@cache
def _count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def has_native_float8(device: torch.device) -> bool:
    """Whether the GPU converts and multiplies float8 itself."""
    return device.type == "cuda" and capability(device.index or 0) >= (8, 9)


def uses_ptx(device: torch.device) -> bool:
    """Whether kernels may hold PTX: on NVIDIA GPUs, not on AMD's and not in Triton's interpreter."""
    return device.type == "cuda" and torch.version.hip is None


def early_options(device: torch.device) -> dict[str, bool]:
    """Constants and compile options of a kernel with a constant `EARLY`, for a launch here and now."""
    if starts_early() and uses_ptx(device) and capability(device.index or 0) >= (9, 0):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}
