"""Calibration: what it sees, what it refuses, and scales that just hold it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.calibrate import Statistics, static_scale
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
