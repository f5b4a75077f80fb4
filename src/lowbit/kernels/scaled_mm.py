"""float8 x float8 through `torch._scaled_mm` (cuBLASLt or CUTLASS), after the fused quantization of the activation.

`use_fast_accum` stays off. On, Hopper adds products in the matrix units' own accumulator of about 14 bits, whose
error grows with K; off, partial sums are promoted to fp32, and results agree with the definition to the rounding of
the output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.kernels.problem import Operand, Problem


def cublas_scaled_mm(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """`x (M, K)` rounded to float8_e4m3 times codes `(N, K)` of the same element, scales per row or per tensor."""
    from lowbit.kernels.triton import act_quant, scaled_mm  # late: not every installation of torch brings triton

    assert problem.activation is not None
    w = planes["qdata"]
    codes, row_scale = act_quant.codes(x, problem.activation, act_scale)
    m, n = codes.shape[0], w.shape[0]
    weight_scale = planes["scale"].float()
    if w.stride(1) != 1 or w.stride(0) % 16 or w.data_ptr() % 16:
        # Columns cut out of a wider weight: cuBLAS wants rows that start at multiples of 16 bytes, Triton does not.
        return scaled_mm.matmul(codes, row_scale, w, weight_scale, bias, problem.dtype)
    if row_scale.shape[0] != 1 or weight_scale.shape[0] != 1:
        # Scales per row on one side ask for them on the other.
        row_scale = row_scale.expand(m, 1).contiguous()
        weight_scale = weight_scale.expand(n, 1).contiguous()
    bias = None if bias is None else bias.to(problem.dtype).contiguous()
    return torch._scaled_mm(
        codes, w.t(), row_scale, weight_scale.t(), bias, out_dtype=problem.dtype, use_fast_accum=False
    )
