"""START HERE: `quantize_(model, config)` replaces the weights of a model's layers, one after the other, in place.

    import lowbit
    report = lowbit.quantize_(model, lowbit.Int4WeightOnlyConfig(group_size=128))

Rules by name choose a config per layer; the first match wins, in the order exact names, patterns, `_default`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.calibrate import Statistics, static_scale
from lowbit.configs import Config, Scheme
from lowbit.formats.base import Format, Planes
from lowbit.formats.fp8 import Float8Format
from lowbit.report import LayerReport, Report
from lowbit.specs import parse_config
from lowbit.tensor import QuantizedTensor

FilterFn = Callable[[nn.Module, str], bool]
Rule = Config | str | None
QUANTIZABLE = (nn.Linear, nn.Embedding, nn.Conv2d)


@dataclass(frozen=True)
class FqnToConfig:
    """Layer names to configs. Keys are exact names, `re:` patterns (matched against the whole name) or `_default`
    (every other Linear). A value of None leaves the layer alone."""

    rules: Mapping[str, Rule] = field(default_factory=dict)


def is_linear(module: nn.Module, name: str) -> bool:
    """The default filter: every nn.Linear."""
    return isinstance(module, nn.Linear)


def quantize_(
    model: nn.Module,
    config: Config | str | FqnToConfig | Mapping[str, Rule],
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    *,
    calibration: Mapping[str, Statistics] | None = None,
    on_nonfinite: Literal["error", "zero"] = "error",
    on_unsupported: Literal["error", "skip"] = "error",
    measure: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Quantize the weights of `model` in place and say what was done.

    Layers are converted one at a time and their float weights released at once: beyond the model itself, at most one
    layer exists twice. With `device`, each weight is quantized there, so a model too large for the device in bf16 can
    still be quantized onto it.

    Args:
        model: any module. `nn.Linear` is quantized by default; `nn.Embedding` and `nn.Conv2d` when a rule or
            `filter_fn` names them.
        config: one config (or its short name, `"int4wo-128"`) for all layers that pass `filter_fn`, or rules by name.
        filter_fn: `filter_fn(module, name) -> bool`; the default takes every `nn.Linear`. Not with rules.
        device: where the quantized weights, and in the end the whole model, shall live.
        calibration: what `calibrate` returned, for configs with static activation scales.
        on_nonfinite: `"error"` names the layer and how many values are NaN or Inf; `"zero"` replaces them by 0.
        on_unsupported: `"error"`, or `"skip"` to leave layers that cannot be quantized alone and list them.
        measure: compute each layer's SQNR (signal to quantization noise in dB).
        progress: called with (layers done, layers in all, name) before each layer.

    Raises:
        ValueError: a rule matched nothing, no layer was selected, a layer cannot be quantized, or holds NaN or Inf.
            Nothing has been changed when a rule is at fault.
    """
    started = time.perf_counter()
    rules = config.rules if isinstance(config, FqnToConfig) else config
    if isinstance(rules, Mapping):
        if filter_fn is not None:
            raise ValueError("quantize_: give rules by name or a filter_fn, not both")
        plan = _plan_by_rules(model, rules)
    else:
        plan = _plan_by_filter(model, _as_config(rules), filter_fn or is_linear)

    report = Report()
    work: list[tuple[str, nn.Module, Config, Scheme]] = []
    for name, module, chosen in plan:
        reason = "left as it is by a rule" if chosen is None else why_not(module, chosen.scheme)
        if reason is None and chosen is not None:
            work.append((name, module, chosen, chosen.scheme))
        elif chosen is not None and on_unsupported == "error":
            raise ValueError(
                f"quantize_: {name} cannot be quantized to {chosen.spec}: {reason}. Exclude it with a rule "
                f"({{{name!r}: None}}) or pass on_unsupported='skip'"
            )
        else:
            report.layers.append(_skipped(name, module, reason or ""))

    done: dict[int, tuple[nn.Parameter, str, Scheme]] = {}
    for i, (name, module, chosen, scheme) in enumerate(work):
        if progress is not None:
            progress(i, len(work), name)
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        shared = done.get(id(weight))
        if shared is not None and shared[2] == scheme:
            old, first = weight, shared[1]
            module.weight = shared[0]
            report.layers.append(_quantized(name, module, old, scheme, 0, None, f"shares the weight of {first}"))
            continue
        static = _static_scale(name, chosen, scheme, calibration)
        quantized, sqnr = _quantize_weight(name, weight, scheme, device, on_nonfinite, static, measure)
        parameter = nn.Parameter(quantized, requires_grad=False)
        done[id(weight)] = (parameter, name, scheme)
        report.layers.append(_quantized(name, module, weight, scheme, quantized.nbytes_packed, sqnr, None))
        module.weight = parameter
        # `done` keeps ids of weights that others still share; holding the weight itself would keep it alive.
        if not _shared_elsewhere(model, weight):
            del done[id(weight)]
    if device is not None:
        model.to(device)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    report.layers.sort(key=lambda r: order[r.name])
    report.seconds = time.perf_counter() - started
    return report


