"""Device side of early launches (`launch.early_launches`), for kernels with a constant `EARLY`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def let_the_next_start(EARLY: tl.constexpr):
    """From here on the kernel behind may start; it will wait for this one's end where it reads results."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_the_kernel_before(EARLY: tl.constexpr):
    """Everything that kernels ahead have written is visible behind this. Every block has to come by."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
