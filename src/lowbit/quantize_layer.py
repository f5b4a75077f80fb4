"""What `quantize_` does to one layer: round its weight, put beside it what belongs there, and say so in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit.algorithms.align import aligned
from lowbit.algorithms.lowrank import low_rank
from lowbit.calibrate import Moments, Statistics, static_scale
from lowbit.configs import Config, Scheme
from lowbit.errors import see
from lowbit.formats.base import Format, Planes, count_nonfinite
from lowbit.formats.elements import FloatElement
from lowbit.linear import (
    LOW_RANK,
    SIGNS,
    nbytes_beside,
    put_beside_,
    random_signs,
    turned_moment,
    turned_weight,
    why_nothing_beside,
)
from lowbit.recipe import LOWRANK, TO_NEAREST, Recipe, round_weight
from lowbit.report import LayerReport
from lowbit.tensor import QuantizedTensor


class Work(NamedTuple):
    """One layer to be quantized: to what, and with which calibrated scale of its activation."""

    name: str
    module: nn.Module
    scheme: Scheme
    act_scale: float | None


#: What lies beside a weight, by name (linear.py).
Beside = dict[str, Tensor]


class Made(NamedTuple):
    """What became of one layer."""

    weight: QuantizedTensor
    beside: Beside
    row: LayerReport


def quantize_layer_(
    name: str, module: nn.Module, config: Config, recipe: Recipe = TO_NEAREST, moments: Moments | None = None
) -> LayerReport:
    """What `quantize_` does to one layer, for those that meet a model's layers one after the other.

    Of the recipe's steps only `incoherence` is done here; the others change more than one layer. `moments` are those of
    the layer's inputs, which `"gptq"` needs; `"mse"` and a low-rank term weigh errors by them.

    Raises:
        ValueError: the weight holds NaN or Inf, the config needs a calibrated scale, or the layer cannot have what the
            recipe puts beside its weight.
    """
    item = Work(name, module, config.scheme, static_scale_of(name, config, None))
    if (reason := why_not_beside(module, recipe)) is not None:
        raise ValueError(f"quantize_: {name} {reason}" + see("layer-not-quantizable"))
    refuse_nonfinite([item])
    weight: Tensor = module.weight  # type: ignore[assignment]
    made = quantize_weight(weight, item, None, False, True, recipe, moments, 2 if recipe.incoherent else 0)
    module.weight = nn.Parameter(made.weight, requires_grad=False)
    if made.beside:
        put_beside_(module, made.beside)
    return made.row


def why_not_beside(module: nn.Module, recipe: Recipe) -> str | None:
    """Why a layer cannot have what its recipe puts beside its weight, "cannot have ...: ...", or None if it can."""
    words = ["incoherence"] * recipe.incoherent + [f"{LOWRANK}-{recipe.rank}"] * bool(recipe.rank)
    reason = why_nothing_beside(module) if words else None
    if words and reason is None:
        n, k = module.weight.shape  # type: ignore[misc, union-attr]
        if recipe.rank > min(n, k):  # type: ignore[type-var, operator]
            reason = f"the rank of a weight ({n}, {k}) is at most {min(n, k)}"  # type: ignore[type-var]
    return None if reason is None else f"cannot have {' and '.join(words)}: {reason}"


def refuse_nonfinite(work: list[Work]) -> None:
    """Every layer is checked before the first is changed."""
    bad = []
    for item in work:
        weight: Tensor = item.module.weight.detach()  # type: ignore[operator, union-attr, assignment]
        count = count_nonfinite(weight)
        if count:
            bad.append(f"{item.name} ({count} of {weight.numel()})")
    if bad:
        raise ValueError(
            f"quantize_: NaN or Inf values in {', '.join(bad)}; nothing was quantized. Repair the checkpoint, or pass "
            "on_nonfinite='zero' to replace them by 0" + see("nonfinite-weight")
        )


def quantize_weight(
    weight: Tensor, item: Work, device: Any, zero_nonfinite: bool, measure: bool, recipe: Recipe,
    moments: Moments | None, sides: int = 0,
) -> Made:  # fmt: skip
    """`sides` of the weight are turned: none, the input's, or the output's as well."""
    w = weight.detach() if device is None else weight.detach().to(device)
    if zero_nonfinite:
        w = w.nan_to_num(0.0, 0.0, 0.0)
    act_scale = None
    if item.act_scale is not None:
        act_scale = torch.full((1, 1), item.act_scale, dtype=torch.float32, device=w.device)
    flat, fmt, beside = w.reshape(w.shape[0], -1), item.scheme.weight, Beside()
    if moments is not None and moments.drift is not None:
        flat = aligned(flat, moments.square, moments.drift)
    hessian = None if moments is None else moments.square
    if sides:
        signs = [random_signs(size, seed, w.device) for seed, size in enumerate((flat.shape[1], flat.shape[0]))][:sides]
        beside = dict(zip(SIGNS, signs))
        flat = turned_weight(flat, *signs).float()
        hessian = None if hessian is None else turned_moment(hessian, signs[0])
    # Looked through already by `refuse_nonfinite`, or repaired above.
    planes = round_weight(flat, fmt, recipe.rounding, hessian)
    if recipe.rank:
        a, b = low_rank(flat.float() - fmt.dequantize(planes, *flat.shape), recipe.rank, hessian)
        beside |= dict(zip(LOW_RANK, (a.to(w.dtype), b.to(w.dtype))))
    quantized = QuantizedTensor(planes, fmt, w.shape, w.dtype, item.scheme.act, act_scale)
    sqnr = sqnr_db(flat, planes, fmt, *(beside.get(name) for name in LOW_RANK)) if measure else None
    return Made(quantized, beside, row_of(item, weight, quantized.nbytes_packed + nbytes_beside(beside.values()), sqnr))


def sqnr_db(w: Tensor, planes: Planes, fmt: Format, a: Tensor | None = None, b: Tensor | None = None) -> float:
    """Signal to quantization noise of `w (N, K)` in dB, 10 log10(sum w^2 / sum (w - w_q)^2), a few rows at a time.

    `a (r, K)` and `b (N, r)` are those of a low-rank term, whose product `w_q` then includes.
    """
    n, k = w.shape
    signal = noise = 0.0
    for start, stop in fmt.row_blocks(n, k):
        rows = w[start:stop].float()
        error = rows - fmt.dequantize_rows(planes, start, stop, k)
        if a is not None and b is not None:
            error -= b[start:stop].float() @ a.float()
        signal += float(rows.double().square().sum())
        noise += float(error.double().square().sum())
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else 0.0


def static_scale_of(name: str, config: Config, calibration: Mapping[str, Statistics] | None) -> float | None:
    act = config.scheme.act
    if act is None or not act.static:
        return None
    given = getattr(config, "scale", None)
    if given is not None:
        return float(given)
    if calibration is None or name not in calibration:
        raise ValueError(
            f"quantize_: {name} needs a calibrated activation scale for {config.spec}; pass "
            "calibration=lowbit.calibrate(model, batches), or scale=... in the config" + see("missing-calibration")
        )
    return static_scale(act, calibration[name])


def _bytes(weight: Any) -> int:
    if isinstance(weight, QuantizedTensor):
        return weight.nbytes_packed
    return weight.numel() * weight.element_size() if isinstance(weight, Tensor) else 0


def skipped(name: str, module: nn.Module, reason: str) -> LayerReport:
    """The row of a layer that stays as it is."""
    weight = getattr(module, "weight", None)
    size, shape = _bytes(weight), tuple(weight.shape) if isinstance(weight, Tensor) else ()
    dtype = str(weight.dtype).removeprefix("torch.") if isinstance(weight, Tensor) else ""
    return LayerReport(name, type(module).__name__, shape, dtype, None, size, size, None, skipped=reason)


def _expected_sqnr(fmt: Format) -> float | None:
    """Below this many dB a layer is worth a second look; common weights give more."""
    bits = fmt.element.bits // fmt.element.vector
    if isinstance(fmt.element, FloatElement) and bits == 8:
        return 20.0
    return {8: 30.0, 4: 15.0}.get(bits)


def row_of(item: Work, old: Tensor, size: int, sqnr: float | None) -> LayerReport:
    floor, note = _expected_sqnr(item.scheme.weight), None
    if sqnr is not None and floor is not None and sqnr < floor:
        note = f"SQNR below {floor:.0f} dB: outliers? a finer granularity may help"
    dtype = str(old.dtype).removeprefix("torch.")
    kind, shape = type(item.module).__name__, tuple(old.shape)
    return LayerReport(item.name, kind, shape, dtype, item.scheme.spec, _bytes(old), size, sqnr, note=note)
