"""Models with random weights, made where they will run and quantized as they are made: for measuring speed and memory.

A model that is too large for a GPU in bf16 can be made there if it fits quantized. A weight is drawn and quantized some
rows at a time, and no more than that is there in bf16 beside what is finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from lowbit.configs import Scheme
from lowbit.formats.base import Format
from lowbit.models.config import LlamaConfig
from lowbit.models.fuse import fuse_projections_, join_weights
from lowbit.models.llama import Llama
from lowbit.tensor import QuantizedTensor

STD = 0.02
# Weights that are drawn at once.
PART = 8 << 20


@dataclass(frozen=True)
class Made:
    """A model and what making it took.

    Attributes:
        seconds: everything.
        quantize_seconds: quantization alone.
    """

    model: Llama
    seconds: float
    quantize_seconds: float


def random_model(
    config: LlamaConfig,
    scheme: Scheme | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Made:
    """A model of a shape, with fused projections, normal weights of standard deviation 0.02 and norms of one.

    Args:
        scheme: of every Linear, the output projection included; None leaves all in `dtype`. An output projection that
            is tied to the embedding becomes a quantized one of its own; the embedding always stays in `dtype`.
        progress: called with (layers done, layers in all, name) before each layer.
    """
    started, device = time.perf_counter(), torch.device(device)
    with torch.device("meta"):
        model = Llama(config)
    fuse_projections_(model)
    random = torch.Generator(device).manual_seed(seed)
    clock = _Clock(device)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    # The largest first, while there is most room. One that is tied is given its weight by its embedding.
    layers.sort(key=lambda item: -item[1].weight.numel())
    tied = config.tie_embeddings and scheme is None
    for i, (name, layer) in enumerate(layers):
        if progress is not None:
            progress(i, len(layers), name)
        if tied and layer is model.lm_head:
            continue
        n, k = layer.weight.shape
        own = scheme if isinstance(layer, nn.Linear) else None
        weight = _weight(n, k, own, dtype, random, clock)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            layer.bias = nn.Parameter(torch.zeros(n, dtype=dtype, device=device), requires_grad=False)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.is_meta and not isinstance(module, (nn.Linear, nn.Embedding)):
                setattr(
                    module, name, nn.Parameter(torch.ones(p.shape, dtype=dtype, device=device), requires_grad=False)
                )
    if tied:
        model.tie_weights()
    model.model.rotary_emb.to(device)
    return Made(model.eval(), clock.since(started), clock.spent)


def _weight(
    n: int, k: int, scheme: Scheme | None, dtype: torch.dtype, random: torch.Generator, clock: _Clock
) -> Tensor:
    def normal(rows: int) -> Tensor:
        return torch.empty(rows, k, dtype=dtype, device=random.device).normal_(0.0, STD, generator=random)

    if scheme is None:
        return normal(n)
    fmt, parts = scheme.weight, []
    for start, stop in fmt.row_blocks(n, k, PART) if joins(fmt) else [(0, n)]:
        w = normal(stop - start)
        with clock:
            parts.append(QuantizedTensor.from_float(w, fmt, scheme.act, check_finite=False))
    return parts[0] if len(parts) == 1 else join_weights(list(parts))


@cache
def joins(fmt: Format) -> bool:
    """Whether a weight may be quantized some rows at a time: nothing is chosen for the tensor as a whole."""
    n, k = fmt.tile[0], 2 * fmt.tile[1]
    wave = torch.arange(n * k, dtype=torch.float32).view(n, k)
    parts = [QuantizedTensor.from_float((wave * step).sin() * step, fmt) for step in (1.0, 3.0)]
    try:
        join_weights(list(parts))
    except ValueError:
        return False
    return True


class _Clock:
    """Adds up the time inside its `with` blocks, what the device still had to do included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent, self._began = device, 0.0, 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def since(self, moment: float) -> float:
        return self._now() - moment

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *_: object) -> None:
        self.spent += self.since(self._began)
