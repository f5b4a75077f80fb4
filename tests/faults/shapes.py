"""Sizes that no tile, group or byte divides: the layer is right, or the error has a name. Nothing in between, and no
process that dies, which the C code of the CPU's kernels could."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import sqnr_db
from torch import nn

from faults.outcome import Outcome
from lowbit import QuantizedTensor, quantize_
from lowbit.kernels.select import use_kernel

SIZES = (1, 2, 3, 31, 33, 63, 64, 65, 100, 127, 128, 129, 4095, 4097)
GROUPS = ("g32", "g64", "g128", "row")
#: Of fp32 arithmetic against fp64.
FLOOR_DB = 90.0


def run(cases: int, directory: Path) -> Outcome:
    """`cases` of all pairs of sizes with all groups; bits, symmetry and tokens change from one to the next."""
    every = list(product(SIZES, SIZES, GROUPS))
    rng, outcome = random.Random(0), Outcome()
    for i, (n, k, group) in enumerate(rng.sample(every, min(cases, len(every)))):
        spec = f"int{(4, 8, 3, 5)[i % 4]}:{group}{(':asym', '')[i // 4 % 2]}"
        outcome.add(_wrong(spec, (1, 2, 17)[i % 3], n, k, outcome))
    return outcome


def _wrong(spec: str, m: int, n: int, k: int, outcome: Outcome) -> str | None:
    g = torch.Generator().manual_seed(n * k)
    layer = nn.Linear(k, n, bias=False)
    layer.weight.data = torch.randn(n, k, generator=g) * 0.02
    where = f"{spec}, M={m}, N={n}, K={k}"
    try:
        quantize_(nn.ModuleDict({"layer": layer}), spec, measure=False)
    except ValueError as error:
        outcome.counts["refused"] += 1
        return None if "[lowbit: " in str(error) else f"{where}: {error}"
    assert isinstance(layer.weight, QuantizedTensor)
    x = torch.randn(m, k, generator=g)
    with torch.no_grad():
        y = layer(x)
        with use_kernel("reference"):
            expected = F.linear(x, layer.weight)
    outcome.counts["right"] += 1
    got = sqnr_db(expected, y)
    return None if y.shape == (m, n) and y.isfinite().all() and got >= FLOOR_DB else f"{where}: {got:.1f} dB"
