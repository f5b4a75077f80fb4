"""`lowbit roofline` on the GPU: ceilings that make sense, and rows below them."""

from __future__ import annotations

import pytest
import torch

from lowbit.tools.bench_linear import parse_scheme
from lowbit.tools.bench_roofline import Plan, bench_roofline, measure_ceilings
from lowbit.tools.roofline import Ceilings, Shape

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    return measure_ceilings(CUDA)


def test_ceilings_make_sense(ceilings: Ceilings) -> None:
    seconds = [s for _, s in ceilings.reads]
    assert seconds == sorted(seconds), "a larger read takes longer"
    assert 0.2e-6 < ceilings.launch_s < seconds[0]
    assert 1e11 < ceilings.bandwidth < 2e13
    if torch.cuda.get_device_capability() >= (8, 9):
        assert ceilings.peaks["float8"] > 1.3 * ceilings.peaks["bf16"], ceilings.missing
    assert ceilings.peaks["int8"] > ceilings.peaks["bf16"], ceilings.missing


def test_no_layer_is_much_faster_than_its_roofline(ceilings: Ceilings) -> None:
    recipes = (
        "float8dq-row",
        "int8dq",
        "int8dq-asym",
        "int4wo-128",
        "mxfp8dq",
        "nvfp4dq",
        "float8dq",
        "float8dq-block",
    )
    shapes = [Shape(1, 4096, 4096), Shape(16, 4096, 14336), Shape(2048, 2048, 2048)]
    rows, left = bench_roofline(Plan(shapes, {r: parse_scheme(r) for r in recipes}, CUDA, rounds=5), ceilings)
    assert left == []
    for row in rows:
        where = f"{row.recipe} M = {row.fwd_M}"
        assert row.error == "", f"{where}: {row.error}"
        assert row.b_q_gemm_s > 0.6 * row.r_q_gemm_s, where
        assert row.b_bf16_gemm_s > 0.6 * row.r_bf16_gemm_s, where
        assert row.b_q_e2e_s < 1.3 * (row.b_q_gemm_s + row.b_q_ovhd_s), where
