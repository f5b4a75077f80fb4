"""`lowbit::hadamard` on a GPU: its definition in fp64, back again, and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import sqnr_db, weights
from torch import Tensor

from lowbit.decoder_ops import hadamard
from lowbit.kernels.hadamard import transformed
from lowbit.kernels.triton.hadamard import hadamard as triton_hadamard
from lowbit.linear import random_signs

pytestmark = pytest.mark.gpu

# bf16 and fp16 are rounded once, fp32 in every one of its sums.
LEAST_DB = {torch.bfloat16: 50.0, torch.float16: 68.0, torch.float32: 120.0}


@pytest.mark.parametrize("k", [1, 2, 64, 576, 1536, 4096, 11008, 14336, 16384, 49152, 99])
@pytest.mark.parametrize("dtype", LEAST_DB, ids=str)
@pytest.mark.parametrize("m", [1, 130])
@pytest.mark.parametrize("hadamard", [hadamard, triton_hadamard], ids=["op", "triton"])
def test_is_its_definition(
    hadamard: Callable[[Tensor, Tensor | None, bool], Tensor], m: int, k: int, dtype: torch.dtype
) -> None:
    x = weights("student_t", m, k).to(dtype)
    for signs in (None, random_signs(k)):
        on_gpu = None if signs is None else signs.cuda()
        for inverse in (False, True):
            wanted = transformed(x.double(), signs, inverse)
            got = hadamard(x.cuda(), on_gpu, inverse)
            assert got.dtype == dtype
            assert sqnr_db(wanted, got.cpu()) > LEAST_DB[dtype]
            if k & k - 1 == 0:  # the same pairs are added in the same order
                assert torch.equal(got, transformed(x.cuda(), on_gpu, inverse))
        there_and_back = hadamard(hadamard(x.cuda(), on_gpu, False), on_gpu, True).cpu()
        assert sqnr_db(x.double(), there_and_back) > LEAST_DB[dtype] - 4  # rounded twice


def test_the_same_in_a_graph() -> None:
    x, signs = weights("normal", 16, 14336).to(torch.bfloat16).cuda(), random_signs(14336).cuda()
    eager, graph = hadamard(x, signs), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = hadamard(x, signs)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, eager)


def test_nothing_comes_of_no_tokens() -> None:
    assert hadamard(torch.empty(0, 64, device="cuda")).shape == (0, 64)
