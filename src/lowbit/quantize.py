"""START HERE: `quantize_(model, config)` replaces the weights of a model's layers, one after the other, in place.

    import lowbit
    report = lowbit.quantize_(model, lowbit.Int4WeightOnlyConfig(group_size=128))

Rules by name choose a config per layer; the first match wins, in the order exact names, patterns, `_default`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lowbit.algorithms.gptq import gptq
from lowbit.algorithms.hqq import hqq_params
from lowbit.algorithms.search import search_params
from lowbit.calibrate import Statistics, run_blocks, static_scale
from lowbit.configs import Config, Scheme
from lowbit.errors import see
from lowbit.formats.base import Format, Planes, count_nonfinite
from lowbit.formats.elements import FloatElement
from lowbit.original import quantizing
from lowbit.report import LayerReport, Report
from lowbit.specs import parse_config
from lowbit.tensor import QuantizedTensor

FilterFn = Callable[[nn.Module, str], bool]
Rule = Config | str | None
Algorithm = Literal["rtn", "mse", "hqq", "gptq"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
# More than the 0.01 of the paper, which calibrates with eight times as much text: 0.231 nats instead of 0.245 for int4
# in groups of 128 and 32768 tokens (docs/algorithms.md).
DAMP = 0.05
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
    algorithm: Algorithm = "rtn",
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    on_nonfinite: Literal["error", "zero"] = "error",
    on_unsupported: Literal["error", "skip"] = "error",
    measure: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
    restore: bool | None = None,
) -> Report:
    """Quantize the weights of `model` in place and say what was done.

    Layers are converted one at a time and their float weights released at once. What is allocated on the way is the
    quantized weights plus at most the two largest layers (for layers of more than a few MB). With `device`, each
    weight is quantized there, so a model too large for the device in bf16 can still be quantized onto it.

    Args:
        model: any module. `nn.Linear` is quantized by default; `nn.Embedding` and `nn.Conv2d` when a rule or
            `filter_fn` names them.
        config: one config (or its short name, `"int4wo-128"`) for all layers that pass `filter_fn`, or rules by name.
        filter_fn: `filter_fn(module, name) -> bool`; the default takes every `nn.Linear`. Not with rules.
        device: where the quantized weights, and in the end the whole model, shall live.
        calibration: what `calibrate` returned, for configs with static activation scales.
        algorithm: how values are chosen. `"rtn"` rounds to nearest under the format's own scales; `"mse"` searches for
            the scales with the least squared error; `"hqq"` for those that leave outliers alone; `"gptq"` rounds each
            column of a weight so as to mend what the columns before it lost, for the inputs that `batches` bring.
        batches, forward: inputs for `"gptq"`, as `calibrate` takes them. The model must consist of repeated blocks (an
            `nn.ModuleList`), which are gone through one after the other on the model's device.
        on_nonfinite: `"error"` names the layer and how many values are NaN or Inf; `"zero"` replaces them by 0.
        on_unsupported: `"error"`, or `"skip"` to leave layers that cannot be quantized alone and list them.
        measure: compute each layer's SQNR (signal to quantization noise in dB).
        progress: called with (layers done, layers in all, name) before each layer.
        restore: keep the float weights until all is done, and put them back if anything fails before, as when memory
            runs out. The default does so where it costs no memory of the device: where `device` is another than theirs.

    Raises:
        torch.OutOfMemoryError: memory ran out. The message says whether the model is as it was, or else which layers
            are quantized.
        ValueError: a rule matched nothing, no layer was selected, a layer cannot be quantized, needs a calibrated
            scale that is not there, or holds NaN or Inf; or batches and algorithm do not go together. Nothing has been
            changed then.
    """
    _check_algorithm(algorithm, batches)
    started = time.perf_counter()
    report, work = Report(), list[Work]()
    for name, module, chosen in plan(model, config, filter_fn):
        reason = "left as it is by a rule" if chosen is None else why_not(module, chosen.scheme)
        if reason is None and chosen is not None:
            work.append(Work(name, module, chosen.scheme, _static_scale(name, chosen, calibration)))
        elif chosen is not None and on_unsupported == "error":
            raise ValueError(
                f"quantize_: {name} cannot be quantized to {chosen.spec}: {reason}. Exclude it with a rule "
                f"({{{name!r}: None}}) or pass on_unsupported='skip'" + see("layer-not-quantizable")
            )
        else:
            report.layers.append(skipped(name, module, reason or ""))
    if on_nonfinite != "zero":
        _refuse_nonfinite(work)

    done: dict[tuple[int, Scheme], tuple[nn.Parameter, str]] = {}
    finished = 0

    def convert(item: Work, moments: Tensor | None = None) -> None:
        nonlocal finished
        if progress is not None:
            progress(finished, len(work), item.name)
        finished += 1
        weight: nn.Parameter = item.module.weight  # type: ignore[assignment]
        key = (id(weight), item.scheme)
        if key in done:
            parameter, first = done[key]
            report.layers.append(replace(_quantized(item, weight, 0, None), bytes_before=0, note=f"shares {first}"))
        else:
            zero = on_nonfinite == "zero"
            quantized, sqnr = _quantize_weight(weight, item, device, zero, measure, algorithm, moments)
            layer = _quantized(item, weight, quantized.nbytes_packed, sqnr)
            if algorithm == "gptq" and moments is None:
                layer = replace(layer, note="no inputs seen: scales searched, rounded to nearest")
            report.layers.append(layer)
            parameter = nn.Parameter(quantized, requires_grad=False)
            # Only while another module still holds the float weight can its id come up again.
            if sum(m.weight is weight for m in model.modules() if hasattr(m, "weight")) > 1:
                done[key] = (parameter, item.name)
        item.module.weight = parameter

    with quantizing(model, _keeps(restore, device, work), report):
        if algorithm == "gptq":
            waiting = {item.name: item for item in work}

            def visit(moments: dict[str, Tensor]) -> None:
                for name in [n for n in moments if n in waiting]:
                    # A layer that met only zeros tells nothing of what matters in it.
                    if bool(moments[name].diagonal().any()):
                        convert(waiting.pop(name), moments[name])

            if device is not None:
                model.to(device)
            run_blocks(model, batches or [], visit, forward)
            work = list(waiting.values())
        for item in work:
            convert(item)
        if device is not None:
            model.to(device)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    report.layers.sort(key=lambda r: order[r.name])
    report.seconds = time.perf_counter() - started
    return report


def _check_algorithm(algorithm: str, batches: Iterable[Any] | None) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"quantize_: unknown algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}" + see("bad-option")
        )
    if (algorithm == "gptq") != (batches is not None):
        raise ValueError(
            "quantize_: algorithm 'gptq' needs batches=..., typical inputs of the model, and no other algorithm takes "
            f"them; got algorithm {algorithm!r}" + (" without batches" if batches is None else " with batches")
            + see("bad-option")
        )  # fmt: skip


def _keeps(restore: bool | None, device: torch.device | str | None, work: list[Work]) -> bool:
    """Whether float weights are kept until the end."""
    if restore is not None or device is None:
        return bool(restore)
    return all(item.module.weight.device.type != torch.device(device).type for item in work)  # type: ignore[union-attr]


class Work(NamedTuple):
    """One layer to be quantized: to what, and with which calibrated scale of its activation."""

    name: str
    module: nn.Module
    scheme: Scheme
    act_scale: float | None


def why_not(module: nn.Module, scheme: Scheme, *, loaded: bool = True) -> str | None:
    """Why a module cannot take a scheme, or None if it can. `loaded=False`: its values are still to come."""
    if not isinstance(module, QUANTIZABLE):
        return f"{type(module).__name__} is none of {', '.join(c.__name__ for c in QUANTIZABLE)}"
    weight = module.weight
    if isinstance(weight, QuantizedTensor):
        return f"its weight is already {weight.format.spec}"
    if weight.is_meta and loaded:
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


def plan(
    model: nn.Module, config: Config | str | FqnToConfig | Mapping[str, Rule], filter_fn: FilterFn | None = None
) -> Plan:
    """The layers that a config or rules mean, in the order of the model, and what each becomes: None, as it is.

    Raises:
        ValueError: as `quantize_`, whose arguments these are.
    """
    rules = config.rules if isinstance(config, FqnToConfig) else config
    if not isinstance(rules, Mapping):
        return _plan_by_filter(model, _as_config(rules), filter_fn or is_linear)
    if filter_fn is not None:
        raise ValueError("quantize_: give rules by name or a filter_fn, not both" + see("conflicting-rules"))
    return _plan_by_rules(model, rules)


def _as_config(rule: Config | str) -> Config:
    if isinstance(rule, str):
        return parse_config(rule)
    if not isinstance(rule, Config):
        raise TypeError(
            f"quantize_: expected a config or its short name, got {type(rule).__name__}: {rule!r}"
            + see("unknown-config")
        )
    return rule


def _plan_by_filter(model: nn.Module, config: Config, filter_fn: FilterFn) -> Plan:
    plan: Plan = [(name, m, config) for name, m in _modules(model) if filter_fn(m, name)]
    if not plan:
        raise ValueError(
            "quantize_: filter_fn selected no layer; the default selects every nn.Linear" + see("no-layer-selected")
        )
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
    # `_default` may have nothing left to do; any other rule was meant for a layer.
    unmatched = [key for key in configs if key not in used and key != "_default"]
    if unmatched:
        names = [n for n, m in _modules(model) if isinstance(m, QUANTIZABLE)]
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        raise ValueError(
            f"quantize_: rules that match no layer: {unmatched}; layers are named {shown}" + see("rule-without-match")
        )
    return plan


# One layer ---------------------------------------------------------------------------------------


def quantize_layer_(name: str, module: nn.Module, config: Config) -> LayerReport:
    """What `quantize_` does to one layer, for loaders that meet a model's weights one after the other.

    Raises:
        ValueError: the weight holds NaN or Inf, or the config needs a calibrated scale.
    """
    item = Work(name, module, config.scheme, _static_scale(name, config, None))
    _refuse_nonfinite([item])
    weight: Tensor = module.weight  # type: ignore[assignment]
    quantized, sqnr = _quantize_weight(weight, item, None, False, True, "rtn", None)
    module.weight = nn.Parameter(quantized, requires_grad=False)
    return _quantized(item, weight, quantized.nbytes_packed, sqnr)


def _refuse_nonfinite(work: list[Work]) -> None:
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


def _quantize_weight(
    weight: Tensor, item: Work, device: Any, zero_nonfinite: bool, measure: bool, algorithm: Algorithm,
    moments: Tensor | None,
) -> tuple[QuantizedTensor, float | None]:  # fmt: skip
    w = weight.detach() if device is None else weight.detach().to(device)
    if zero_nonfinite:
        w = w.nan_to_num(0.0, 0.0, 0.0)
    act_scale = None
    if item.act_scale is not None:
        act_scale = torch.full((1, 1), item.act_scale, dtype=torch.float32, device=w.device)
    # Looked through already by `_refuse_nonfinite`, or repaired above.
    weight_format, act = item.scheme
    if algorithm == "rtn":
        quantized = QuantizedTensor.from_float(w, weight_format, act, act_scale, check_finite=False)
    else:
        flat = w.reshape(w.shape[0], -1)
        planes = _choose(flat, weight_format, algorithm, moments)
        quantized = QuantizedTensor(planes, weight_format, w.shape, w.dtype, act, act_scale)
    if not measure:
        return quantized, None
    return quantized, sqnr_db(w.reshape(w.shape[0], -1), quantized.planes, item.scheme.weight)


def _choose(w: Tensor, fmt: Format, algorithm: Algorithm, moments: Tensor | None) -> Planes:
    """All planes of `w (N, K)`, by any algorithm but rounding to nearest."""
    if algorithm == "hqq":
        params = hqq_params(w, fmt)
    else:
        params = search_params(w, fmt, None if moments is None else moments.diagonal())
    if moments is None:
        return fmt.quantize(w, params, check_finite=False)
    return gptq(w, moments, fmt, params, damp=DAMP)


def sqnr_db(w: Tensor, planes: Planes, fmt: Format) -> float:
    """Signal to quantization noise of `w (N, K)` in dB, 10 log10(sum w^2 / sum (w - w_q)^2), a few rows at a time."""
    n, k = w.shape
    signal = noise = 0.0
    for start, stop in fmt.row_blocks(n, k):
        rows = w[start:stop].float()
        error = rows - fmt.dequantize_rows(planes, start, stop, k)
        signal += float(rows.double().square().sum())
        noise += float(error.double().square().sum())
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else 0.0


def _static_scale(name: str, config: Config, calibration: Mapping[str, Statistics] | None) -> float | None:
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


def _quantized(item: Work, old: Tensor, size: int, sqnr: float | None) -> LayerReport:
    floor, note = _expected_sqnr(item.scheme.weight), None
    if sqnr is not None and floor is not None and sqnr < floor:
        note = f"SQNR below {floor:.0f} dB: outliers? a finer granularity may help"
    dtype = str(old.dtype).removeprefix("torch.")
    kind, shape = type(item.module).__name__, tuple(old.shape)
    return LayerReport(item.name, kind, shape, dtype, item.scheme.spec, _bytes(old), size, sqnr, note=note)
