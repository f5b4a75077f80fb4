"""Runs batches through a model and collects what quantization wants to know of a layer's input.

`calibrate` runs the whole model and keeps the largest magnitudes. `run_blocks` goes through a model one decoder layer
at a time, so that every layer's second moments come from inputs that the layers before it, quantized already, have
made, and no more than one decoder layer's worth of them is held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit.errors import see
from lowbit.formats.activation import Activation
from lowbit.formats.fp8 import E4M3
from lowbit.formats.nvfp4 import NVFP4Format


@dataclass
class Statistics:
    """What was seen at the input of one layer: the largest magnitude, and over how many tokens."""

    amax: float = 0.0
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        if x.numel():
            self.amax = max(self.amax, float(x.detach().abs().amax()))
            self.tokens += x.numel() // x.shape[-1]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Statistics]:
    """Run `batches` through `model` and return the input statistics of every Linear by name.

    Args:
        model: the float model, on the device it shall run on.
        batches: inputs; each is passed as `model(batch)`, or `model(**batch)` when it is a dict.
        forward: `forward(model, batch)` for models that are called differently.

    Raises:
        ValueError: no batch was given, or no Linear ran.
    """
    seen: dict[str, Statistics] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                seen.setdefault(name, Statistics()).add(args[0])

            hooks.append(module.register_forward_pre_hook(hook))
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                count += 1
                _call(model, batch, forward)
    finally:
        for h in hooks:
            h.remove()
    if not count:
        raise ValueError("calibrate: no batch was given; pass at least one input" + see("calibration-saw-nothing"))
    if not seen:
        raise ValueError("calibrate: no nn.Linear ran in the forward pass" + see("calibration-saw-nothing"))
    return seen


def _call(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> None:
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, dict):
        model(**batch)
    else:
        model(batch)


# Block by block ----------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's repeated blocks: the `nn.ModuleList` whose Linear layers hold the most weights, and its name.

    Raises:
        ValueError: no list of modules holds a Linear.
    """

    def weights(blocks: nn.Module) -> int:
        return sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and weights(m)]
    if not lists:
        raise ValueError(
            "calibrating block by block needs a model with a torch.nn.ModuleList of blocks, as language models have; "
            f"{type(model).__name__} has none" + see("no-blocks")
        )
    return max(lists, key=lambda item: weights(item[1]))


class _InputCaught(Exception):
    """Ends a forward pass at its first block."""


# What a block is called with.
Call = tuple[tuple[Any, ...], dict[str, Any]]


#: How many inputs are kept as they came, of one batch and of all.
ROWS_OF_BATCH, ROWS = 64, 512


class Moments(NamedTuple):
    """Sums over all inputs `X (tokens, K)` of a layer in fp32, the few very long ones shortened.

    `square (K, K)` is `X^T X`, `amax (K,)` the largest magnitude of each channel before anything is shortened. Where
    the original model runs beside, `drift (K, K)` is `(X0 - X)^T X`, X0 being the inputs there. `rows (R, K)` are some
    of the inputs as they came, at most `ROWS`.
    """

    square: Tensor
    amax: Tensor
    drift: Tensor | None = None
    rows: Tensor | None = None

    def divided(self, s: Tensor) -> Moments:
        """The moments of inputs whose channels were divided by `s (K,)`."""
        both = s * s[:, None]
        drift, rows = None if self.drift is None else self.drift / both, None if self.rows is None else self.rows / s
        return Moments(self.square / both, self.amax / s, drift, rows)


class Keeper:
    """Keeps finished blocks, so that a run that was killed goes on behind them (resume.py). This one keeps nothing.

    The inputs behind a block are not kept. A finished block is filled and run, as any other, and gives the bits that it
    gave: one forward pass of it, where quantizing it took two and far more arithmetic. Stored instead, the inputs would
    be written once per block (32768 tokens of a 4096-wide model in bf16: 268 MB, as much as two int4 blocks), with
    whatever else the model gives its blocks, which may be objects that no file of tensors holds.
    """

    def begin(self, calls: list[Call]) -> None:
        """Called before the first block, with how every batch calls it."""

    def fold(self, block: str) -> bool:
        """Whether the named block is a finished one. If so, its float weights get the scales that they had got."""
        return False

    def fill(self, block: str) -> None:
        """Give a finished block its quantized weights, after `fold`."""

    def keep(self, block: str) -> None:
        """Called when a block has been finished."""


KEEPS_NOTHING = Keeper()


def run_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    visit: Callable[[dict[str, Moments]], None],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    keeper: Keeper = KEEPS_NOTHING,
) -> None:
    """Go through the blocks of `model` in order; for each, collect second moments, call `visit`, and run it again.

    What `visit` changes in a block decides what the next block sees. Held are the inputs of one block for all batches,
    and the moments of one block. A block is called with the output of the block before it and whatever else the first
    block was called with; on the first batch this is compared with what the model does.

    Args:
        batches, forward: as for `calibrate`.
        visit: called with `{name of a Linear: its moments}` of one block. Layers that share an input share them.
        keeper: blocks that it has are not visited.

    Raises:
        ValueError: no batch was given, the model has no blocks, or it does more than to pass the output of each block
            to the next: it computes in between, gives blocks different masks, fills a cache, or drops out at random.
    """
    prefix, blocks, inputs = first_inputs(model, batches, forward)
    keeper.begin(inputs)
    with torch.no_grad():
        for i, block in enumerate(blocks):
            name = f"{prefix}.{i}"
            if keeper.fold(name):
                keeper.fill(name)
            else:
                visit(moments_of(name, block, inputs))
                keeper.keep(name)
            if i + 1 < len(blocks):
                for j, call in enumerate(inputs):
                    inputs[j] = following(name, block, call)


