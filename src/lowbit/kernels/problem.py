"""What a kernel is asked to do, and the error when none can."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.formats.activation import Activation, parse_activation
from lowbit.formats.base import Format, parse_format


class UnsupportedError(NotImplementedError):
    """No kernel applies, or the one asked for does not; the message lists every kernel and its reason."""


def arch_of(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability of a device; None for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


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
