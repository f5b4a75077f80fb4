"""The Hadamard transform of rows in one kernel: read once, written once. `kernels/hadamard.py` has the definition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.hadamard import factors, hartley, transformed
from lowbit.kernels.triton.early import let_the_next_start, wait_for_the_kernel_before
from lowbit.kernels.triton.launch import OPTIONS, ceil_pow2, early_options, on_device

# Numbers of a row that one program holds, the padding of its odd factor included.
LONGEST = 1 << 15
# What `tl.dot` takes at least along each side.
LEAST = 16


@triton.jit
def hadamard_kernel(
    x, out, signs, mixing, scale, ODD: tl.constexpr, TWO: tl.constexpr, LOG2: tl.constexpr, ROWS: tl.constexpr,
    SIGNED: tl.constexpr, INVERSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A row of `ODD * TWO` numbers per program, held as `(ROWS, TWO)`; `mixing (ODD, ODD)` is Hartley's matrix."""
    let_the_next_start(EARLY)
    i = tl.arange(0, ROWS)
    at = i[:, None] * TWO + tl.arange(0, TWO)[None, :]
    inside = at < ODD * TWO
    row = tl.program_id(0).to(tl.int64) * (ODD * TWO)
    if SIGNED:
        s = tl.load(signs + at, mask=inside, other=0).to(tl.float32)
    wait_for_the_kernel_before(EARLY)
    v = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    if SIGNED and not INVERSE:
        v *= s
    for step in tl.static_range(LOG2):
        pairs = tl.permute(tl.reshape(v, (ROWS * TWO // (2 << step), 2, 1 << step)), (0, 2, 1))
        a, b = tl.split(pairs)
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, TWO))
    if ODD > 1:
        j = tl.arange(0, ROWS)
        m = tl.load(mixing + i[:, None] * ODD + j[None, :], mask=(i[:, None] < ODD) & (j[None, :] < ODD), other=0.0)
        v = tl.dot(m, v, input_precision="ieee")
    v *= scale
    if SIGNED and INVERSE:
        v *= s
    tl.store(out + row + at, v.to(out.dtype.element_ty), mask=inside)


def hadamard(x: Tensor, signs: Tensor | None, inverse: bool) -> Tensor:
    """`x (..., K)`; fp64, and rows too long for one program or hardly divisible by 2, take PyTorch's own kernels."""
    odd, two = factors(x.shape[-1])
    rows = 1 if odd == 1 else ceil_pow2(odd, LEAST)
    if not x.numel() or x.dtype == torch.float64 or rows * two > LONGEST or (odd > 1 and two < LEAST):
        return transformed(x, signs, inverse)
    x = x.contiguous()
    out = torch.empty_like(x)
    with on_device(x):
        hadamard_kernel[(x.numel() // x.shape[-1],)](
            x, out, x if signs is None else signs, hartley(odd, x.device), two**-0.5, ODD=odd, TWO=two,
            LOG2=two.bit_length() - 1, ROWS=rows, SIGNED=signs is not None, INVERSE=inverse,
            num_warps=min(16, max(1, rows * two // 512)), **early_options(x.device), **OPTIONS,
        )  # fmt: skip
    return out