def first_inputs(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None
) -> tuple[str, nn.ModuleList, list[Call]]:
    """The blocks of a model, their name, and how each batch calls the first of them; arguments and errors as above."""
    prefix, blocks = blocks_of(model)
    inputs: list[Call] = []
    wanted: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args, kwargs))
        if len(inputs) > 1:
            raise _InputCaught

    def catch_last(_: nn.Module, args: tuple[Any, ...]) -> None:
        wanted.extend(x.clone() for x in args[:1])
        raise _InputCaught

    handles = [
        blocks[0].register_forward_pre_hook(catch, with_kwargs=True),
        blocks[-1].register_forward_pre_hook(catch_last),
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                with contextlib.suppress(_InputCaught):
                    _call(model, batch, forward)
    finally:
        for h in handles:
            h.remove()
    if not inputs:
        raise ValueError("no batch was given; pass at least one input" + see("calibration-saw-nothing"))
    with torch.no_grad():
        last = call = inputs[0]
        for i, block in enumerate(blocks):
            last, call = call, following(f"{prefix}.{i}", block, call)
        # Not `==`: on a GPU two runs of one layer may add in different orders.
        if not wanted or not _near(last[0][0], wanted[0]):
            raise ValueError(
                f"{prefix}: run one after another, the blocks do not give what the model gives. It may compute "
                "something between them, give them different masks, fill a cache (pass use_cache=False), change its "
                "input in place, or be in training mode (call eval())" + see("no-blocks")
            )
    return prefix, blocks, inputs


def following(name: str, block: nn.Module, call: Call) -> Call:
    """Run a block; how to call the one after it."""
    args, kwargs = call
    out = block(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    if not args or not isinstance(out, Tensor) or out.shape != args[0].shape:
        raise ValueError(
            f"{name}: the output of a block must have the form of its first input, got {type(out).__name__}"
            + see("no-blocks")
        )
    return (out, *args[1:]), kwargs


def _near(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).float().norm() <= 1e-2 * y.float().norm())


def shortened(x: Tensor) -> Tensor:
    """Factors `(M, 1)` that leave rows of `x (M, K)` no longer than twice their median length.

    A language model gives a few tokens, mostly the first of a text, inputs hundreds of times as large as others (Sun et
    al., "Massive Activations in Large Language Models", arXiv:2402.17762). Unbounded, one of them outweighs a thousand
    others in `X^T X`.
    """
    length = x.norm(dim=1, keepdim=True)
    share: Tensor = 2 * length.median() / length.clamp(min=torch.finfo(x.dtype).tiny)
    return share.clamp(max=1)


def added(moments: Moments | None, x: Tensor, original: Tensor | None = None) -> Moments:
    """Moments of a batch `x (..., K)` and all before it, summed in place; `original` has the same tokens."""
    flat = x.detach().reshape(-1, x.shape[-1]).float()
    if moments is None:
        k = flat.shape[1]
        drift = None if original is None else flat.new_zeros(k, k)
        moments = Moments(flat.new_zeros(k, k), flat.new_zeros(k), drift, flat[:0])
    if not flat.numel():
        return moments
    if moments.rows is not None and len(moments.rows) < ROWS:
        some = flat[:: -(-len(flat) // ROWS_OF_BATCH)]
        moments = moments._replace(rows=torch.cat((moments.rows, some))[:ROWS])
    torch.maximum(moments.amax, flat.abs().amax(0), out=moments.amax)
    share = shortened(flat)
    if moments.drift is not None and original is not None:
        moments.drift.addmm_(((original.detach().reshape(flat.shape).float() - flat) * share).T, flat * share)
    flat = flat * share
    moments.square.addmm_(flat.T, flat)
    return moments


def moments_of(name: str, block: nn.Module, inputs: list[Call]) -> dict[str, Moments]:
    """Moments of every Linear of a block; layers called with the same tensor share theirs."""
    found: dict[str, Moments] = {}
    last: tuple[Tensor, str] | None = None

    def add(linear: str, x: Tensor) -> None:
        nonlocal last
        if last is not None and x is last[0]:
            found[linear] = found[last[1]]
            return
        last = x, linear
        found[linear] = added(found.get(linear), x)

    hooks = [
        m.register_forward_pre_hook(lambda _, args, linear=f"{name}.{n}" if n else name: add(linear, args[0]))
        for n, m in block.named_modules() if isinstance(m, nn.Linear)
    ]  # fmt: skip
    try:
        for args, kwargs in inputs:
            block(*args, **kwargs)
            last = None
    finally:
        for h in hooks:
            h.remove()
    return found


def static_scale(act: Activation, statistics: Statistics) -> float:
    """The scale of a static activation that just holds the largest magnitude seen.

    Raises:
        ValueError: the statistics are empty or not finite.
    """
    amax = statistics.amax
    if not statistics.tokens or amax != amax or amax == float("inf"):
        raise ValueError(
            f"cannot derive a static scale from amax = {amax} over {statistics.tokens} tokens"
            + see("calibration-saw-nothing")
        )
    element = act.format.element
    top = element.max if hasattr(element, "max") else ((1 << element.bits) - 1) / 2
    if isinstance(act.format, NVFP4Format):
        top *= E4M3.max
    return max(amax / top, 2.0**-126) if amax else 1.0
