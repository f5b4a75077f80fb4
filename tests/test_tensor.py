"""`QuantizedTensor` of every registered format: copies, moves, slices, state dicts, gradients, modules."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import each_format, quantized, same_bits, sqnr_db, weights
from torch import nn

from lowbit import QuantizedTensor
from lowbit.formats import Format, parse_format
from lowbit.formats.activation import parse_activation

# A cut needs an inside: formats whose tile is one weight have none.
N, K = 136, 264


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert isinstance(a, QuantizedTensor)
    assert isinstance(b, QuantizedTensor)
    same = all(same_bits(t, b.planes[name]) for name, t in a.planes.items())
    return same and (a.format, a.shape, a.dtype, a.act) == (b.format, b.shape, b.dtype, b.act)


@each_format
def test_copies_are_equal_and_their_own(fmt: Format) -> None:
    w = quantized(fmt, N, K)
    for made in (
        w.clone(),
        copy.deepcopy(w),
        copy.deepcopy(nn.Parameter(w, requires_grad=False)),
        w.cpu().contiguous(),
    ):
        assert equal(made, w)
    made = w.clone()
    assert all(made.planes[name].data_ptr() != t.data_ptr() for name, t in w.planes.items())
    alias = w.detach()
    assert equal(alias, w)
    assert all(alias.planes[name].data_ptr() == t.data_ptr() for name, t in w.planes.items())
    assert torch.equal(made, w)
    other = quantized(fmt, N, K, seed=1)
    assert not torch.equal(made, other)
    made.copy_(other)
    assert equal(made, other)
    made.copy_(w.dequantize())
    assert sqnr_db(w.dequantize(), made.dequantize()) > 3


@each_format
def test_copy_of_another_format_or_shape_is_refused(fmt: Format) -> None:
    w = quantized(fmt, N, K)
    other = parse_format("int4:g32" if fmt.spec != "int4:g32" else "int8:row")
    with pytest.raises(ValueError, match="equal formats and shapes"):
        w.copy_(quantized(other, N, K))
    with pytest.raises(ValueError, match="equal formats and shapes"):
        w.copy_(quantized(fmt, N, K + 8))
    with pytest.raises(TypeError, match="dequantize"):
        torch.empty(N, K).copy_(w)


@each_format
def test_moves_keep_the_bits(fmt: Format) -> None:
    w = quantized(fmt, N, K)
    meta = w.to(device="meta")
    assert meta.device.type == "meta"
    assert all(t.device.type == "meta" and t.dtype == w.planes[name].dtype for name, t in meta.planes.items())
    half = w.to(torch.float16)
    assert half.dtype == torch.float16
    assert all(same_bits(half.planes[name], t) for name, t in w.planes.items())
    assert w.to(torch.float32) is w
    for bad in (torch.int8, torch.float64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="bf16, fp16 or fp32"):
            w.to(bad)


@each_format
def test_a_module_moves_and_converts(fmt: Format) -> None:
    layer = nn.Linear(K, N)
    layer.weight = nn.Parameter(quantized(fmt, N, K), requires_grad=False)
    before = layer.weight.clone()
    x = torch.randn(3, K)
    full = layer(x)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert all(same_bits(layer.weight.planes[name], t) for name, t in before.planes.items())
    assert sqnr_db(full, layer(x.bfloat16())) > 35
    assert layer.to("meta").weight.device.type == "meta"


@each_format
def test_state_dict_into_a_meta_model(fmt: Format) -> None:
    def model(device: str) -> nn.Sequential:
        return nn.Sequential(nn.Linear(K, N, device=device), nn.ReLU(), nn.Linear(N, 8, device=device))

    source = model("cpu")
    for layer in (source[0], source[2]):
        layer.weight = nn.Parameter(QuantizedTensor.from_float(layer.weight, fmt), requires_grad=False)
    target = model("meta")
    assert target.load_state_dict(source.state_dict(), assign=True).missing_keys == []
    assert equal(target[0].weight, source[0].weight)
    x = torch.randn(5, K)
    assert torch.equal(target(x), source(x))
    # Without assign, into a quantized model of the same kind: the planes are copied.
    again = copy.deepcopy(source)
    for p in again.parameters():
        p.data = p.data if isinstance(p, QuantizedTensor) else torch.zeros_like(p)
    again[0].weight.copy_(quantized(fmt, N, K, seed=3))
    again.load_state_dict(source.state_dict())
    assert torch.equal(again(x), source(x))


@each_format
def test_repr_never_dequantizes(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    w = quantized(fmt, N, K)
    layer = nn.Linear(K, N)
    layer.weight = nn.Parameter(w, requires_grad=False)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("dequantized")

    monkeypatch.setattr(type(fmt), "dequantize", refuse)
    for text in (repr(w), str(w), repr(w.t()), f"{layer.weight}", repr(dict(layer.named_parameters()))):
        assert fmt.spec in text
    assert f"{fmt.bits_per_weight:.4g} bits" in repr(w)
    with pytest.raises(AssertionError, match="dequantized"):
        w.dequantize()


@each_format
def test_slices_on_tile_boundaries(fmt: Format) -> None:
    tn, tk = fmt.tile
    n, k = 3 * tn + 5, min(2 * tk + 7, 40_000)
    w = quantized(fmt, n, k)
    full = w.dequantize()
    rows, columns = [(0, tn), (tn, 2 * tn), (tn, n), (0, n), (tn, tn)], [(0, tk), (tk, 2 * tk), (tk, k), (0, k)]
    for a, b in rows:
        part = w[a:b]
        assert isinstance(part, QuantizedTensor)
        assert part.shape == (b - a, k)
        assert same_bits(part.dequantize(), full[a:b])
        assert same_bits(w.narrow(0, a, b - a).dequantize(), full[a:b])
    for a, b in columns:
        assert same_bits(w[:, a:b].dequantize(), full[:, a:b])
        assert same_bits(w.t()[a:b].dequantize(), full.t()[a:b])
    for parts, expected in (
        (w.split(2 * tn), full.split(2 * tn)),
        (w.split([tn, n - tn]), full.split([tn, n - tn])),
        (w.split(tk, dim=1), full.split(tk, dim=1)),
        (w[: 2 * tn].chunk(2), full[: 2 * tn].chunk(2)),
    ):
        assert len(parts) == len(expected)
        assert all(same_bits(p.dequantize(), e) for p, e in zip(parts, expected, strict=True))
    # A slice is a view, and a layer like any other.
    part, x = w[:tn, :tk], torch.randn(2, tk)
    assert part.planes[fmt.plane_names[0]].data_ptr() == w.planes[fmt.plane_names[0]].data_ptr()
    assert sqnr_db(F.linear(x, full[:tn, :tk]), F.linear(x, part)) > 90


@each_format
def test_a_cut_inside_a_tile_is_named(fmt: Format) -> None:
    tn, tk = fmt.tile
    w = quantized(fmt, 2 * tn + 1, 2 * tk + 1)
    for dim, tile in ((0, tn), (1, tk)):
        if tile == 1:
            continue
        for cut in (lambda d=dim, t=tile: w.narrow(d, 0, t - 1), lambda d=dim, t=tile: w.split(t + 1, dim=d)):
            with pytest.raises(ValueError, match=rf"{fmt.spec} stores tiles of {tile}"):
                cut()
    with pytest.raises(ValueError, match="step 2"):
        w[::2]


@each_format
def test_unsupported_ops_say_what_to_do(fmt: Format) -> None:
    w = quantized(fmt, N, K)
    calls = (
        lambda: w + 1, lambda: w.sum(), lambda: w[0], lambda: torch.cat([w, w]), lambda: w.float() * 2,
        lambda: torch.conv1d(torch.ones(1, K, 1), w), lambda: w.exp_(), lambda: torch.stack([w]),
    )  # fmt: skip
    for call in calls:
        with pytest.raises((NotImplementedError, TypeError, ValueError), match="QuantizedTensor"):
            call()
    with pytest.raises(NotImplementedError, match=r"call \.dequantize\(\) first"):
        w.abs()
    with pytest.raises(ValueError, match="one shape"):
        w.view(K, N)
    with pytest.raises(TypeError, match="quantized"):
        F.linear(w, torch.ones(3, K))
    with pytest.raises(TypeError, match="second operand"):
        torch.mm(w, torch.ones(K, 2))


@each_format
def test_gradients_reach_the_activations(fmt: Format) -> None:
    """QLoRA: the base is quantized and frozen, A and B train, and the input's gradient passes the base."""
    w = quantized(fmt, N, K)
    x = torch.randn(2, 5, K, requires_grad=True)
    bias = torch.randn(N, requires_grad=True)
    a, b = (torch.randn(r, c, requires_grad=True) for r, c in ((4, K), (N, 4)))
    leaves = (x, bias, a, b)
    y = F.linear(x, w, bias) + F.linear(F.linear(x, a), b)
    got = torch.autograd.grad(y.square().sum(), leaves)
    y = F.linear(x, w.dequantize(), bias) + F.linear(F.linear(x, a), b)
    expected = torch.autograd.grad(y.square().sum(), leaves)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        assert sqnr_db(e, g) > 90


