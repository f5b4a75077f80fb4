"""The kernels between linear layers against their definitions in fp64, and against themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit import decoder_ops as ops
from lowbit.kernels.cuda import decode_attention as clustered
from lowbit.kernels.problem import early_launches
from lowbit.kernels.triton import decode_attention as kernel
from lowbit.kernels.triton.gemv import gemv

# Units in the last place of the largest result: bf16, fp16 and fp32 with sums of thousands of terms.
LIMITS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
each_dtype = pytest.mark.parametrize("dtype", LIMITS, ids=str)


def assert_close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    error = float((got.double() - exact).abs().max() / exact.abs().max())
    assert error < LIMITS[dtype], f"{error:.2e}"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype).cuda()


@each_dtype
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (7, 576), (130, 2048), (3, 8192), (2, 1001)])
def test_norms_and_products(rows: int, width: int, dtype: torch.dtype) -> None:
    x, y, w = (normal(rows, width, dtype=dtype, seed=i) for i in range(3))
    total, normed = ops.add_rms_norm(x, y, w[0], 1e-5)
    assert torch.equal(total, x + y)
    assert_close(normed, ops.rms_norm((x + y).double().cpu(), w[0].double().cpu(), 1e-5).cuda(), dtype)
    assert_close(ops.rms_norm(x, w[0], 1e-5), ops.rms_norm(x.double().cpu(), w[0].double().cpu(), 1e-5).cuda(), dtype)
    even = x[:, : width // 2 * 2]
    assert_close(ops.silu_mul(even), ops.silu_mul(even.double().cpu()).cuda(), dtype)
    assert torch.equal(ops.silu_mul(even), ops.silu_mul(even.contiguous()))


@each_dtype
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (6144, 4096), (513, 1000), (3, 576), (1, 14336)])
def test_gemv(n: int, k: int, dtype: torch.dtype) -> None:
    x, w, bias = normal(1, k, dtype=dtype), normal(n, k, dtype=dtype, seed=1), normal(n, dtype=dtype, seed=2)
    exact = x.double() @ w.double().T
    assert_close(gemv(x, w, None), exact, dtype)
    assert_close(gemv(x, w, bias), exact + bias.double(), dtype)
    assert torch.equal(gemv(x, w, bias), gemv(x, w, bias))


def given(batch: int, heads: int, groups: int, d: int, capacity: int, dtype: torch.dtype, normed: bool, tokens: int):
    angles = torch.rand(capacity, d // 2, generator=torch.Generator().manual_seed(9)).cuda() * 6
    norms = [normal(d, dtype=dtype, seed=7 + i) if normed else None for i in range(2)]
    cache = [normal(batch, groups, capacity, d, dtype=dtype, seed=i) for i in (1, 2)]
    return normal(batch, tokens, (heads + 2 * groups) * d, dtype=dtype), cache, angles.cos(), angles.sin(), norms


def exactly(op, qkv, cache, positions, cos, sin, norms, heads, *more):
    """The definition, in fp64 on the CPU."""
    wide = [t.double().cpu() for t in cache]
    own = [None if n is None else n.double().cpu() for n in norms]
    out = op(qkv.double().cpu(), *wide, positions.cpu(), cos.cpu(), sin.cpu(), *own, 1e-5, heads, *more)
    return out.cuda(), *(t.cuda() for t in wide)


SHAPES = [(32, 8, 128, False), (32, 8, 64, False), (16, 8, 128, True), (12, 2, 96, True), (8, 1, 64, False),
          (4, 4, 128, False)]  # fmt: skip


@each_dtype
@pytest.mark.parametrize(("heads", "groups", "d", "normed"), SHAPES)
def test_rope_write(heads: int, groups: int, d: int, normed: bool, dtype: torch.dtype) -> None:
    qkv, cache, cos, sin, norms = given(2, heads, groups, d, 80, dtype, normed, tokens=37)
    positions = torch.tensor([0, 43], dtype=torch.int32, device="cuda")
    exact = exactly(ops.rope_write, qkv, cache, positions, cos, sin, norms, heads)
    q = ops.rope_write(qkv, *cache, positions, cos, sin, *norms, 1e-5, heads)
    for got, expected in zip((q, *cache), exact, strict=True):
        assert_close(got, expected, dtype)


@each_dtype
@pytest.mark.parametrize(("heads", "groups", "d", "normed"), SHAPES)
@pytest.mark.parametrize(("capacity", "tokens"), [(300, 1), (5000, 1), (300, 5), (5000, 2), (5000, 16)])
def test_decode_attention(
    heads: int, groups: int, d: int, normed: bool, capacity: int, tokens: int, dtype: torch.dtype
) -> None:
    """Every number of parts, lengths from the first token to the last place; again with the same bits."""
    positions = torch.tensor([0, 1, 63, 64, 65, 200, capacity - tokens], dtype=torch.int32, device="cuda")
    batch = len(positions)
    qkv, start, cos, sin, norms = given(batch, heads, groups, d, capacity, dtype, normed, tokens=tokens)
    arrived = torch.zeros(batch * groups, dtype=torch.int32, device="cuda")
    exact = exactly(ops.decode_attention, qkv, start, positions, cos, sin, norms, heads, arrived.cpu())
    for splits in (1, 2, 4, 8, 16):
        cache = [t.clone() for t in start]
        where = (*cache, positions, cos, sin, *norms, 1e-5, heads, arrived)
        y = kernel.decode_attention(qkv, *where, splits=splits)
        for got, expected in zip((y, *cache), exact, strict=True):
            assert_close(got, expected, dtype)
        for _ in range(10):
            assert torch.equal(kernel.decode_attention(qkv, *where, splits=splits), y)
        assert not arrived.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "groups", "d", "normed"), SHAPES)
@pytest.mark.parametrize(("capacity", "tokens"), [(300, 1), (5000, 1), (5000, 2), (300, 4), (300, 8)])
def test_decode_attention_in_clusters(
    heads: int, groups: int, d: int, normed: bool, capacity: int, tokens: int, dtype: torch.dtype
) -> None:
    """Every kind of cluster, lengths from the first token to the last place; again with the same bits."""
    positions = torch.tensor([0, 1, 15, 16, 63, 64, 65, 200, capacity - tokens], dtype=torch.int32, device="cuda")
    batch = len(positions)
    qkv, start, cos, sin, norms = given(batch, heads, groups, d, capacity, dtype, normed, tokens=tokens)
    if (reason := clustered.why_not(qkv, *start, *norms, heads)) is not None:
        assert tokens * heads // groups > 32, reason
        return
    arrived = torch.zeros(batch * groups, dtype=torch.int32)
    exact = exactly(ops.decode_attention, qkv, start, positions, cos, sin, norms, heads, arrived)
    for shape in (None, *(clustered.Shape(*numbers) for numbers in ((1, 4, 2), (2, 4, 5), (4, 8, 2), (8, 4, 3)))):
        cache = [t.clone() for t in start]
        where = (*cache, positions, cos, sin, *norms, 1e-5, heads)
        y = clustered.decode_attention(qkv, *where, shape=shape)
        for got, expected in zip((y, *cache), exact, strict=True):
            assert_close(got, expected, dtype)
        for _ in range(10):
            assert torch.equal(clustered.decode_attention(qkv, *where, shape=shape), y)


def test_other_places_of_the_cache_stay() -> None:
    qkv, cache, cos, sin, norms = given(3, 32, 8, 128, 300, torch.bfloat16, False, tokens=1)
    before = [t.clone() for t in cache]
    positions = torch.tensor([5, 299, 128], dtype=torch.int32, device="cuda")
    arrived = torch.zeros(24, dtype=torch.int32, device="cuda")
    ops.decode_attention(qkv, *cache, positions, cos, sin, *norms, 1e-5, 32, arrived)
    for new, old in zip(cache, before, strict=True):
        for b, at in enumerate(positions.tolist()):
            changed = (new[b] != old[b]).any(-1).any(0).nonzero().flatten().tolist()
            assert changed == [at]


def test_a_position_beyond_the_cache_writes_nothing() -> None:
    qkv, cache, cos, sin, norms = given(1, 32, 8, 128, 64, torch.bfloat16, False, tokens=1)
    whole = torch.zeros(2, 8, 64, 128, dtype=torch.bfloat16, device="cuda")  # what lies behind would show a write
    positions = torch.tensor([64], dtype=torch.int32, device="cuda")
    arrived = torch.zeros(8, dtype=torch.int32, device="cuda")
    ops.decode_attention(qkv, whole[:1], cache[1], positions, cos, sin, *norms, 1e-5, 32, arrived)
    assert not whole.any()


def test_started_early_they_give_the_same_bits() -> None:
    """A chain of kernels inside a graph, each started before the one ahead has ended, a hundred times."""
    hidden, heads, groups, d = 4096, 32, 8, 128
    _, cache, cos, sin, norms = given(1, heads, groups, d, 512, torch.bfloat16, False, tokens=1)
    x, w = normal(1, hidden, dtype=torch.bfloat16), normal(6144, hidden, dtype=torch.bfloat16, seed=3) / 64
    o, weight = normal(hidden, hidden, dtype=torch.bfloat16, seed=4) / 64, normal(hidden, dtype=torch.bfloat16, seed=5)
    positions = torch.tensor([200], dtype=torch.int32, device="cuda")
    arrived = torch.zeros(groups, dtype=torch.int32, device="cuda")

    def chain() -> Tensor:
        h, total = ops.rms_norm(x, weight, 1e-5), x
        for _ in range(8):
            y = ops.gemv(h, w, None)
            y = ops.decode_attention(y[:, None], *cache, positions, cos, sin, *norms, 1e-5, heads, arrived)[:, 0]
            total, h = ops.add_rms_norm(total, ops.gemv(y, o, None), weight, 1e-5)
            h = ops.silu_mul(torch.cat((h, total), dim=-1))
        return h

    expected = chain()
    assert expected.isfinite().all()
    with early_launches():
        assert torch.equal(chain(), expected)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain()
    for _ in range(100):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
