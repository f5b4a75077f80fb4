"""Low-rank error correction: the theorem of Eckart and Young, with and without inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.lowrank import low_rank
from lowbit.formats import parse_format

SHAPES = [(24, 40), (40, 24), (32, 32)]


def error_and_inputs(n: int, k: int) -> tuple[Tensor, Tensor]:
    """A rounding error, and inputs whose channels differ and depend on each other."""
    g = torch.Generator().manual_seed(n)
    w = torch.randn(n, k, generator=g)
    fmt = parse_format("int3:g8")
    mixed = torch.randn(200, k, generator=g) @ torch.randn(k, k, generator=g)
    return w - fmt.dequantize(fmt.quantize(w), n, k), mixed * torch.linspace(0.1, 3, k)


def left(e: Tensor, a: Tensor, b: Tensor, x: Tensor | None) -> Tensor:
    rest = e.double() - b.double() @ a.double()
    return (rest if x is None else x.double() @ rest.T).norm()


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_what_is_left_are_the_other_singular_values(n: int, k: int, seen: bool) -> None:
    e, x = error_and_inputs(n, k)
    inputs = x if seen else None
    values = torch.linalg.svdvals(e.double() if inputs is None else x.double() @ e.double().T)
    for rank in (1, 5, min(n, k)):
        a, b = low_rank(e, rank, None if inputs is None else x.T @ x)
        assert (a.shape, b.shape, a.dtype, b.dtype) == ((rank, k), (n, rank), torch.float32, torch.float32)
        wanted = values[rank:].square().sum().sqrt()
        torch.testing.assert_close(left(e, a, b, inputs), wanted, rtol=1e-4, atol=1e-5 * float(values[0]))
        torch.testing.assert_close(b.T @ b, torch.eye(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_inputs_decide_what_is_mended(n: int, k: int) -> None:
    """The weighted solution has less output error, the plain one less error of the weight, and both less than none."""
    e, x = error_and_inputs(n, k)
    plain, weighted = low_rank(e, 4), low_rank(e, 4, x.T @ x)
    assert left(e, *weighted, x) < left(e, *plain, x) < (x @ e.T).norm()
    assert left(e, *plain, None) < left(e, *weighted, None)
    more = low_rank(e, 4, 7 * x.T @ x)
    torch.testing.assert_close(more[1] @ more[0], weighted[1] @ weighted[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_channels_without_input_and_no_error(n: int, k: int) -> None:
    e, x = error_and_inputs(n, k)
    x[:, k // 2 :] = 0
    a, b = low_rank(e, min(n, k) // 2, x.T @ x)
    assert bool(a.isfinite().all() & b.isfinite().all())
    assert left(e, a, b, x) < (x @ e.T).norm()
    a, b = low_rank(torch.zeros(n, k), 2, x.T @ x)
    assert not bool((b @ a).any())


def test_bad_arguments() -> None:
    e = torch.randn(6, 8)
    for rank in (0, 7):
        with pytest.raises(ValueError, match=r"ranks 1 to 6, got .*\[lowbit: bad-option\]"):
            low_rank(e, rank)
    with pytest.raises(ValueError, match=r"needs a Hessian \(8, 8\).*\[lowbit: input-mismatch\]"):
        low_rank(e, 2, torch.eye(6))
