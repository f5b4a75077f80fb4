"""Rows decoded for the workspace by the CUDA C++ kernel: every weight is the definition's, rounded once."""

from __future__ import annotations

import pytest
import torch
from cases import sqnr_db
from gpu_cases import weight_on_gpu

from lowbit.formats import Format, registered
from lowbit.kernels.cuda import decode, dequant
from lowbit.kernels.triton.dequant import dequantize_into

FORMATS = [f for f in registered() if not isinstance(dequant.constants(f), str)]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "rows", "columns"),
    [
        (64, 256, (0, 64), (0, 256)), (384, 1152, (128, 384), (0, 1152)), (300, 2048, (128, 300), (128, 1920)),
        (1, 4096, (0, 1), (0, 4096)),
    ],
)  # fmt: skip
def test_equals_the_definition(fmt: Format, n: int, k: int, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    w = weight_on_gpu(fmt, n, k)
    out = torch.full((rows[1] - rows[0], columns[1] - columns[0]), torch.nan, dtype=torch.bfloat16, device="cuda")
    assert dequant.why_not(out, fmt, k, columns) is None
    dequantize_into(out, w.planes, fmt, k, rows, columns)
    exact = fmt.dequantize(w.planes, n, k)[rows[0] : rows[1], columns[0] : columns[1]]
    if decode.has_table(fmt):
        # Entries are rounded to bf16 before they are scaled.
        assert sqnr_db(exact.double(), out) > 50
    else:
        assert torch.equal(out, exact.bfloat16())


def test_most_formats_have_an_instance() -> None:
    assert {f.spec for f in registered()} - {f.spec for f in FORMATS} == set()


def test_other_dtypes_and_cuts_go_to_the_portable_kernel() -> None:
    fmt = FORMATS[0]
    w = weight_on_gpu(fmt, 64, 200)
    for dtype, k, columns in ((torch.float32, 200, (0, 192)), (torch.bfloat16, 200, (0, 200))):
        out = torch.full((64, columns[1]), torch.nan, dtype=dtype, device="cuda")
        assert dequant.why_not(out, fmt, k, columns) is not None
        dequantize_into(out, w.planes, fmt, k, (0, 64), columns)
        assert torch.equal(out, fmt.dequantize(w.planes, 64, k)[:, : columns[1]].to(dtype))
