"""Tuning: trains the scales of a quantized model end to end, until it predicts what its original predicts.

    lowbit.quantize_(model, "int3wo-64", algorithm="awq+gptq", batches=batches)
    lowbit.tune_scales_(model, original, batches)

Algorithms that round mend each layer by itself; what is left adds up over layers. Here codes and zero points stay, and
every scale s becomes s exp(g), with g trained by Adam from 0 so that

    mean over tokens of sum_v p(v) (log p(v) - log q(v))

falls, p being the original's distribution and q the quantized model's. To train the step sizes alone, end to end, is
the second phase of Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
arXiv:2407.11062 (section 3.3, E2E-QP); to follow the original's distribution instead of a label is Liu et al.,
"LLM-QAT", arXiv:2305.17888 (equation 4). Of s exp(g), the derivative of a weight w by g is w itself, so nothing but
layer inputs is kept on the way forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.algorithms.qat import fake_quantize
from lowbit.algorithms.search import stored_scale
from lowbit.errors import see
from lowbit.formats.base import Format, Planes, tile_reduce
from lowbit.linear import QuantizedLinear
from lowbit.tensor import QuantizedTensor


def tune_scales_(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    epochs: int = 1,
    lr: float = 2e-3,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train the scales of every quantized Linear of a language model in place; nothing else changes.

    Takes the memory of training without the optimizer's usual two states per weight: a float copy of what is not
    quantized, one layer's weight at a time, all layers' inputs for one batch.

    Args:
        model: quantized; gives logits `(B, T, V)`, or an object with such `.logits`.
        original: what it was before, on the same device.
        batches, forward: inputs, as `calibrate` takes them; one step each.
        epochs: how often all of them are seen.
        lr: Adam's step, which is how far a scale moves at first, as a share of itself. It falls to 0 linearly.
        progress: called with (steps done, steps in all, nats of the step before) before each step.

    Returns:
        The loss of every step in nats, from before the first change on.

    Raises:
        ValueError: nothing is quantized, there is no batch, an option is out of its range, an activation is static, or
            scales are powers of two or 8-bit integers.
    """
    if not batches or epochs < 1 or not lr > 0:
        raise ValueError(
            f"tune_scales_: needs a batch, epochs from 1 and lr above 0, got {len(batches)} batches, epochs={epochs} "
            f"and lr={lr}" + see("bad-option")
        )
    for name, _, weight in quantized_modules(model):
        if has_coarse_scales(weight.format):
            raise ValueError(
                f"tune_scales_: {name} is {weight.format.spec}, whose scales are stored as "
                f"{weight.format.plane('scale').dtype}, too coarse for the small steps of training; take a format with "
                "scales in bf16, fp16, fp32 or e4m3" + see("bad-option")
            )
    refuse_static(model, "tune_scales_")
    training, layers = training_copy(model)
    if not layers:
        raise ValueError("tune_scales_: no Linear is quantized; call quantize_ first" + see("no-layer-selected"))
    gains = [layer.gain for layer in layers.values()]
    optimizer, steps, losses = torch.optim.Adam(gains, lr), epochs * len(batches), list[float]()
    for step in range(steps):
        if progress is not None:
            progress(step, steps, losses[-1] if losses else float("nan"))
        batch = batches[step % len(batches)]
        with torch.no_grad():
            wanted = _logits(original, batch, forward).log_softmax(-1)
        loss = F.kl_div(
            _logits(training, batch, forward).log_softmax(-1), wanted, reduction="batchmean", log_target=True
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.step()
        losses.append(float(loss.detach()))
    store_(model, layers)
    return losses


class ScaledLinear(nn.Module):
    """A quantized Linear whose scales are `s exp(gain)`, rounded as they will be stored.

    `layer`, without its weight, has what lies beside it and the bias, which stay.
    """

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None, layer: QuantizedLinear | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.format, self.act, self.bias = weight.format, weight.act, bias
        self.start, self.k = weight.planes, weight.in_features
        scale, self.tile = weight.format.effective_scale(self.start)
        self.n, self.gain = weight.out_features, nn.Parameter(torch.zeros_like(scale))
        self.scale = scale

    @property
    def planes(self) -> Planes:
        return self.start | {"scale": stored_scale(self.format, self.start, self.scale * self.gain.detach().exp())}

    def dense(self) -> Tensor:
        """fp32 `(N, K)`."""
        return self.format.dequantize(self.planes, self.n, self.k)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer is not None:
            return self.layer.around(x, self.product)
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def train_(self) -> None:
        """Let what is trained have gradients."""
        self.gain.requires_grad_(True)

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.act is None else fake_quantize(x, self.act)

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = _Scaled.apply(self.quantized_input(x), self.gain, self)  # type: ignore[no-untyped-call]
        return y


class _Scaled(torch.autograd.Function):
    """`x W^T`; the weight is made again on the way back. What storing rounds off a scale counts as not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, layer: ScaledLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.dense())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,), w = ctx.saved_tensors, ctx.layer.dense()
        (grad,) = grads
        by_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        by_gain = tile_reduce(by_weight.mul_(w), ctx.layer.tile, lambda t: t.sum(1))
        return grad @ w, by_gain, None


def quantized_modules(model: nn.Module) -> list[tuple[str, nn.Module, QuantizedTensor]]:
    """Names, modules and weights of all that is quantized."""
    found = ((name, module, getattr(module, "weight", None)) for name, module in model.named_modules())
    return [(name, module, weight) for name, module, weight in found if isinstance(weight, QuantizedTensor)]


def has_coarse_scales(fmt: Format) -> bool:
    """Whether scales are powers of two or 8-bit integers, which small steps do not move."""
    return fmt.plane("scale").dtype in (torch.float8_e8m0fnu, torch.int8)


def refuse_static(model: nn.Module, caller: str) -> None:
    """Raise a ValueError that names `caller` if an activation of the model is static."""
    for name, _, weight in quantized_modules(model):
        if weight.act is not None and weight.act.static:
            raise ValueError(
                f"{caller}: {name} has a static activation scale, which belongs to the weights before; use dynamic "
                "activations" + see("bad-option")
            )


def training_copy(
    model: nn.Module, kind: type[ScaledLinear] | None = None
) -> tuple[nn.Module, dict[int, ScaledLinear]]:
    """A float copy of a module with a layer that trains for each quantized Linear; these by the id of their weight."""
    held = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    training = copy.deepcopy(model, {id(p): p for p in held})
    layers = dict[int, ScaledLinear]()
    for name, module, weight in quantized_modules(training):
        if isinstance(module, nn.Linear):
            bias = None if module.bias is None else module.bias.detach().float()
            around = module if isinstance(module, QuantizedLinear) else None
            module.weight = None  # type: ignore[assignment]
            layer = layers.setdefault(id(weight), (kind or ScaledLinear)(weight, bias, around))
            training.set_submodule(name, layer)
        else:
            module.weight = nn.Parameter(weight.dequantize(torch.float32))
    training.float().requires_grad_(False)
    for layer in layers.values():
        layer.train_()
    return training, layers


@torch.no_grad()
def store_(model: nn.Module, layers: Mapping[int, ScaledLinear]) -> None:
    """Give a model what was trained in its `training_copy`."""
    for _, module, weight in quantized_modules(model):
        if id(weight) in layers:
            module.weight = nn.Parameter(weight.with_planes(layers[id(weight)].planes), requires_grad=False)


def _logits(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> Tensor:
    """fp32 `(tokens, V)`."""
    if forward is not None:
        out = forward(model, batch)
    else:
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    logits: Tensor = getattr(out, "logits", out)
    return logits.flatten(0, -2).float()
