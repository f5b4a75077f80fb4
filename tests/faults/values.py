"""Weights and activations that are no numbers, zero, denormal or huge."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from test_codes import check
from torch import Tensor, nn

from faults.outcome import Outcome
from lowbit import parse_config, quantize_
from lowbit.formats import Format, registered
from lowbit.specs import EXAMPLES

#: What the groups of a weight are filled with, side by side.
MAGNITUDES = {
    "zero": 0.0, "denormal": 1e-42, "smallest": 1e-45, "tiny": 1e-30, "small": 1e-4, "one": 1.0, "huge": 1e30,
    "largest": 3e38,
}  # fmt: skip
BAD = {"NaN": float("nan"), "Inf": float("inf"), "-Inf": -float("inf")}


# Weights --------------------------------------------------------------------------------------------------------------


def run_weights(cases: int, directory: Path) -> Outcome:
    """All formats in turn. NaN and Inf are refused with their number; everything else has the codes, the scales and the
    decoded bits of the definition (`numpy_reference.py`), is finite, and zero where whole groups are."""
    rng, outcome = random.Random(0), Outcome()
    formats = registered()
    for i in range(cases):
        fmt = formats[i % len(formats)]
        bad = rng.choice([None] * 9 + [*BAD])
        w = weight(rng, i)
        outcome.counts["NaN or Inf" if bad else "finite"] += 1
        outcome.add(_accepted(fmt, rng, w, bad) if bad else _inexact(fmt, w))
    return outcome


def weight(rng: random.Random, seed: int) -> Tensor:
    """fp32 `(N, K)`: runs of columns of different magnitudes in every row, some rows zero, the signs mixed."""
    g = torch.Generator().manual_seed(seed)
    n, k = rng.choice([(3, 130), (5, 257), (2, 64), (1, 33), (130, 40)])
    w = torch.rand(n, k, generator=g) * 2 - 1
    for row in range(n):
        at = 0
        while at < k:
            width = rng.choice([1, 16, 32, 64, 128])
            w[row, at : at + width] *= MAGNITUDES[rng.choice(sorted(MAGNITUDES))]
            at += width
        if rng.random() < 0.2:
            w[row] = 0
    return w


def _accepted(fmt: Format, rng: random.Random, w: Tensor, bad: str) -> str | None:
    places = rng.sample(range(w.numel()), min(3, w.numel()))
    w.view(-1)[places] = BAD[bad]
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = before = nn.Parameter(w, requires_grad=False)
    try:
        quantize_(nn.ModuleDict({"layer": layer}), fmt.spec)
        return f"{fmt}: {bad} was quantized"
    except ValueError as error:
        good = f"layer ({len(places)} of {w.numel()})" in str(error) and layer.weight is before
        return None if good else f"{fmt}: {error}"


def _inexact(fmt: Format, w: Tensor) -> str | None:
    try:
        check(fmt, w)
    except AssertionError as error:
        return f"{fmt}: {error}"
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = nn.Parameter(w, requires_grad=False)
    quantize_(nn.ModuleDict({"layer": layer}), fmt.spec, measure=False)
    decoded = layer.weight.dequantize(torch.float32)  # type: ignore[operator]
    if not decoded.isfinite().all():
        return f"{fmt}: {int(decoded.isfinite().logical_not().sum())} weights are decoded to NaN or Inf"
    zero = (w == 0).all(dim=1) & _own_scale(fmt)
    return None if not decoded[zero].any() else f"{fmt}: a row of zeros is decoded to something else"


def _own_scale(fmt: Format) -> bool:
    """Whether a row of zeros shares no scale with others. One symmetric bit has no zero beside other weights."""
    return fmt.plane("scale").n == 1 or fmt.element.bits > 1


# Activations ----------------------------------------------------------------------------------------------------------


def run_activations(cases: int, directory: Path) -> Outcome:
    """All configs with dynamic activations in turn: a token of zeros gives zeros, every finite token finite outputs,
    and a token of NaN or Inf nothing but NaN or Inf, for itself alone where scales are per token."""
    outcome, rng = Outcome(), random.Random(0)
    acts = {spec: parse_config(spec).scheme.act for spec in EXAMPLES}
    specs = [spec for spec, act in acts.items() if act is not None and not act.static]
    for i in range(cases):
        spec = specs[i % len(specs)]
        act = acts[spec]
        assert act is not None
        outcome.add(_wrong_output(spec, act.scale_tile[0] is not None and not act.format.has("outer_scale"), rng, i))
    return outcome


def _wrong_output(spec: str, by_token: bool, rng: random.Random, seed: int) -> str | None:
    g = torch.Generator().manual_seed(seed)
    dtype = rng.choice([torch.bfloat16, torch.float32])
    layer = nn.Linear(256, 48, bias=False, dtype=dtype)
    layer.weight.data = torch.randn(48, 256, generator=g).to(dtype)
    quantize_(nn.ModuleDict({"layer": layer}), spec, measure=False)
    kinds = [rng.choice(["zero", "denormal", "tiny", "small", "one", "huge"]) for _ in range(rng.choice([1, 2, 9, 33]))]
    kinds[0] = "zero"
    x = torch.randn(len(kinds), 256, generator=g) * torch.tensor([MAGNITUDES[k] for k in kinds]).view(-1, 1)
    x = x.to(dtype)
    with torch.no_grad():
        y = layer(x)
        if y[[k == "zero" for k in kinds]].any() or not y.isfinite().all():
            return f"{spec}, {dtype}, tokens {kinds}: zeros give {y[0].abs().max()}, all finite: {y.isfinite().all()}"
        if not by_token or len(kinds) == 1:
            return None
        broken = x.clone()
        broken[-1, rng.randrange(256)] = BAD[rng.choice(sorted(BAD))]
        z = layer(broken)
    if z[-1].isfinite().any():
        return f"{spec}, {dtype}: NaN or Inf in a token gives {int(z[-1].isfinite().sum())} numbers"
    return None if torch.equal(z[:-1], y[:-1]) else f"{spec}, {dtype}: NaN in a token changes others"
