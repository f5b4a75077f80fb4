"""What is in a model's weights: ranges, outliers, how well each scheme would hold them, how well codes are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowbit.formats.base import Format
from lowbit.quantize_layer import sqnr_db
from lowbit.rules import QUANTIZABLE
from lowbit.specs import parse_config
from lowbit.tensor import QuantizedTensor

#: One scheme per family and width that people choose between.
SCHEMES = ("int8wo", "float8wo", "mxfp8wo", "int4wo-128", "int4wo-32", "nf4wo-64", "mxfp4wo", "nvfp4wo", "int3wo-64")
#: A weight further out than this many standard deviations is an outlier; of a bell, 2 in 1e9 are.
OUTLIER_SIGMAS = 6.0


@dataclass(frozen=True)
class FloatLayer:
    """A layer with float weights.

    Attributes:
        lowest, highest, std: of all its weights.
        outlier_ratio: share of weights beyond 6 standard deviations from the mean.
        excess_kurtosis: mean((w - mean)^4) / std^4 - 3: 0 for a bell, above for heavy tails.
        sqnr_db: scheme to signal-to-quantization-noise ratio of rounding this layer to it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    lowest: float
    highest: float
    std: float
    outlier_ratio: float
    excess_kurtosis: float
    sqnr_db: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer with quantized weights.

    Attributes:
        codes_used: how many of the format's `codes` codes occur.
        entropy_bits: Shannon entropy of the codes, in bits per code; at most log2(codes).
        scale_range: smallest and largest scale in effect.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    format: str
    activation: str
    bits_per_weight: float
    codes: int
    codes_used: int
    entropy_bits: float
    scale_range: tuple[float, float]


Layer = FloatLayer | QuantizedLayer


def inspect_model(
    model: nn.Module,
    schemes: Sequence[str] = SCHEMES,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Layer]:
    """Examine every Linear, Embedding and Conv2d of `model`, in its order; a shared weight once.

    Args:
        schemes: configs whose weight formats are tried on every float layer.
        progress: called with (layers done, layers in all, name) before each layer.

    Raises:
        ValueError: the model has no such layer, or a scheme is unknown.
    """
    formats = {spec: parse_config(spec).scheme.weight for spec in schemes}
    layers: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZABLE) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            layers.append((name, module))
    if not layers:
        raise ValueError("inspect: the model has no Linear, Embedding or Conv2d")
    found: list[Layer] = []
    for i, (name, module) in enumerate(layers):
        if progress is not None:
            progress(i, len(layers), name)
        weight = module.weight
        assert isinstance(weight, Tensor)
        if isinstance(weight, QuantizedTensor):
            found.append(_quantized(name, module, weight))
        else:
            found.append(_float(name, module, weight.detach(), formats))
    return found


def _float(name: str, module: nn.Module, weight: Tensor, formats: dict[str, Format]) -> FloatLayer:
    flat = weight.reshape(weight.shape[0], -1)
    std, kurtosis, outliers = _moments(flat)
    low, high = (float(x) for x in flat.aminmax())
    finite = math.isfinite(low) and math.isfinite(high)
    # Schemes say how layers would fare; an embedding is a table that nobody multiplies, and the largest of all.
    tried = formats if finite and not isinstance(module, nn.Embedding) else {}
    return FloatLayer(
        name=name,
        kind=type(module).__name__,
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        bytes=weight.numel() * weight.element_size(),
        lowest=low,
        highest=high,
        std=std,
        outlier_ratio=outliers,
        excess_kurtosis=kurtosis,
        sqnr_db={spec: sqnr_db(flat, fmt.quantize(flat), fmt) for spec, fmt in tried.items()},
    )


def _moments(w: Tensor) -> tuple[float, float, float]:
    """Standard deviation, excess kurtosis and outlier ratio of `w (N, K)`, some rows at a time, in fp64."""
    step = max(1, (1 << 20) // max(w.shape[1], 1))
    parts = [w[i : i + step] for i in range(0, w.shape[0], step)]
    count = max(w.numel(), 1)
    mean = sum(float(p.double().sum()) for p in parts) / count
    second = fourth = 0.0
    for p in parts:
        square = (p.double() - mean).square()
        second += float(square.sum())
        fourth += float(square.square().sum())
    variance = second / count
    std = math.sqrt(variance) if variance >= 0 else math.nan
    if not std > 0:
        return std, 0.0, 0.0
    far = sum(int(((p.double() - mean).abs() > OUTLIER_SIGMAS * std).sum()) for p in parts)
    return std, fourth / count / variance**2 - 3, far / count


def _quantized(name: str, module: nn.Module, weight: QuantizedTensor) -> QuantizedLayer:
    fmt = weight.format
    codes = fmt.element.unpack(weight.planes, -(-weight.in_features // fmt.element.vector))
    counts = torch.bincount(codes.reshape(-1).int(), minlength=1 << fmt.element.bits).double()
    share = counts[counts > 0] / counts.sum().clamp_min(1)
    scale, _ = fmt.effective_scale(weight.planes)
    return QuantizedLayer(
        name=name,
        kind=type(module).__name__,
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        bytes=weight.nbytes_packed,
        format=fmt.spec,
        activation=weight.act_spec,
        bits_per_weight=8 * weight.nbytes_packed / max(weight.numel(), 1),
        codes=1 << fmt.element.bits,
        codes_used=int((counts > 0).sum()),
        entropy_bits=float(-(share * share.log2()).sum()),
        scale_range=(float(scale.min()), float(scale.max())),
    )
