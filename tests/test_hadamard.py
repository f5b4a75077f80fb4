"""`lowbit.hadamard`: an orthogonal transform of every size, its kernels, its gradient, its errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.algorithms.rotation import hadamard as sylvester
from lowbit.decoder_ops import hadamard
from lowbit.kernels.cpu import native
from lowbit.kernels.hadamard import factors, hartley, transformed

SIZES = (1, 2, 3, 8, 32, 80, 96, 576, 1024, 1536)


def signs_of(k: int) -> Tensor:
    return torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(k), dtype=torch.int8) * 2 - 1


@pytest.mark.parametrize("k", SIZES)
def test_it_is_orthogonal_and_even(k: int) -> None:
    """No entry is far larger than others, whatever the odd factor: a single outlier is spread over all channels."""
    t = hadamard(torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(t @ t.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(t, t.T)
    assert float(t.abs().max()) <= (2 / k) ** 0.5 + 1e-15
    odd, two = factors(k)
    assert odd * two == k
    torch.testing.assert_close(t, torch.kron(hartley(odd, t.device, t.dtype), sylvester(two)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", SIZES)
def test_there_and_back(k: int) -> None:
    x, signs = torch.randn(3, 2, k), signs_of(k)
    y = hadamard(x, signs)
    torch.testing.assert_close(hadamard(y, signs, True), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(y, hadamard(x * signs), rtol=0, atol=0)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    # x R W' = x W^T for W' = (W R)^T: what is folded into a weight.
    w = torch.randn(5, k)
    torch.testing.assert_close(y @ hadamard(w, signs).T, x @ w.T, rtol=0, atol=1e-5 * k**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", SIZES)
def test_the_native_kernel_has_the_bits_of_the_definition(k: int, dtype: torch.dtype) -> None:
    assert native.missing() is None
    x, signs = torch.randn(7, k).to(dtype), signs_of(k)
    for s in (None, signs):
        for inverse in (False, True):
            got, wanted = native.hadamard(x, s, inverse), transformed(x, s, inverse)
            assert got.dtype == dtype
            if factors(k)[0] == 1:
                assert torch.equal(got, wanted)
            else:
                torch.testing.assert_close(got, wanted)


def test_whole_numbers_are_exact() -> None:
    """Sums of whole numbers and a power of two: nothing is rounded."""
    x = torch.randint(-100, 100, (4, 1024)).float()
    assert torch.equal(hadamard(x), hadamard(x.double()).float())
    assert torch.equal(hadamard(hadamard(x)), x)


def test_layouts_threads_and_nothing() -> None:
    x = torch.randn(96, 300).T
    assert not x.is_contiguous()
    one = hadamard(x)
    assert torch.equal(one, hadamard(x.contiguous()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(hadamard(x), one)
    finally:
        torch.set_num_threads(before)
    assert hadamard(torch.empty(0, 8)).shape == (0, 8)
    nan = torch.tensor([torch.nan, 1, 2, 3])
    assert bool(hadamard(nan).isnan().all())


def test_gradient_schema_and_compilation() -> None:
    x, signs = torch.randn(2, 12, dtype=torch.float64, requires_grad=True), signs_of(12)
    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda x, inverse=inverse: hadamard(x, signs, inverse), (x,))
        torch.library.opcheck(hadamard, (x.detach().float(), signs, inverse))
    torch.library.opcheck(hadamard, (torch.randn(2, 12, requires_grad=True), None, False))

    def f(x: Tensor) -> Tensor:
        return hadamard(x, signs) * 2

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_bad_arguments() -> None:
    for x, signs, error, match in (
        (torch.ones(2, 4, dtype=torch.int32), None, TypeError, "got torch.int32"),
        (torch.ones(2, 4), torch.ones(4), TypeError, "signs int8"),
        (torch.ones(2, 4), signs_of(3), ValueError, r"rows of 4 on cpu take as many signs, got \(3,\)"),
        (torch.tensor(1.0), None, ValueError, "numbers in a row"),
    ):
        with pytest.raises(error, match=rf"lowbit\.hadamard.*{match}.*\[lowbit: input-mismatch\]"):
            hadamard(x, signs)
