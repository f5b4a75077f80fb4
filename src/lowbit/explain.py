"""`explain(model)`: which kernel runs each quantized layer, for which numbers of tokens, and why not another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.configs import Scheme
from lowbit.errors import see
from lowbit.kernels.problem import Problem, UnsupportedError, arch_of
from lowbit.kernels.select import select
from lowbit.linear import QuantizedLinear, beside, nbytes_beside
from lowbit.tensor import QuantizedTensor

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Range:
    """Tokens `first..last` run on `kernel`; `rejected` are the kernels before it in the table, with reasons.

    `config` says how it is launched, for kernels that have a choice.
    """

    first: int
    last: int
    kernel: str
    rejected: tuple[tuple[str, str], ...]
    config: str = ""


@dataclass(frozen=True)
class LayerExplanation:
    """One quantized linear layer; `beside` says what it adds to the product with its weight, `bytes` has both."""

    name: str
    n: int
    k: int
    scheme: str
    bytes: int
    ranges: tuple[Range, ...]
    beside: str = ""


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` it, or read `layers`."""

    device: str
    layers: tuple[LayerExplanation, ...]

    def __str__(self) -> str:
        lines = [f"kernels on {self.device}"]
        groups: dict[tuple[object, ...], list[LayerExplanation]] = {}
        for layer in self.layers:
            groups.setdefault((layer.scheme, layer.n, layer.k, layer.ranges, layer.beside), []).append(layer)
        for members in groups.values():
            first = members[0]
            more = f" and {len(members) - 1} more" if len(members) > 1 else ""
            what = f"{first.scheme}, {first.n} x {first.k}, {first.bytes / 1e6:.2f} MB"
            lines.append(f"{first.name}{more}: {what}" + (f", with {first.beside}" if first.beside else ""))
            for r in first.ranges:
                lines.append(f"  M {r.first}..{r.last}: {r.kernel}" + (f" ({r.config})" if r.config else ""))
                lines.extend(f"      not {name}: {reason}" for name, reason in r.rejected)
        return "\n".join(lines)


def explain(model: nn.Module, tokens: Sequence[int] = TOKENS, dtype: torch.dtype | None = None) -> Explanation:
    """Explain every Linear of `model` whose weight is quantized.

    Args:
        tokens: values of M to try; neighbours with the same kernel are joined into a range.
        dtype: of the activations; the default is each weight's own.

    Raises:
        ValueError: the model has no quantized Linear.
    """
    layers, device = [], "cpu"
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or not isinstance(weight, QuantizedTensor):
            continue
        device = str(weight.device)
        arch = arch_of(weight.device)
        ranges: list[Range] = []
        for m in sorted(tokens):
            n, k, fmt = weight.out_features, weight.in_features, weight.format.spec
            problem = Problem(m, n, k, fmt, weight.act_spec, dtype or weight.dtype, weight.device.type, arch)
            try:
                choice = select(problem)
                kernel, rejected, config = choice.kernel.name, choice.rejected, choice.config
            except UnsupportedError as error:
                kernel, rejected, config = f"none: {error}", (), ""
            last = ranges[-1] if ranges else None
            same = (kernel, config, _kinds(rejected))
            if last is not None and (last.kernel, last.config, _kinds(last.rejected)) == same:
                ranges[-1] = Range(last.first, m, kernel, last.rejected, config)
            else:
                ranges.append(Range(m, m, kernel, rejected, config))
        scheme = Scheme(weight.format, weight.act).spec
        size = weight.nbytes_packed + nbytes_beside(beside(module).values())
        words = module.describe() if isinstance(module, QuantizedLinear) else ""
        layers.append(LayerExplanation(name, n, k, scheme, size, tuple(ranges), words))
    if not layers:
        raise ValueError(
            "explain: the model has no quantized Linear; call lowbit.quantize_ first" + see("nothing-quantized")
        )
    return Explanation(device, tuple(layers))


def _kinds(rejected: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The kernels' names alone: reasons mention M, which differs inside a range."""
    return tuple(name for name, _ in rejected)
