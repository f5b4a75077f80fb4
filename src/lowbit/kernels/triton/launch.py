"""What every launch shares: compile options and the right device."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import cache
from typing import Any

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


#: The kernel, whose id is its own as long as it is here, what it was compiled to, and the constants in their order.
_started: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}


def start(kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """`kernel[grid](*arguments, **named)`, in less time where the like was launched before.

    To find what it compiled, Triton looks at every argument, which takes several times as long as the launch and is
    what an eager call waits for. The choice depends on dtypes, on addresses modulo 16, on numbers, constants and
    options; for the same ones it is remembered. For kernels whose numbers are seldom others: not with M among them.

    Args:
        arguments: by position, tensors on the current device and numbers; the first is a tensor.
        named: all of the kernel's constants, and compile options.
    """
    given: list[Any] = []
    seen: list[Any] = []
    for a in arguments:
        if isinstance(a, Tensor):
            address = a.data_ptr()
            given.append(address)
            seen += a.dtype, address % 16
        else:
            given.append(a)
            seen.append(a)
    index = arguments[0].get_device()
    # Triton's own hash of a kernel is one of its source.
    key = (id(kernel), index, *seen, *named, *named.values())
    found = _started.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **named)
        # The interpreter compiles nothing; for AMD's GPUs, sizes of tensors decide, too.
        if compiled is not None and torch.version.hip is None:
            constants = tuple(named[name] for name in kernel.arg_names[len(arguments) :])
            _started[key] = kernel, compiled, constants
        return
    _, compiled, constants = found
    # Of tensors, Triton asks the driver where they lie; addresses it takes as they are.
    compiled[grid[0], grid[1], 1](*given, *constants, stream=torch._C._cuda_getCurrentRawStream(index))


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
