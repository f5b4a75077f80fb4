"""Large M: rows of the weight are decoded into one small workspace, cuBLAS multiplies, the next rows follow.

The workspace is the only copy of decoded weights that ever exists, and it stays in the L2 cache between being
written and being read. It is allocated by PyTorch inside the op, so streams and CUDA graphs treat it like any other
temporary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.kernels.cuda import dequant as cuda_dequant
from lowbit.kernels.problem import Operand, Problem
from lowbit.kernels.triton import act_quant
from lowbit.kernels.triton.decode import layout_of, levels, scales, weight_args
from lowbit.kernels.triton.launch import OPTIONS, on_device

# Bytes of decoded weights at a time, and of fp32 products that still wait for their activation's scale. 32 MiB are
# 4096 rows of K = 4096: with 1024 tokens, one tile of 128 x 256 for each of 128 multiprocessors.
WORKSPACE = 32 << 20
PRODUCTS = 24 << 20
BLOCK_N, BLOCK_K = 64, 64


@triton.jit
def dequantize_kernel(
    out, stride_out, p0, p1, p2, stride_p0, stride_p1, stride_p2, bytes_p0, bytes_p1, bytes_p2,
    scale, stride_scale, zero_point, stride_zero_point, outer_scale, stride_outer_scale,
    scale_offset, stride_scale_offset, codebook, n0, n1, k_begin, k_end, K,
    L: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`out[n - n0, k - k_begin]` for `n0 <= n < n1`, `k_begin <= k < k_end`. Grid over blocks of both."""
    local = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = n0 + local
    ok = rows < n1
    k0 = k_begin + tl.program_id(1) * BK
    w = levels(
        p0, p1, p2, stride_p0, stride_p1, stride_p2, bytes_p0, bytes_p1, bytes_p2,
        zero_point, stride_zero_point, codebook, rows, ok, k0, K, L, BK, tl.float32,
    )  # fmt: skip
    w *= scales(
        scale, stride_scale, outer_scale, stride_outer_scale, scale_offset, stride_scale_offset,
        rows, ok, k0, K, L, BK, 1,
    )  # fmt: skip
    k = k0 + tl.arange(0, BK)
    at = out + local.to(tl.int64)[:, None] * stride_out + (k - k_begin)[None, :]
    tl.store(at, w.to(out.dtype.element_ty), mask=ok[:, None] & (k < k_end)[None, :])


@triton.jit
def scale_rows_kernel(
    y, stride_y, products, row_scale, stride_row_scale, bias, M, N, HAS_BIAS: tl.constexpr, BN: tl.constexpr
):
    """`y = products * row_scale + bias` for fp32 products `(M, N)`. Grid `(M, ceil(N/BN))`."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    value = tl.load(products + m * N + n, mask=n < N, other=0.0) * tl.load(row_scale + m * stride_row_scale)
    if HAS_BIAS:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * stride_y + n, value.to(y.dtype.element_ty), mask=n < N)


def dequantize_into(
    out: Tensor, planes: Mapping[str, Tensor], fmt: Format, k: int, rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:
    """Decode rows and columns `[start, stop)` of a weight with `k` columns into `out`, each value rounded once.

    The first column is a multiple of 64, so that a block never starts inside a byte or a vector of a codebook.
    """
    (n0, n1), (k0, k1) = rows, columns
    assert out.shape == (n1 - n0, k1 - k0)
    assert out.stride(1) == 1
    assert k0 % BLOCK_K == 0
    if cuda_dequant.why_not(out, fmt, k, columns) is None:
        return cuda_dequant.launch(out, planes, fmt, k, rows, columns)
    with on_device(out):
        dequantize_kernel[(-(-(n1 - n0) // BLOCK_N), -(-(k1 - k0) // BLOCK_K))](
            out, out.stride(0), n0=n0, n1=n1, k_begin=k0, k_end=k1, K=k, L=layout_of(fmt), BN=BLOCK_N, BK=BLOCK_K,
            num_warps=4, **weight_args(fmt, planes), **OPTIONS,
        )  # fmt: skip
    return out


def rows_per_chunk(row_bytes: int, budget: int) -> int:
    """As many rows as fit `budget`, in whole blocks where possible, at least one."""
    rows = budget // max(row_bytes, 1)
    return max(1, rows // BLOCK_N * BLOCK_N or rows)


def chunked(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """`x (M, K)` times the weight `(N, K)`, rows of the weight at a time."""
    fmt, n, (m, k) = problem.weight, problem.n, x.shape
    row_scale = None
    act = problem.activation
    if act is not None and act.grouped:
        assert isinstance(x, Tensor)
        # Scales that vary along K cannot wait for the end of a sum: they cost the operand one rounding.
        x = act_quant.dequantized(x, act, act_scale)
    elif act is not None:
        x, row_scale = act_quant.split(x, act, act_scale)
    assert isinstance(x, Tensor)
    bias = None if bias is None else bias.to(problem.dtype).contiguous()
    y = torch.empty(m, n, dtype=problem.dtype, device=x.device)
    chunk = rows_per_chunk(k * x.element_size(), WORKSPACE)
    if row_scale is not None:
        chunk = min(chunk, rows_per_chunk(4 * m, PRODUCTS))
        products = torch.empty(m * min(chunk, n), dtype=torch.float32, device=x.device)
    workspace = torch.empty(min(chunk, n), k, dtype=x.dtype, device=x.device)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        w = dequantize_into(workspace[: stop - start], planes, fmt, k, (start, stop), (0, k))
        out, b = y[:, start:stop], None if bias is None else bias[start:stop]
        if row_scale is not None:
            # The row scale comes before the only rounding: a sum of 8-bit codes can exceed what fp16 holds.
            part = products[: m * (stop - start)].view(m, stop - start)
            torch.mm(x, w.T, out_dtype=torch.float32, out=part)
            _scale_rows(out, part, row_scale, b)
        elif b is not None:
            torch.addmm(b, x, w.T, out=out)
        else:
            torch.mm(x, w.T, out=out)
    return y


def _scale_rows(y: Tensor, products: Tensor, row_scale: Tensor, bias: Tensor | None) -> None:
    m, n = y.shape
    with on_device(y):
        scale_rows_kernel[(m, -(-n // 1024))](
            y, y.stride(0), products, row_scale, 0 if row_scale.shape[0] == 1 else 1,
            products if bias is None else bias, m, n, HAS_BIAS=bias is not None, BN=1024, num_warps=4, **OPTIONS,
        )  # fmt: skip


def dgrad(grad: Tensor, planes: Mapping[str, Tensor], fmt: Format, n: int, k: int) -> Tensor:
    """`grad (M, N) @ W (N, K)`: columns of the weight at a time, so that every sum over N is cuBLAS's own."""
    out = torch.empty(grad.shape[0], k, dtype=grad.dtype, device=grad.device)
    if grad.shape[0] == 0 or k == 0 or n == 0:
        return out.zero_()
    chunk = max(BLOCK_K, WORKSPACE // max(n * grad.element_size(), 1) // BLOCK_K * BLOCK_K)
    workspace = torch.empty(n * min(chunk, k), dtype=grad.dtype, device=grad.device)
    for start in range(0, k, chunk):
        stop = min(start + chunk, k)
        w = workspace[: n * (stop - start)].view(n, stop - start)
        dequantize_into(w, planes, fmt, k, (0, n), (start, stop))
        torch.mm(grad, w, out=out[:, start:stop])
    return out