def why_not(module: nn.Module, scheme: Scheme) -> str | None:
    """Why a module cannot take a scheme, or None if it can."""
    if not isinstance(module, QUANTIZABLE):
        return f"{type(module).__name__} is none of {', '.join(c.__name__ for c in QUANTIZABLE)}"
    weight = module.weight
    if isinstance(weight, QuantizedTensor):
        return f"its weight is already {weight.format.spec}"
    if weight.is_meta:
        return "its weight is on the meta device and has no values; load the model first"
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"its weight is {weight.dtype}, not a 16- or 32-bit float"
    if weight.numel() == 0:
        return f"its weight is empty, shape {tuple(weight.shape)}"
    if not isinstance(module, nn.Linear) and scheme.act is not None:
        return f"only Linear takes quantized activations, this is {type(module).__name__}"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding_mode {module.padding_mode!r} pads outside the convolution; only 'zeros' is supported"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites the table while it is used"
    return None


# Which layers ------------------------------------------------------------------------------------

Plan = list[tuple[str, nn.Module, Config | None]]


def _as_config(rule: Config | str) -> Config:
    if isinstance(rule, str):
        return parse_config(rule)
    if not isinstance(rule, Config):
        raise TypeError(f"quantize_: expected a config or its short name, got {type(rule).__name__}: {rule!r}")
    return rule


def _plan_by_filter(model: nn.Module, config: Config, filter_fn: FilterFn) -> Plan:
    plan: Plan = [(name, m, config) for name, m in _modules(model) if filter_fn(m, name)]
    if not plan:
        raise ValueError("quantize_: filter_fn selected no layer; the default selects every nn.Linear")
    return plan


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules())


def _plan_by_rules(model: nn.Module, rules: Mapping[str, Rule]) -> Plan:
    configs = {key: None if rule is None else _as_config(rule) for key, rule in rules.items()}
    patterns = {key: re.compile(key[3:]) for key in rules if key.startswith("re:")}
    used: set[str] = set()
    plan: Plan = []
    for name, module in _modules(model):
        key: str | None = None
        if name in configs and name not in patterns and name != "_default":
            key = name
        else:
            # Patterns speak of layers; a pattern such as re:.* does not mean the containers around them.
            key = next((p for p in patterns if isinstance(module, QUANTIZABLE) and patterns[p].fullmatch(name)), None)
        if key is None and "_default" in configs and isinstance(module, nn.Linear):
            key = "_default"
        if key is not None:
            used.add(key)
            plan.append((name, module, configs[key]))
    unmatched = [key for key in configs if key not in used]
    if unmatched:
        names = [n for n, m in _modules(model) if isinstance(m, QUANTIZABLE)]
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        raise ValueError(f"quantize_: rules that match no layer: {unmatched}; layers are named {shown}")
    return plan


# One layer ---------------------------------------------------------------------------------------


