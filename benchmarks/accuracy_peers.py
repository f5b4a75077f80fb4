"""Other libraries for `accuracy.py`: how their users would quantize the Linears of a model, on a CPU.

A variant names the config of lowbit that it is compared with, the bits that it stores per weight (its scales and zero
points included, as its defaults hold them), and a function that changes a model's Linears in place. Libraries are
imported inside. What they have for GPUs alone is not here: torchao's GPTQ and int4 with HQQ, and its float8 matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Change = Callable[[nn.Module, list[str]], None]


@dataclass(frozen=True)
class Variant:
    library: str
    what: str
    config: str
    bits_per_weight: float
    change: Change

    @property
    def name(self) -> str:
        return f"{self.library} {self.what}"


def _torchao(model: nn.Module, names: list[str], config: str, **options: Any) -> None:
    import torchao.quantization as ao
    from torchao.quantization.granularity import PerGroup

    if isinstance(group := options.get("granularity"), int):
        options["granularity"] = PerGroup(group)
    if options.pop("asymmetric", False):
        options["mapping_type"] = ao.MappingType.ASYMMETRIC
    chosen = set(names)
    ao.quantize_(model, getattr(ao, config)(**options), lambda _, name: name in chosen)


def _torchao_nvfp4(model: nn.Module, names: list[str]) -> None:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    chosen = set(names)
    quantize_(model, NVFP4WeightOnlyConfig(), lambda _, name: name in chosen)


def _hqq(model: nn.Module, names: list[str], bits: int, group: int) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name in names:
        config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
        linear = model.get_submodule(name)
        model.set_submodule(name, HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu"))


def _bitsandbytes(model: nn.Module, names: list[str], kind: str, double: bool) -> None:
    import bitsandbytes as bnb

    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach()
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, weight.dtype)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type=kind)
        new.bias = linear.bias
        model.set_submodule(name, new.to("cpu"))


def _quanto(model: nn.Module, names: list[str], kind: str) -> None:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, kind), include=names)
    quanto.freeze(model)
    for name in names:
        # On a CPU it multiplies by the dequantized weight, and does so in no inference mode.
        module = model.get_submodule(name)
        weight, n, k = module.weight.dequantize(), *module.weight.shape
        plain = nn.Linear(k, n, module.bias is not None, dtype=weight.dtype)
        plain.weight, plain.bias = nn.Parameter(weight.detach(), requires_grad=False), module.bias
        model.set_submodule(name, plain)


# 16-bit scales and zero points of hqq and quanto, 16-bit scales and 8-bit zero points of torchao's IntxWeightOnly, fp32
# absmax of bitsandbytes (8 bits and a 32-bit scale per 256 of them where they are quantized too).
VARIANTS = (
    Variant("torchao", "int8", "int8wo", 8.0, partial(_torchao, config="Int8WeightOnlyConfig")),
    Variant("torchao", "int8 dynamic", "int8dq", 8.0, partial(
        _torchao, config="Int8DynamicActivationInt8WeightConfig")),
    Variant("torchao", "float8", "float8wo", 8.0, partial(_torchao, config="Float8WeightOnlyConfig")),
    Variant("torchao", "int4 g64", "int4wo-64", 4.375, partial(
        _torchao, config="IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=64, asymmetric=True)),
    Variant("torchao", "int4 g64 hqq", "int4wo-64", 4.375, partial(
        _torchao, config="IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=64,
        intx_choose_qparams_algorithm="hqq_scale_only")),
    Variant("torchao", "int3 g64", "int3wo-64-asym", 3.375, partial(
        _torchao, config="IntxWeightOnlyConfig", weight_dtype=torch.int3, granularity=64, asymmetric=True)),
    Variant("torchao", "nvfp4", "nvfp4wo", 4.5, _torchao_nvfp4),
    Variant("hqq", "8 bits g64", "int8wo-64", 8.5, partial(_hqq, bits=8, group=64)),
    Variant("hqq", "4 bits g64", "int4wo-64", 4.5, partial(_hqq, bits=4, group=64)),
    Variant("hqq", "3 bits g64", "int3wo-64-asym", 3.5, partial(_hqq, bits=3, group=64)),
    Variant("hqq", "2 bits g64", "int2wo-64-asym", 2.5, partial(_hqq, bits=2, group=64)),
    Variant("bitsandbytes", "nf4", "nf4wo-64", 4.5, partial(_bitsandbytes, kind="nf4", double=False)),
    Variant("bitsandbytes", "nf4 double", "nf4wo-64-dq", 4.127, partial(_bitsandbytes, kind="nf4", double=True)),
    Variant("optimum-quanto", "qint8", "int8wo", 8.0, partial(_quanto, kind="qint8")),
    Variant("optimum-quanto", "qfloat8", "float8wo", 8.0, partial(_quanto, kind="qfloat8")),
    Variant("optimum-quanto", "qint4 g96", "int4wo-96", 4.333, partial(_quanto, kind="qint4")),
    Variant("optimum-quanto", "qint2 g96", "int2wo-96-asym", 2.333, partial(_quanto, kind="qint2")),
)  # fmt: skip
