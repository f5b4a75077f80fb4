"""Triton is asked once for what it compiles; after that, a launch needs only tensors that are alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.kernels.triton import launch

STREAM = 77


class Jit:
    """A Triton kernel `(x, y, n, A: constexpr, B: constexpr)`: notes what it compiles and what is launched."""

    arg_names = ("x", "y", "n", "A", "B")

    def __init__(self, interpreted: bool = False) -> None:
        self.interpreted = interpreted
        self.compiled: list[dict[str, Any]] = []
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            self.compiled.append(named)
            return None if self.interpreted else self

        def start(*arguments: Any, stream: int) -> None:
            assert stream == STREAM
            self.launches.append((grid, *arguments))

        # Of three numbers: the compiled kernel's.
        return start if len(grid) == 3 else run


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_started", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)


def off(t: Tensor) -> Tensor:
    """The same at an address that is no multiple of 16."""
    return torch.cat((t.new_empty(1), t))[1:]


X, Y = torch.zeros(64), torch.zeros(64)
NAMED = {"B": 3, "A": 2, "num_warps": 4}


def test_the_second_launch_is_of_what_the_first_compiled() -> None:
    kernel = Jit()
    for grid, x in (((1, 2), X), ((5, 6), torch.zeros(32)), ((1, 2), X)):
        launch.start(kernel, grid, (x, Y, 9), NAMED)
    assert kernel.compiled == [NAMED]
    assert [(grid, *rest) for grid, _, _, *rest in kernel.launches] == [((5, 6, 1), 9, 2, 3), ((1, 2, 1), 9, 2, 3)]
    # Of tensors, where they lie.
    assert kernel.launches[1][1:3] == (X.data_ptr(), Y.data_ptr())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((X.half(), Y, 9), NAMED), ((X, Y.to(torch.float8_e4m3fn), 9), NAMED), ((off(X), Y, 9), NAMED),
        ((X, off(Y), 9), NAMED), ((X, Y, 16), NAMED), ((X, Y, 9), NAMED | {"A": 1}),
        ((X, Y, 9), NAMED | {"num_warps": 8}), ((X, Y, 9), NAMED | {"launch_pdl": True}),
        ((X.to("meta"), Y, 9), NAMED),
    ],
)  # fmt: skip
def test_another_kind_is_compiled_apart(arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    if arguments[0].is_meta:
        # Another device, as far as numbers of devices go.
        arguments[0].get_device = lambda: 1
    kernel = Jit()
    launch.start(kernel, (1, 1), (X, Y, 9), NAMED)
    launch.start(kernel, (1, 1), arguments, named)
    assert kernel.compiled == [NAMED, named]
    launch.start(kernel, (1, 1), arguments, named)
    launch.start(kernel, (1, 1), (X, Y, 9), NAMED)
    assert len(kernel.launches) == 2


def test_kernels_are_not_mixed_up() -> None:
    kernels = Jit(), Jit()
    for kernel in kernels * 2:
        launch.start(kernel, (1, 1), (X, Y, 9), NAMED)
    assert [len(kernel.compiled) for kernel in kernels] == [1, 1]


def test_the_interpreter_compiles_nothing() -> None:
    kernel = Jit(interpreted=True)
    for _ in range(3):
        launch.start(kernel, (1, 1), (X, Y, 9), NAMED)
    assert len(kernel.compiled) == 3
