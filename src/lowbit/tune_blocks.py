"""Tuning block by block: trains codes and scales of a quantized model until each block gives what its original gives.

    lowbit.quantize_(model, "int2wo-64-asym", algorithm="awq+gptq", batches=batches)
    lowbit.tune_blocks_(model, original, batches)

GPTQ decides for every weight once, by the second moments of a layer's inputs. Here a block's weights are decided
together and over and over, for the inputs themselves: each weight is round(v) under scales s exp(g), and v and g are
trained by Adam until

    sum over tokens of a |y - y0|^2

falls, y being what the block gives for the inputs that the quantized blocks before it make, y0 what the original gives
for its own, and a the square of a factor that bounds very long rows (`calibrate.shortened`). Gradients pass through the
rounding as if it were not there. To train all parameters of one block after the other for its output is the first phase
of Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", arXiv:2407.11062
(section 3.2, Block-AP); `tune_scales_` is the second. Here training begins at weights that an algorithm has rounded, so
that no float weights are needed, and steps are measured in distances between levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.calibrate import Call, first_inputs, following, shortened
from lowbit.errors import see
from lowbit.formats.base import Format, Planes, tile_reduce
from lowbit.linear import QuantizedLinear
from lowbit.tensor import QuantizedTensor
from lowbit.tune import ScaledLinear, has_coarse_scales, quantized_modules, refuse_static, store_, training_copy


class BlockFit(NamedTuple):
    """How far a block is from its original on the batches, before and after: errors as a share of what the original
    adds to its input, both in squares. A block that training would make worse stays as it was."""

    name: str
    before: float
    after: float


def tune_blocks_(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    epochs: int = 5,
    lr: float = 0.015,
    scale_lr: float = 2e-3,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[BlockFit]:
    """Train codes and scales of every quantized Linear of a model of blocks in place; formats and bytes stay.

    Held are the inputs of one block for all batches, in both models, and the memory of training one block.

    Args:
        model: quantized; a language model, or another whose blocks `quantize_` can go through with `batches`.
        original: what it was before, on the same device. Not one that was rotated since: blocks are compared.
        batches, forward: inputs, as `calibrate` takes them; one step each.
        epochs: how often each block sees all of them.
        lr: Adam's step for weights, as a share of the mean distance of two levels. It falls to 0 linearly. A code
            changes when its weight has gone half such a distance, so that `lr` times the steps of a block decides how
            many can.
        scale_lr: Adam's step for scales, as a share of themselves. Those that are powers of two or 8-bit integers are
            too coarse to be trained, and stay.
        progress: called with (blocks done, blocks in all, name) before each block.

    Returns:
        How each block fitted before and after.

    Raises:
        ValueError: as `quantize_` does for batches and blocks; nothing is quantized, an option is out of its range, an
            activation is static, two blocks share a weight, or the blocks of the two models do not compute in the same
            coordinates. Nothing has been changed then.
    """
    if not batches or epochs < 1 or not lr > 0 or scale_lr < 0:
        raise ValueError(
            f"tune_blocks_: needs a batch, epochs from 1, lr above 0 and scale_lr from 0, got {len(batches)} batches, "
            f"epochs={epochs}, lr={lr} and scale_lr={scale_lr}" + see("bad-option")
        )
    prefix, blocks, calls = first_inputs(model, batches, forward)
    _, originals, wanted = first_inputs(original, batches, forward)
    _refuse_other_coordinates(calls[0], wanted[0], len(blocks), len(originals))
    if not any(isinstance(p, QuantizedTensor) for p in blocks.parameters()):
        raise ValueError(
            f"tune_blocks_: nothing in {prefix} is quantized; call quantize_ first" + see("no-layer-selected")
        )
    for block in (*blocks, *originals):
        refuse_static(block, "tune_blocks_")
    _refuse_shared(blocks)
    calls, wanted = [_float(c) for c in calls], [_float(c) for c in wanted]
    fits = list[BlockFit]()
    for i, (block, before) in enumerate(zip(blocks, originals)):
        name = f"{prefix}.{i}"
        if progress is not None:
            progress(i, len(blocks), name)
        exact = training_copy(before)[0]
        with torch.no_grad():
            inputs, wanted = wanted, [following(name, exact, c) for c in wanted]
        # In place of the block's float weights, which may be gone, those that were rounded.
        training, layers = training_copy(block, RoundedLinear)
        targets = [_Target.of(a[0][0], b[0][0]) for a, b in zip(inputs, wanted)]
        first = last = _error(name, training, calls, targets)
        if layers:
            _train(name, training, layers, calls, targets, epochs, lr, scale_lr)
            last = _error(name, training, calls, targets)
        if last < first:
            store_(block, layers)
        elif layers:
            # Too few batches for such steps: the block stays as it was.
            training, last = training_copy(block)[0], first
        fits.append(BlockFit(name, first, last))
        with torch.no_grad():
            calls = [following(name, training, c) for c in calls]
    return fits


class RoundedLinear(ScaledLinear):
    """A quantized Linear whose codes are those of its weight plus `shift` levels, under scales `s exp(gain)`."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None, layer: QuantizedLinear | None = None) -> None:
        super().__init__(weight, bias, layer)
        self.base = self.format.dequantize(self.start, self.n, self.k)
        self.unit = self.format.scaled(torch.full_like(self.base, mean_distance(self.format, self.start)), self.start)
        self.shift = nn.Parameter(torch.zeros_like(self.base))

    def train_(self) -> None:
        super().train_()
        self.shift.requires_grad_(True)

    @property
    def latent(self) -> Tensor:
        """fp32 `(N, K)`, before it is rounded."""
        return self.base + self.shift.detach() * self.unit

    @property
    def planes(self) -> Planes:
        return self.format.quantize(self.latent, super().planes, check_finite=False)

    def dense(self) -> Tensor:
        """fp32 `(N, K)`."""
        params = super().planes
        return self.format.scaled(self.format.levels(self.format.encode(self.latent, params), params, self.k), params)

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = _Rounded.apply(self.quantized_input(x), self.shift, self.gain, self)  # type: ignore[no-untyped-call]
        return y


