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
# An odd factor costs as many products for each number.
MOST_ODD = 127


@triton.jit
def hadamard_kernel(
    x, out, signs, mixing, scale, ODD: tl.constexpr, TWO: tl.constexpr, LOG2: tl.constexpr, ROWS: tl.constexpr,
    SIGNED: tl.constexpr, INVERSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A row of `ODD * TWO` numbers per program, held as `(ROWS, TWO)`; `mixing (ODD, ODD)` is Hartley's matrix."""
    let_the_next_start(EARLY)
    i = tl.arange(0, ROWS)
    column = tl.arange(0, TWO)
    at = i[:, None] * TWO + column[None, :]
    inside = at < ODD * TWO
    row = tl.program_id(0).to(tl.int64) * (ODD * TWO)
    if SIGNED and (INVERSE or ODD == 1):
        s = tl.load(signs + at, mask=inside, other=0).to(tl.float32)
    wait_for_the_kernel_before(EARLY)
    if ODD == 1:
        v = tl.load(x + row + at).to(tl.float32)
        if SIGNED and not INVERSE:
            v *= s
    else:
        # The two factors commute. Parts of the row come from the cache for all the sums that they are in.
        v = tl.zeros((ROWS, TWO), dtype=tl.float32)
        for j in range(ODD):
            part = tl.load(x + row + j * TWO + column).to(tl.float32)
            if SIGNED and not INVERSE:
                part *= tl.load(signs + j * TWO + column).to(tl.float32)
            m = tl.load(mixing + i * ODD + j, mask=i < ODD, other=0.0)
            v = tl.fma(tl.broadcast_to(m[:, None], (ROWS, TWO)), tl.broadcast_to(part[None, :], (ROWS, TWO)), v)
    for step in tl.static_range(LOG2):
        pairs = tl.permute(tl.reshape(v, (ROWS * TWO // (2 << step), 2, 1 << step)), (0, 2, 1))
        a, b = tl.split(pairs)
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, TWO))
    v *= scale
    if SIGNED and INVERSE:
        v *= s
    tl.store(out + row + at, v.to(out.dtype.element_ty), mask=inside)


def hadamard(x: Tensor, signs: Tensor | None, inverse: bool) -> Tensor:
    """`x (..., K)`; fp64, and rows too long for one program or hardly divisible by 2, take PyTorch's own kernels."""
    odd, two = factors(x.shape[-1])
    rows = ceil_pow2(odd)
    if not x.numel() or x.dtype == torch.float64 or rows * two > LONGEST or odd > MOST_ODD:
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
