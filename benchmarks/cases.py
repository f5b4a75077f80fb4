"""What the programs that time GPU kernels share: layers, formats and numbers of tokens to go through, and a result."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lowbit import QuantizedTensor
from lowbit.formats import Format, parse_format
from lowbit.tools.bench_linear import LAYERS
from lowbit.tools.timing import copies_for, floor_us, hold_for, median_us


@dataclass(frozen=True)
class Case:
    """A layer of Llama-3.1-8B in one format for one number of tokens.

    Attributes:
        spec: of the weight and, behind a `+`, of the activation.
        x: `(M, K)` bf16.
        weights: as many copies as exceed the cache.
        bf16_us, floor_us: the times of the float layer, and of reading the packed weight.
    """

    layer: str
    spec: str
    format: Format
    act: Format | None
    x: Tensor
    weights: list[QuantizedTensor]
    bf16_us: float
    floor_us: float

    @property
    def m(self) -> int:
        return self.x.shape[0]

    @property
    def hold(self) -> float:
        """Seconds that what multiplies so many tokens is held before it is timed."""
        return hold_for(self.m, self.x.device)

    @property
    def row(self) -> dict[str, Any]:
        """What a result says of the case."""
        return {"layer": self.layer, "format": self.spec, "m": self.m,
                "bf16_us": self.bf16_us, "floor_us": self.floor_us}  # fmt: skip

    def __str__(self) -> str:
        return f"{self.layer} {self.spec} M={self.m} floor {self.floor_us:.1f} bf16 {self.bf16_us:.1f}"


def arguments(
    description: str | None, *, seconds: float, formats: str, tokens: str, kernels: Sequence[str] = (),
    more: Mapping[str, float] | None = None,
) -> argparse.Namespace:  # fmt: skip
    """The command line, with these defaults; the first of `kernels` is one, too, and `more` are further numbers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--layers", default="gate_up,o,down,qkv")
    parser.add_argument("--formats", default=formats)
    parser.add_argument("--tokens", default=tokens)
    if kernels:
        parser.add_argument("--kernel", choices=kernels, default=kernels[0])
    for name, default in (more or {}).items():
        parser.add_argument(f"--{name}", type=float, default=default)
    return parser.parse_args()


def cases(args: argparse.Namespace, device: str = "cuda") -> Iterator[Case]:
    """Every layer, format and number of tokens; says what is left out when the time is spent."""
    started = time.monotonic()
    for layer, spec in product(args.layers.split(","), args.formats.split(",")):
        weight, _, act = spec.partition("+")
        (n, k), fmt = LAYERS[layer], parse_format(weight)
        dense = [torch.randn(n, k, device=device, dtype=torch.bfloat16) * 0.02 for _ in range(copies_for(2 * n * k))]
        size = fmt.nbytes(n, k)
        first = QuantizedTensor.from_float(dense[0], fmt)
        weights = [first, *(first.clone() for _ in range(copies_for(size) - 1))]
        floor = floor_us(size)
        for m in map(int, args.tokens.split(",")):
            if time.monotonic() - started > args.seconds:
                print(f"out of time: {layer} {spec} M = {m} and what follows are left out")
                break
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            bf16 = median_us([partial(F.linear, x, w) for w in dense], hold=hold_for(m, x.device))
            yield Case(layer, spec, fmt, parse_format(act) if act else None, x, weights, bf16, floor)


def write(out: Path | None, rows: list[dict[str, Any]]) -> None:
    """The rows and what made them, as JSON."""
    if out is None:
        return
    info = {
        "command": "python " + " ".join(sys.argv), "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    out.write_text(json.dumps({"info": info, "rows": rows}, indent=1) + "\n")