def _quantize_weight(
    name: str, weight: Tensor, scheme: Scheme, device: Any, on_nonfinite: str, static: float | None, measure: bool
) -> tuple[QuantizedTensor, float | None]:
    w = weight.detach()
    if device is not None:
        w = w.to(device)
    finite = torch.isfinite(w)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        if on_nonfinite != "zero":
            raise ValueError(
                f"quantize_: {name} holds {bad} NaN or Inf values of {w.numel()}; repair the checkpoint, or pass "
                "on_nonfinite='zero' to replace them by 0"
            )
        w = torch.where(finite, w, torch.zeros((), dtype=w.dtype, device=w.device))
    del finite
    act_scale = None if static is None else torch.full((1, 1), static, dtype=torch.float32, device=w.device)
    quantized = QuantizedTensor.from_float(w, scheme.weight, scheme.act, act_scale)
    flat = w.reshape(w.shape[0], -1)
    return quantized, sqnr_db(flat, quantized.planes, scheme.weight) if measure else None


def sqnr_db(w: Tensor, planes: Planes, fmt: Format) -> float:
    """Signal to quantization noise of `w (N, K)` in dB, 10 log10(sum w^2 / sum (w - w_q)^2), a few rows at a time."""
    n, k = w.shape
    signal = noise = 0.0
    step = max(1, (1 << 20) // max(k, 1) // fmt.tile[0]) * fmt.tile[0]
    for start in range(0, n, step):
        stop = min(start + step, n)
        rows = w[start:stop].float()
        error = rows - fmt.dequantize(fmt.slice_planes(planes, 0, start, stop), stop - start, k)
        signal += float(rows.double().square().sum())
        noise += float(error.double().square().sum())
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else 0.0


def _static_scale(
    name: str, config: Config, scheme: Scheme, calibration: Mapping[str, Statistics] | None
) -> float | None:
    if scheme.act is None or not scheme.act.static:
        return None
    given = getattr(config, "scale", None)
    if given is not None:
        return float(given)
    if calibration is None or name not in calibration:
        raise ValueError(
            f"quantize_: {name} needs a calibrated activation scale for {config.spec}; pass "
            "calibration=lowbit.calibrate(model, batches), or scale=... in the config"
        )
    return static_scale(scheme.act, calibration[name])


def _shared_elsewhere(model: nn.Module, weight: Tensor) -> bool:
    return any(getattr(m, "weight", None) is weight for m in model.modules())


def _bytes(weight: Any) -> int:
    if isinstance(weight, QuantizedTensor):
        return weight.nbytes_packed
    return weight.numel() * weight.element_size() if isinstance(weight, Tensor) else 0


def _skipped(name: str, module: nn.Module, reason: str) -> LayerReport:
    weight = getattr(module, "weight", None)
    size, shape = _bytes(weight), tuple(weight.shape) if isinstance(weight, Tensor) else ()
    dtype = str(weight.dtype).removeprefix("torch.") if isinstance(weight, Tensor) else ""
    return LayerReport(name, type(module).__name__, shape, dtype, None, size, size, None, skipped=reason)


#: Below these SQNRs a layer is worth a second look (8 bits: 30 dB, 4 bits: 15 dB on common weights).
_EXPECTED_SQNR = {8: 30.0, 4: 15.0}


def _quantized(
    name: str, module: nn.Module, old: Tensor, scheme: Scheme, size: int, sqnr: float | None, note: str | None
) -> LayerReport:
    fmt = scheme.weight
    floor = _EXPECTED_SQNR.get(fmt.element.bits // fmt.element.vector)
    if isinstance(fmt, Float8Format) or "fp8" in fmt.spec:
        floor = 20.0
    if note is None and sqnr is not None and floor is not None and sqnr < floor:
        note = f"SQNR below {floor:.0f} dB: outliers? a finer granularity may help"
    before = 0 if size == 0 and note else _bytes(old)
    dtype = str(old.dtype).removeprefix("torch.")
    return LayerReport(name, type(module).__name__, tuple(old.shape), dtype, scheme.spec, before, size, sqnr, note=note)
