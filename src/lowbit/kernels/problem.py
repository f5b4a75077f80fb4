"""What a kernel is asked to do, and the error when none can."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.formats.activation import Activation, parse_activation
from lowbit.formats.base import Format, parse_format


class UnsupportedError(NotImplementedError):
    """No kernel applies, or the one asked for does not; the message lists every kernel and its reason."""


@cache
def capability(index: int) -> tuple[int, int]:
    """CUDA compute capability of a GPU; PyTorch takes long to say it."""
    return torch.cuda.get_device_capability(index)


def arch_of(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability of a device; None for others."""
    return capability(device.index or 0) if device.type == "cuda" else None


_invariant: ContextVar[bool] = ContextVar("lowbit_batch_invariant", default=False)


def is_batch_invariant() -> bool:
    """Whether `batch_invariant` is in force."""
    return _invariant.get()


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """In this context, a row of a lowbit matmul has the same bits whatever other rows are multiplied with it.

    Without it, kernels and their tiles change with the number of tokens, and with them the order of sums. It costs
    speed, most for few tokens, and needs a Hopper GPU, bf16 or fp16 and weight-only formats; anything else is an error.
    """
    token = _invariant.set(True)
    try:
        yield
    finally:
        _invariant.reset(token)


_early: ContextVar[bool] = ContextVar("lowbit_early", default=False)


@contextlib.contextmanager
def early_launches(on: bool = True) -> Iterator[None]:
    """In this context, kernels that know how start before the one ahead of them has ended, and wait for it themselves.

    Programmatic dependent launch, from Hopper on: what they need not wait for (weights) is on its way meanwhile. No
    kernel right before them may write a layer's weights, or what the attention reads of the cache; `on=False` is for
    such a place inside the context.
    """
    token = _early.set(on)
    try:
        yield
    finally:
        _early.reset(token)


def starts_early() -> bool:
    """Whether `early_launches` is in force."""
    return _early.get()


@dataclass(frozen=True)
class Operand:
    """An activation `(M, K)` that is quantized already: what kernels take in place of `x`.

    Attributes:
        values: bf16 levels, or 8-bit codes; a kernel's entry in the table says which it multiplies.
        row_scale: fp32 `(M or 1, 1)`, `x ~ values * row_scale`; or `(M, ceil(K / group))`, each for its part of K.
    """

    values: Tensor
    row_scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


@dataclass(frozen=True)
class Problem:
    """One matmul `y (M, N) = x (M, K) @ W (N, K).T`, as far as the choice of a kernel depends on it."""

    m: int
    n: int
    k: int
    format: str
    act: str
    dtype: torch.dtype
    device: str
    arch: tuple[int, int] | None = None  # CUDA compute capability

    @property
    def weight(self) -> Format:
        return parse_format(self.format)

    @property
    def activation(self) -> Activation | None:
        return parse_activation(self.act)