def mean_distance(fmt: Format, planes: Planes) -> float:
    """Between the levels next to each other of one weight; of vectors, as if each weight had its share of the codes."""
    e = fmt.element
    levels = e.decode(torch.arange(1 << e.bits, dtype=torch.uint8, device=planes["scale"].device).view(1, -1), planes)
    finite = levels[levels.isfinite()]
    return float(finite.max() - finite.min()) / (2 ** (e.bits / e.vector) - 1)


class _Rounded(torch.autograd.Function):
    """`x W^T`; the gradient of a weight is that of its rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, gain: Tensor, layer: RoundedLinear) -> Tensor:
        w = layer.dense()
        ctx.save_for_backward(x, w)
        ctx.layer = layer
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (x, w), layer, (grad,) = ctx.saved_tensors, ctx.layer, grads
        by_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        by_gain = tile_reduce(by_weight * w, layer.tile, lambda t: t.sum(1))
        return grad @ w, by_weight.mul_(layer.unit), by_gain, None


class _Target(NamedTuple):
    """What a block shall give for one batch `(tokens, D)`, factors `(tokens, 1)`, and what its original adds."""

    output: Tensor
    share: Tensor
    size: float

    @staticmethod
    def of(x: Tensor, y: Tensor) -> _Target:
        added = (y - x).flatten(0, -2)
        share = shortened(added)
        return _Target(y.flatten(0, -2), share, float((added * share).square().sum()))

    def error(self, call: Call) -> Tensor:
        y: Tensor = call[0][0]
        return ((y.flatten(0, -2) - self.output) * self.share).square().sum()


def _error(name: str, block: nn.Module, calls: list[Call], targets: list[_Target]) -> float:
    with torch.no_grad():
        errors = sum(float(t.error(following(name, block, c))) for c, t in zip(calls, targets))
    return errors / max(sum(t.size for t in targets), torch.finfo(torch.float32).tiny)


def _train(
    name: str, block: nn.Module, layers: dict[int, ScaledLinear], calls: list[Call], targets: list[_Target],
    epochs: int, lr: float, scale_lr: float,
) -> None:  # fmt: skip
    rounded = [layer for layer in layers.values() if isinstance(layer, RoundedLinear)]
    gains = [layer.gain for layer in rounded if scale_lr and not has_coarse_scales(layer.format)]
    groups = [{"params": [layer.shift for layer in rounded], "lr": lr}, {"params": gains, "lr": scale_lr}]
    # Weights forget faster than usual how large their gradients were: there are few steps.
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.95))
    largest, steps = [g["lr"] for g in optimizer.param_groups], epochs * len(calls)
    size = max(sum(t.size for t in targets) / len(targets), torch.finfo(torch.float32).tiny)
    for step in range(steps):
        call, target = calls[step % len(calls)], targets[step % len(calls)]
        loss = target.error(following(name, block, call)) / size
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group, at_first in zip(optimizer.param_groups, largest):
            group["lr"] = at_first * (1 - step / steps)
        optimizer.step()


def _float(call: Call) -> Call:
    """Everything that a block is called with in fp32."""

    def wide(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach().float() if x.is_floating_point() else x
        if isinstance(x, (tuple, list)):
            return type(x)(map(wide, x))
        return x

    args, kwargs = call
    return tuple(map(wide, args)), {key: wide(value) for key, value in kwargs.items()}


def _refuse_other_coordinates(call: Call, wanted: Call, count: int, originals: int) -> None:
    x, y = call[0][0], wanted[0][0]
    if count != originals or x.shape != y.shape or not bool((x - y).float().norm() <= 0.5 * y.float().norm()):
        raise ValueError(
            "tune_blocks_: the first blocks of the model and of its original are given different inputs: the model was "
            "rotated, or is another. Give as original what was quantized, rotated alike" + see("bad-option")
        )


def _refuse_shared(blocks: nn.ModuleList) -> None:
    seen = dict[int, int]()
    for i, block in enumerate(blocks):
        for name, _, weight in quantized_modules(block):
            if seen.setdefault(id(weight), i) != i:
                raise ValueError(
                    f"tune_blocks_: blocks {seen[id(weight)]} and {i} share the weight of {name}, which cannot fit "
                    "one after the other; use tune_scales_" + see("bad-option")
                )
