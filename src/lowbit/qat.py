"""Quantization-aware training: the model trains on the numbers that it will have once it is quantized.

    lowbit.prepare_qat_(model, "int4wo-32")
    ...                                        # train as before
    report = lowbit.convert_qat_(model)

Each weight stays a float parameter, under `parametrizations.weight.original`; `module.weight` is what it rounds to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.algorithms.qat import fake_quantize
from lowbit.configs import Config
from lowbit.errors import see
from lowbit.quantize import quantize_
from lowbit.report import Report
from lowbit.rules import FilterFn, FqnToConfig, Rule, plan_of, why_not


class FakeQuantizedWeight(nn.Module):
    """The parametrization of a weight: what its config makes of it. It holds the hook that does so for inputs."""

    def __init__(self, config: Config, hook: Any = None) -> None:
        super().__init__()
        self.config, self.hook = config, hook

    def forward(self, w: Tensor) -> Tensor:
        return fake_quantize(w, self.config.scheme.weight)


def prepare_qat_(
    model: nn.Module,
    config: Config | str | FqnToConfig | Mapping[str, Rule],
    filter_fn: FilterFn | None = None,
) -> list[str]:
    """Let layers compute with quantized weights (and inputs, where the config has them) while they train.

    Arguments are those of `quantize_`. Gradients pass through the rounding as if it were not there. An optimizer made
    before goes on: the parameters stay the same objects.

    Returns:
        The names of the layers.

    Raises:
        ValueError: as `quantize_` does; also for static activations, whose scale belongs to an untrained model, and for
            a layer that is prepared already. Nothing has been changed then.
    """
    plan = [(name, module, chosen) for name, module, chosen in plan_of(model, config, filter_fn) if chosen is not None]
    for name, module, chosen in plan:
        reason = "it is prepared already" if _prepared(module) else why_not(module, chosen.scheme)
        if reason is None and chosen.scheme.act is not None and chosen.scheme.act.static:
            reason = "its activation scale is static; train with dynamic activations"
        if reason is not None:
            raise ValueError(
                f"prepare_qat_: {name} cannot be trained for {chosen.spec}: {reason}" + see("layer-not-quantizable")
            )
    for _, module, chosen in plan:
        hook, act = None, chosen.scheme.act
        if act is not None:
            hook = module.register_forward_pre_hook(lambda _, args, act=act: (fake_quantize(args[0], act), *args[1:]))
        parametrize.register_parametrization(module, "weight", FakeQuantizedWeight(chosen, hook))
    return [name for name, _, _ in plan]


def convert_qat_(model: nn.Module) -> Report:
    """Quantize what `prepare_qat_` prepared. Every weight is, bit by bit, the one that the layer computed with last.

    Raises:
        ValueError: nothing is prepared, or a weight holds NaN or Inf.
    """
    prepared = {name: module for name, module in model.named_modules() if _prepared(module)}
    if not prepared:
        raise ValueError("convert_qat_: no layer is prepared; call prepare_qat_ first" + see("no-layer-selected"))
    rules: dict[str, Rule] = {}
    for name, module in prepared.items():
        fake = _parametrization(module)
        rules[name] = fake.config
        if fake.hook is not None:
            fake.hook.remove()
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    return quantize_(model, rules)


def _prepared(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight") and isinstance(_parametrization(module), FakeQuantizedWeight)


def _parametrization(module: nn.Module) -> FakeQuantizedWeight:
    return module.parametrizations["weight"][0]  # type: ignore[index, return-value]
