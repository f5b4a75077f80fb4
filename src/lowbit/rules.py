"""Which layers of a model get which config: by a filter, or by rules with names and patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from lowbit.configs import Config, Scheme
from lowbit.errors import see
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


Plan = list[tuple[str, nn.Module, Config | None]]


def is_linear(module: nn.Module, name: str) -> bool:
    """The default filter: every nn.Linear."""
    return isinstance(module, nn.Linear)


def plan_of(
    model: nn.Module, config: Config | str | FqnToConfig | Mapping[str, Rule], filter_fn: FilterFn | None = None
) -> Plan:
    """Every layer that a config reaches, in the order of the model, with that config; None leaves it alone.

    Raises:
        ValueError: a rule matched nothing, no layer was selected, or rules and a filter were both given.
    """
    rules = config.rules if isinstance(config, FqnToConfig) else config
    if not isinstance(rules, Mapping):
        return _plan_by_filter(model, _as_config(rules), filter_fn or is_linear)
    if filter_fn is not None:
        raise ValueError("quantize_: give rules by name or a filter_fn, not both" + see("conflicting-rules"))
    return _plan_by_rules(model, rules)


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
