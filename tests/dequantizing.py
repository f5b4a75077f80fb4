"""Layers as other people write them, for tests of what finds dequantized weights. The lines marked are looked for."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILE = Path(__file__)


def line_of(mark: str) -> int:
    """The number of the line that ends with the comment `mark`."""
    lines = FILE.read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))
    return number


class Float8Layer(nn.Module):
    """float8 codes and a scale per row in buffers; the whole weight is dequantized, and then multiplied."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
        scale = w.abs().amax(1, keepdim=True) / 448
        self.register_buffer("codes", (w / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.bfloat16())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype) * self.scale  # float8 dequantized

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(x.dtype))


class Int8Layer(nn.Module):
    """int8 codes in buffers."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
        scale = w.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (w / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.bfloat16())


class ChunkedLayer(Int8Layer):
    """A quarter of the rows at a time."""

    def forward(self, x: Tensor) -> Tensor:
        step = len(self.codes) // 4
        parts = []
        for i in range(0, len(self.codes), step):
            w = self.codes[i : i + step].to(x.dtype) * self.scale[i : i + step]
            parts.append(F.linear(x, w))
        return torch.cat(parts, dim=-1)


class GatheredLayer(Int8Layer):
    """Dequantized piece by piece, but into a buffer that holds the whole weight in the end."""

    def forward(self, x: Tensor) -> Tensor:
        w = torch.empty(self.codes.shape, dtype=x.dtype)
        for i in range(len(w)):
            w[i] = self.codes[i].to(x.dtype) * self.scale[i]
        return x @ w.t()


class ScaledAfterLayer(Int8Layer):
    """The scale is applied to the product, but the codes are made bf16 as a whole all the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.codes.bfloat16().t() * self.scale.t()


class UnpackingLayer(nn.Module):
    """Two 4-bit codes per byte, unpacked to int8 as a whole for an integer product."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.in_features, self.out_features = k, n
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("codes", torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator))
        self.register_buffer("scale", torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.stack((self.codes & 15, self.codes >> 4), -1).to(torch.int8).flatten(1) - 8
        return torch._int_mm((x * 10).round().to(torch.int8), w.t()) * self.scale


class IntegerProductLayer(Int8Layer):
    """int8 by int8: the codes are what the product reads, and their sums correct for the input's zero point."""

    def forward(self, x: Tensor) -> Tensor:
        xq = (x * 10).round().to(torch.int8)
        return (torch._int_mm(xq, self.codes.t()) - 3 * self.codes.sum(1, dtype=torch.int32)) * self.scale.t()


class LookupLayer(Int8Layer):
    """An embedding: the rows that are asked for are dequantized, which may be more than the table has."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.codes[ids].float() * self.scale[ids], torch.eye(self.codes.shape[1]))


class DequantizedTable(Int8Layer):
    """An embedding that dequantizes the table for every lookup."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.codes.float() * self.scale)


class Float8Product(Float8Layer):
    """float8 by float8, as `torch._scaled_mm` multiplies it."""

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones(())
        return torch._scaled_mm(x.to(torch.float8_e4m3fn), self.codes.t(), one, one, out_dtype=torch.bfloat16)
