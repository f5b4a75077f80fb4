"""Where `torch._weight_int8pack_mm` is right: every problem that `select` lets through, beside pages that must not be
touched. A wrong condition ends the process, so the sweep runs in one of its own."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

# From the plainest code path to the widest vectors; a machine runs its own and those before it.
CAPABILITIES = ["default", "avx2", "avx512"]
PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS = 3, 0x22


def guarded(t: Tensor) -> Tensor:
    """A copy of `t` that ends where readable memory ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    nbytes, page = t.numel() * t.itemsize, mmap.PAGESIZE
    size = -(-nbytes // page) * page
    start = libc.mmap(None, size + page, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0)
    assert libc.mprotect(start + size, page, 0) == 0
    memory = (ctypes.c_char * nbytes).from_address(start + size - nbytes)
    return torch.frombuffer(memory, dtype=t.dtype).view(t.shape).copy_(t)


def shifted(t: Tensor, nbytes: int) -> Tensor:
    """A copy of `t` that starts `nbytes` after a multiple of 64."""
    memory = torch.empty(t.numel() * t.itemsize + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + nbytes
    return memory[start : start + t.numel() * t.itemsize].view(t.dtype).view(t.shape).copy_(t)


def sweep() -> int:
    from lowbit.kernels.cpu.packed import int8_packed
    from lowbit.kernels.problem import Problem
    from lowbit.kernels.select import KERNELS

    kernel = next(k for k in KERNELS if k.name == "aten_int8_packed")
    count = 0
    for k in [*range(1, 300), 1024, 4096, 4112]:
        for m, n in ((1, 1), (1, 4), (3, 5), (7, 12), (32, 33), (8, 64), (2, 3)):
            problem = Problem(m, n, k, "int8:row", "", torch.bfloat16, "cpu")
            if kernel.why_not(problem) is not None:
                continue
            g = torch.Generator().manual_seed(k + m + n)
            x = torch.randn(m, k, generator=g).bfloat16()
            w = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
            scale = torch.rand(n, 1, generator=g)
            expected = (x.double() @ w.double().T) * scale.T
            wide = torch.cat([w, w], dim=1)
            for xs, ws in (
                (guarded(x), guarded(w)), (shifted(x, 2), w), (shifted(x, 32), shifted(w, 8)), (x, shifted(w, 1)),
                (x, wide[:, k:]),
            ):  # fmt: skip
                y = int8_packed(xs, {"qdata": ws, "scale": scale}, None, problem, None)
                assert y.shape == (m, n)
                # Two roundings to bf16, each of half a unit in the last of 8 bits.
                assert ((y.double() - expected).abs() <= expected.abs() * 2**-7 + 1e-3 * scale.T * k).all(), (m, n, k)
                count += 1
    return count


@pytest.mark.skipif(sys.platform != "linux", reason="the pages are protected with Linux' mprotect")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_problem_let_through_is_right(capability: str) -> None:
    own = torch.backends.cpu.get_cpu_capability().lower()
    usable = CAPABILITIES[: CAPABILITIES.index(own) + 1] if own in CAPABILITIES else CAPABILITIES[:1]
    if capability not in usable:
        pytest.skip(f"this processor's vectors are {own}")
    source = str(Path(__file__).parents[2] / "src")
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"ended with {run.returncode}: {run.stderr[-2000:]}"
    assert int(run.stdout) > 300


if __name__ == "__main__":
    print(sweep())