def test_lora_trains_on_a_frozen_quantized_base() -> None:
    torch.manual_seed(0)
    target, x = torch.randn(64, 128) * 0.1, torch.randn(256, 128)
    base = nn.Linear(128, 64)
    base.weight = nn.Parameter(QuantizedTensor.from_float(target, parse_format("nf4:g64")), requires_grad=False)
    before = base.weight.clone()
    a, b = nn.Parameter(torch.randn(8, 128) * 0.05), nn.Parameter(torch.zeros(64, 8))
    optimizer = torch.optim.Adam([a, b, base.bias], 1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(base(x) + x @ a.T @ b.T, x @ (target + 0.05).T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    assert equal(base.weight.data, before)


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embedding(fmt: Format, dtype: torch.dtype) -> None:
    table = quantized(fmt, 259, 72, dtype)
    ids = torch.tensor([[0, 258, 128, 127], [1, 1, 0, 200]])
    layer = nn.Embedding(259, 72, padding_idx=0)
    layer.weight = nn.Parameter(table, requires_grad=False)
    assert same_bits(layer(ids), F.embedding(ids, table.dequantize()))
    assert layer(ids[:0]).shape == (0, 4, 72)
    assert layer(ids[0, 0]).shape == (72,)
    with pytest.raises(NotImplementedError, match="max_norm"):
        F.embedding(ids, table, max_norm=1.0)
    with pytest.raises(IndexError, match="259"):
        layer(torch.tensor([259]))
    with pytest.raises(IndexError, match="259"):
        layer(torch.tensor([-1]))
    with pytest.raises(TypeError, match="int32 or int64"):
        layer(torch.tensor([1.0]))


CONVOLUTIONS = (
    {}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"groups": 4}, {"groups": 2, "stride": (2, 1)},
    {"kernel_size": (3, 1), "padding": (1, 0)}, {"kernel_size": 1}, {"padding": "same", "kernel_size": (2, 4)},
)  # fmt: skip


@each_format
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_conv2d(fmt: Format) -> None:
    for options in CONVOLUTIONS:
        layer = nn.Conv2d(8, 12, **({"kernel_size": 3} | options))
        w = QuantizedTensor.from_float(layer.weight, fmt)
        full = copy.deepcopy(layer)
        full.weight = nn.Parameter(w.dequantize())
        layer.weight = nn.Parameter(w, requires_grad=False)
        assert layer.weight.shape == full.weight.shape
        for shape in ((2, 8, 9, 10), (8, 9, 10), (0, 8, 9, 10)):
            x = torch.randn(shape, requires_grad=True)
            y, expected = layer(x), full(x)
            assert y.shape == expected.shape
            if y.numel() == 0:
                continue
            assert sqnr_db(expected, y) > 90
            probe = torch.randn_like(y)
            got, want = (torch.autograd.grad((o * probe).sum(), x)[0] for o in (y, expected))
            assert sqnr_db(want, got) > 90


def test_conv2d_errors_are_named() -> None:
    layer = nn.Conv2d(8, 12, 3)
    weight = QuantizedTensor.from_float(layer.weight, parse_format("int8:row"))
    x = torch.randn(1, 8, 9, 9)
    with pytest.raises(ValueError, match="padding"):
        F.conv2d(x, weight, padding="full")
    with pytest.raises(ValueError, match=r"8 input channels.*got 7"):
        F.conv2d(x[:, :7], weight)
    with pytest.raises(ValueError, match="3-D or 4-D"):
        F.conv2d(x[0, 0], weight)
    with pytest.raises(TypeError, match="bf16, fp16 or fp32"):
        F.conv2d(x.double(), weight)
    with pytest.raises(ValueError, match="groups"):
        F.conv2d(x, weight, groups=5)
    with pytest.raises(NotImplementedError, match="activation"):
        F.conv2d(x, weight.with_planes(weight.planes, act=parse_activation("int8:row")))
    with pytest.raises(ValueError, match="dim 0"):
        weight.narrow(1, 0, 4)
    with pytest.raises(NotImplementedError, match="2-D"):
        weight.transpose(0, 1)


@each_format
def test_transposed_products(fmt: Format) -> None:
    w = quantized(fmt, N, K)
    x, g, bias = torch.randn(4, K), torch.randn(4, N), torch.randn(N)
    full = w.dequantize()
    assert w.t().shape == (K, N)
    assert equal(w.t().t(), w)
    assert same_bits(w.T.dequantize(), full.t())
    for got, expected in (
        (x @ w.t(), x @ full.t()), (torch.mm(x, w.T), x @ full.t()), (g @ w, g @ full),
        (torch.addmm(bias, x, w.t()), torch.addmm(bias, x, full.t())),
        (x.view(2, 2, K) @ w.t(), x.view(2, 2, K) @ full.t()),
        (torch.addmm(bias, x, w.t(), beta=2, alpha=3), torch.addmm(bias, x, full.t(), beta=2, alpha=3)),
    ):  # fmt: skip
        assert sqnr_db(expected, got) > 90


@each_format
def test_new_tensors_of_the_same_kind(fmt: Format) -> None:
    w = quantized(fmt, N, K)
    before, other = w.clone(), QuantizedTensor.from_float(weights("normal", N, K, seed=5) * 7, fmt)
    for made in (torch.empty_like(w), w.new_zeros(N, K), torch.zeros_like(w)):
        assert isinstance(made, QuantizedTensor)
        assert (made.format, made.shape) == (fmt, w.shape)
        assert made.dequantize().count_nonzero() == 0
        made.copy_(other)
        assert equal(made, other)
    assert equal(w, before)  # no plane was shared
    assert w.nbytes_packed == fmt.nbytes(N, K)


@each_format
def test_a_meta_module_is_made_empty_and_filled(fmt: Format) -> None:
    source, target = nn.Linear(K, N), nn.Linear(K, N, device="meta")
    source.weight = nn.Parameter(quantized(fmt, N, K), requires_grad=False)
    target.weight = nn.Parameter(source.weight.to("meta"), requires_grad=False)
    target.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert equal(target.weight.data, source.weight.data)


@each_format
def test_memory_is_shared_between_processes(fmt: Format) -> None:
    layer = nn.Linear(K, 8)
    layer.weight = nn.Parameter(quantized(fmt, 8, K), requires_grad=False)
    x = torch.randn(2, K)
    before = layer(x)
    assert not layer.weight.is_shared()
    layer.share_memory()
    assert layer.weight.is_shared()
    assert torch.equal(layer(x), before)


@each_format
def test_empty_weights(fmt: Format) -> None:
    for n, k in ((0, 64), (4, 0), (0, 0)):
        w = QuantizedTensor.from_float(torch.zeros(n, k), fmt)
        assert w.dequantize().shape == (n, k)
        y = F.linear(torch.ones(3, k), w, torch.arange(float(n)))
        assert torch.equal(y, torch.arange(float(n)).expand(3, n))


def test_a_transposed_view_is_no_layer() -> None:
    """Of a square weight the other product would have the right shape and wrong numbers."""
    w = quantized(parse_format("int4:g32"), 64, 64)
    with pytest.raises(ValueError, match="transposed view"):
        F.linear(torch.ones(2, 64), w.t())
    with pytest.raises(ValueError, match="transposed view"):
        F.embedding(torch.tensor([1]), w.t())
    x = torch.randn(2, 64)
    assert sqnr_db(x @ w.dequantize(), x @ w) > 90


@each_format
def test_inference_mode(fmt: Format) -> None:
    """Weights made outside inference mode work inside it, weights made inside work outside, views and moves too."""
    outside = quantized(fmt, 2 * fmt.tile[0], 64)
    with torch.inference_mode():
        inside = quantized(fmt, 2 * fmt.tile[0], 64)
    x, full = torch.randn(3, 64), outside.dequantize()

    def use(w: QuantizedTensor) -> None:
        made = (w.clone(), w.detach(), copy.deepcopy(w), w.t().t(), w.T.T, w[:], w.view(w.shape), w.to(w.dtype))
        assert all(equal(m, w) for m in made)
        assert w.to(torch.float16).dtype == torch.float16
        assert w.to("meta").device.type == "meta"
        assert same_bits(w[fmt.tile[0] :].dequantize(), full[fmt.tile[0] :])
        assert same_bits(w.split(fmt.tile[0])[0].dequantize(), full[: fmt.tile[0]])
        for product in (x @ w.t(), F.linear(x, w), torch.matmul(x, w.T)):
            assert sqnr_db(x @ full.t(), product) > 90
        layer = nn.Linear(64, 8)
        layer.weight = nn.Parameter(w, requires_grad=False)
        assert equal(layer.state_dict()["weight"], w)
        assert layer.bfloat16().weight.dtype == torch.bfloat16
        with pytest.raises(NotImplementedError, match="QuantizedTensor"):
            w.abs()

    use(inside)
    use(outside)
    with torch.inference_mode():
        use(inside)
        use(outside)


def test_construction_errors_are_named() -> None:
    fmt = parse_format("int4:g32")
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        QuantizedTensor.from_float(torch.ones(8), fmt)
    with pytest.raises(ValueError, match="NaN or Inf"):
        QuantizedTensor.from_float(torch.full((2, 8), math.nan), fmt)


def test_static_scale_travels_with_the_weight() -> None:
    act = parse_activation("float8_e4m3:tensor@static")
    w = QuantizedTensor.from_float(
        weights("normal", 64, 64), parse_format("float8_e4m3:row"), act, torch.full((1, 1), 0.25)
    )
    for made in (w.clone(), copy.deepcopy(w), w.to(torch.bfloat16), w[:32], w.t().t()):
        assert made.act == act
        assert torch.equal(made.act_scale, w.act_scale)
    assert w.to("meta").act_scale.device.type == "meta"
    assert "float8_e4m3:tensor@static" in repr(w)
