"""Calibration: what it sees, what it refuses, and scales that just hold it."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import tiny_ids, tiny_llama
from torch import nn

import lowbit
from lowbit.calibrate import ROWS, Moments, Statistics, added, run_blocks, static_scale
from lowbit.formats.activation import parse_activation


def test_amax_and_tokens_over_batches() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    seen = lowbit.calibrate(model, [torch.full((2, 3, 4), 0.5), torch.tensor([[-7.0, 1, 0, 2]])])
    assert seen["0"] == Statistics(7.0, 7)
    assert seen["2"].tokens == 7
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_dict_batches_and_own_forward() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 2)

        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.lin(x)
            return out

    x = torch.tensor([[3.0, -4.0]])
    assert lowbit.calibrate(Model(), [{"x": x}])["lin"].amax == 4
    assert lowbit.calibrate(Model(), [x], lambda m, b: m(x=b * 2))["lin"].amax == 8


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        lowbit.calibrate(model, [torch.zeros(1, 5)])
    assert not model[0]._forward_pre_hooks


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batch"):
        lowbit.calibrate(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match=r"no nn\.Linear ran"):
        lowbit.calibrate(nn.ReLU(), [torch.zeros(1)])


@pytest.mark.parametrize(
    ("spec", "top"), [("int8:tensor@static", 127.5), ("float8_e4m3:tensor@static", 448), ("nvfp4@static", 6 * 448)]
)
def test_scale_holds_the_largest_value(spec: str, top: float) -> None:
    act = parse_activation(spec)
    assert act is not None
    assert static_scale(act, Statistics(3.0, 1)) == pytest.approx(3 / top)
    assert static_scale(act, Statistics(0.0, 1)) == 1.0
    with pytest.raises(ValueError, match="0 tokens"):
        static_scale(act, Statistics())
    with pytest.raises(ValueError, match="inf"):
        static_scale(act, Statistics(float("inf"), 1))


# Block by block ----------------------------------------------------------------------------------


def bounded(x: torch.Tensor) -> torch.Tensor:
    """Rows no longer than twice their median length."""
    length = x.norm(dim=1, keepdim=True)
    return torch.where(length > 2 * length.median(), x * (2 * length.median() / length), x)


def test_some_inputs_are_kept_as_they_came() -> None:
    moments = None
    for seed in range(10):
        x = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(seed))
        moments = added(moments, x)
        assert moments.rows is not None
        if seed == 0:
            assert torch.equal(moments.rows, x.flatten(0, 1)[::4])
    assert moments is not None
    assert moments.rows is not None
    assert len(moments.rows) == 500
    assert len(added(moments, torch.randn(1000, 3)).rows) == ROWS  # type: ignore[arg-type]
    assert torch.equal(moments.divided(torch.tensor([1.0, 2, 4])).rows, moments.rows / torch.tensor([1.0, 2, 4]))


def test_moments_are_those_of_each_layers_input() -> None:
    model, batches = tiny_llama(), [tiny_ids(seed=s) for s in (1, 2)]
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].clone()))
        for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)
    ]  # fmt: skip
    for ids in batches:
        model(ids)
    for h in hooks:
        h.remove()
    found: dict[str, Moments] = {}
    run_blocks(model, batches, found.update)
    assert set(found) == {f"model.layers.{name}" for name in seen}
    for name, inputs in seen.items():
        x = torch.cat([bounded(t.flatten(0, 1)) for t in inputs]).double()
        square, amax, _, rows = found[f"model.layers.{name}"]
        assert torch.equal(rows, torch.cat([t.flatten(0, 1) for t in inputs]))  # these are few enough to keep all
        torch.testing.assert_close(square.double(), x.T @ x, rtol=1e-4, atol=1e-3)
        assert torch.equal(amax, torch.cat([t.flatten(0, 1) for t in inputs]).abs().amax(0))
    # What is fed by one tensor is summed up once.
    assert found["model.layers.0.self_attn.q_proj"] is found["model.layers.0.self_attn.v_proj"]
    assert found["model.layers.0.mlp.gate_proj"] is not found["model.layers.0.mlp.down_proj"]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_block_sees_what_the_changed_blocks_before_it_make() -> None:
    model, ids = tiny_llama(), tiny_ids()
    plain: dict[str, Moments] = {}
    run_blocks(model, [ids], plain.update)
    after: dict[str, Moments] = {}

    def visit(moments: dict[str, Moments]) -> None:
        after.update(moments)
        if "model.layers.0.mlp.down_proj" in moments:
            model.model.layers[0].mlp.down_proj.weight.zero_()

    run_blocks(model, [ids], visit)
    assert torch.equal(after["model.layers.0.self_attn.q_proj"].square, plain["model.layers.0.self_attn.q_proj"].square)
    changed: dict[str, Moments] = {}
    run_blocks(model, [ids], changed.update)
    assert torch.equal(
        after["model.layers.1.self_attn.q_proj"].square, changed["model.layers.1.self_attn.q_proj"].square
    )
    assert not torch.equal(
        after["model.layers.1.self_attn.q_proj"].square, plain["model.layers.1.self_attn.q_proj"].square
    )


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="none"):
        run_blocks(nn.Sequential(nn.Linear(4, 4)), [torch.zeros(1, 4)], lambda _: None)
    with pytest.raises(ValueError, match="no batch"):
        run_blocks(tiny_llama(), [], lambda _: None)

    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 2), nn.Linear(2, 2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    with pytest.raises(ValueError, match=r"layers\.0: the output of a block"):
        run_blocks(Pool(), [torch.zeros(1, 4)], lambda _: None)
    # Also where it is the last one: before anything has been changed.
    model, visited = Pool(), list[dict[str, Moments]]()
    model.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])
    with pytest.raises(ValueError, match=r"layers\.1: the output of a block"):
        run_blocks(model, [torch.zeros(1, 4)], visited.append)
    assert not visited


class Residual(nn.Module):
    """Adds what a block finds to its input, within the blocks or between them."""

    def __init__(self, *, between: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.between, self.dropout = between, nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x) if self.between else self.dropout(layer(x))
        return x


def test_models_that_do_more_than_run_their_blocks_are_refused() -> None:
    torch.manual_seed(0)
    visited: list[dict[str, Moments]] = []
    with pytest.raises(ValueError, match="do not give what the model gives"):
        run_blocks(Residual(between=True), [torch.randn(8, 4)], visited.append)
    with pytest.raises(ValueError, match="training mode"):
        run_blocks(Residual(dropout=0.5), [torch.randn(8, 4)], visited.append)
    assert not visited
    model = Residual(dropout=0.5).eval()
    run_blocks(model, [torch.randn(8, 4)], visited.append)
    assert [list(v) for v in visited] == [["layers.0"], ["layers.1"], ["layers.2"]]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_cache_that_fills_is_refused() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
            cache.append(x)
            return self.linear(x + sum(cache))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Cached() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cache: list[torch.Tensor] = []
            for layer in self.layers:
                x = layer(x, cache=cache)
            return x

    with pytest.raises(ValueError, match="use_cache=False"):
        run_blocks(Model(), [torch.ones(8, 4)], lambda _: None)
