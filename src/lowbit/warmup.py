"""`warmup(model)`: compiles and loads every kernel that a model needs for given numbers of tokens, by running it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.configs import Scheme
from lowbit.errors import see
from lowbit.kernels.problem import Problem
from lowbit.kernels.select import compile_ahead, select
from lowbit.linear import beside
from lowbit.ops import problem_of
from lowbit.tensor import QuantizedTensor

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Warmup:
    """What `warmup` ran; `print` it.

    Attributes:
        devices: where the weights are.
        layers: names of the layers that were run: the first of each kind.
        kernels: name of a kernel -> the numbers of tokens that it ran for, in ascending order.
        seconds: everything together, compilation included.
    """

    devices: tuple[str, ...]
    layers: tuple[str, ...]
    kernels: dict[str, tuple[int, ...]]
    seconds: float

    def __str__(self) -> str:
        kinds = f"{len(self.layers)} kind{'s' if len(self.layers) > 1 else ''} of layers"
        lines = [f"warm on {', '.join(self.devices)}: {kinds} in {self.seconds:.1f} s"]
        lines += [f"  {name}: M = {', '.join(map(str, tokens))}" for name, tokens in self.kernels.items()]
        return "\n".join(lines)


def warmup(
    model: nn.Module,
    tokens: Sequence[int] = TOKENS,
    dtype: torch.dtype | None = None,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Warmup:
    """Run every kind of quantized Linear of `model` once for each number of tokens.

    Afterwards CUDA graphs over the same numbers of tokens can be captured in this process. Compiled code stays on disk,
    so that later processes only load it. Hooks are not called: these, gradients and random numbers stay untouched.

    Args:
        tokens: values of M. Compilers make special cases of some of them: give those that will run.
        dtype: of the activations; the default is each weight's own.
        progress: called with (runs done, runs in all, name of the layer) before each run.

    Raises:
        ValueError: `tokens` are not all positive, the model has no quantized Linear, or one is on the meta device.
        RuntimeError: a CUDA graph is being captured.
    """
    if not tokens or min(tokens) < 1:
        raise ValueError(f"warmup: tokens are one or more positive numbers, got {tokens!r}" + see("bad-option"))
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "warmup: the stream is being captured into a CUDA graph, and what compiles kernels cannot be; call warmup "
            "before the capture" + see("no-kernel")
        )
    layers = _kinds(model)
    if not layers:
        raise ValueError(
            "warmup: the model has no quantized Linear; call lowbit.quantize_ first" + see("nothing-quantized")
        )
    devices = dict.fromkeys(weight.device for _, weight, _ in layers)
    if torch.device("meta") in devices:
        raise ValueError(
            "warmup: layers are on the meta device, where nothing runs; load the model first" + see("bad-option")
        )
    started = time.perf_counter()
    runs = [(*layer, m) for layer in layers for m in sorted(set(tokens))]
    compile_ahead((weight.device, _problem(weight, m, dtype or weight.dtype)) for _, weight, _, m in runs)
    used: dict[str, set[int]] = {}
    for i, (name, weight, module, m) in enumerate(runs):
        if progress is not None:
            progress(i, len(runs), name)
        used.setdefault(_run(weight, module, m, dtype or weight.dtype), set()).add(m)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    kernels = {kernel: tuple(sorted(numbers)) for kernel, numbers in used.items()}
    seconds = time.perf_counter() - started
    return Warmup(tuple(map(str, devices)), tuple(name for name, *_ in layers), kernels, seconds)


def _kinds(model: nn.Module) -> list[tuple[str, QuantizedTensor, nn.Linear]]:
    """Name and weight of the first quantized Linear of each kind; what is equal runs the same code."""
    first: dict[tuple[object, ...], tuple[str, QuantizedTensor, nn.Linear]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, QuantizedTensor):
            stored = [
                t
                for t in (*weight.planes.values(), weight.act_scale, module.bias, *beside(module).values())
                if t is not None
            ]
            kind = (
                type(module), Scheme(weight.format, weight.act).spec, weight.out_features, weight.in_features,
                weight.dtype, weight.device, *map(_layout, stored),
            )  # fmt: skip
            first.setdefault(kind, (name, weight, module))
    return list(first.values())


def _layout(t: Tensor) -> tuple[object, ...]:
    """What Triton compiles separate code for. On CPUs one code takes all, and addresses are aligned by chance."""
    return (t.dtype, t.stride(), t.data_ptr() % 16 == 0) if t.is_cuda else (t.dtype,)


def _problem(weight: QuantizedTensor, m: int, dtype: torch.dtype) -> Problem:
    x = torch.empty(0, dtype=dtype, device=weight.device)
    return problem_of(x, m, weight.out_features, weight.in_features, weight.format.spec, weight.act_spec)


@torch.no_grad()
def _run(weight: QuantizedTensor, module: nn.Linear, m: int, dtype: torch.dtype) -> str:
    """A layer without its hooks; returns the kernel's name."""
    x = torch.ones(m, weight.in_features, dtype=dtype, device=weight.device)
    type(module).forward(module, x)
    return select(_problem(weight, m, dtype)).kernel.name
