"""Other libraries in the same benchmark: for each, how its users would run a scheme.

An adapter gets a scheme and returns a *maker*, which turns a bf16 weight into a function of `x (M, K)` (one copy of
the layer in that library's form), or it says why the library has no such thing. Libraries are imported inside their
adapter. Nothing is caught here: what one raises is its result in the benchmark.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.configs import Scheme
from lowbit.errors import see
from lowbit.formats.codebook import TableFormat
from lowbit.formats.fp8 import Float8Format
from lowbit.formats.int import IntFormat
from lowbit.formats.mx import MXFormat
from lowbit.formats.nvfp4 import NVFP4Format
from lowbit.granularity import PerBlock, PerGroup, PerRow, PerTensor

Function = Callable[[Tensor], Any]
Maker = Callable[[Tensor], Function]


class NoCounterpart(NotImplementedError):
    """A library has nothing for a scheme, or nothing that is known here."""


@dataclass(frozen=True)
class Peer:
    """A library to compare with.

    Attributes:
        name: what tables call it.
        module: what `import` needs, to know whether it is there.
        packages: distributions whose versions belong to a result.
        adapter: the scheme's maker.

    Raises (adapter):
        NoCounterpart: with the reason.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    adapter: Callable[[Scheme], Maker]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    def versions(self) -> dict[str, str]:
        """Of its packages that are installed."""
        found = {}
        for package in self.packages:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found


def choose_peers(names: list[str] | None, known: tuple[Peer, ...] | None = None) -> tuple[list[Peer], list[str]]:
    """The peers asked for, and the names of those that were not asked for by name and are not installed.

    Args:
        names: of peers; None for all that are installed, `["none"]` for none.

    Raises:
        ValueError: a name is unknown, or its library is not installed.
    """
    table = {p.name: p for p in known or PEERS}
    if names is None:
        return [p for p in table.values() if p.installed], [p.name for p in table.values() if not p.installed]
    if names == ["none"]:
        return [], []
    if unknown := [n for n in names if n not in table]:
        raise ValueError(f"--peers {', '.join(unknown)}: known are {', '.join(table)} and none" + see("bad-option"))
    if missing := [table[n].packages[0] for n in names if not table[n].installed]:
        raise ValueError(
            f"--peers: not installed: {', '.join(missing)}; pip install {' '.join(missing)}, or leave them out"
            + see("missing-package")
        )
    return [table[n] for n in dict.fromkeys(names)], []


def _none(library: str, scheme: Scheme) -> NoCounterpart:
    return NoCounterpart(f"{library} has nothing for {scheme.spec} that is known here")


def _layer(w: Tensor) -> nn.Linear:
    """A plain layer around `w`, not a copy of it."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


# torchao -----------------------------------------------------------------------------------------


def torchao(scheme: Scheme) -> Maker:
    """Its config for the scheme under `torch.compile`, with the compiler settings that the config itself asks for."""
    config = _torchao_config(scheme)
    from torchao.quantization import quantize_

    # One function for all copies: a compiled graph takes the weight as an input. The compiler keeps its graphs by the
    # function's code, gives up silently after a few and then runs eagerly, which would be timed as torchao's speed.
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    compiled = torch.compile(linear, dynamic=False)

    def make(w: Tensor) -> Function:
        layer = _layer(w)
        quantize_(layer, config)
        weight = layer.weight
        if type(weight) in (Tensor, nn.Parameter):
            raise RuntimeError(f"torchao left the weight {tuple(w.shape)} as it was, and said so only in its log")
        return lambda x: compiled(x, weight)

    return make


def _torchao_config(scheme: Scheme) -> Any:
    import torchao.quantization as q
    from torchao.quantization import granularity as g

    sizes = {PerRow: lambda _: g.PerRow(), PerTensor: lambda _: g.PerTensor(),
             PerGroup: lambda own: g.PerGroup(own.group_size)}  # fmt: skip
    fmt = scheme.weight
    own = getattr(fmt, "granularity", None)
    size = sizes[type(own)](own) if type(own) in sizes else None  # type: ignore[no-untyped-call]
    coarse = isinstance(own, (PerRow, PerTensor))
    weight, operand = fmt.spec, scheme.act.spec if scheme.act else ""
    if isinstance(fmt, IntFormat):
        if fmt.bits == 8 and fmt.symmetric and size is not None:
            if not operand:
                return q.Int8WeightOnlyConfig(granularity=size)
            if operand == weight and coarse:
                return q.Int8DynamicActivationInt8WeightConfig(granularity=size)
        if fmt.bits == 4 and isinstance(own, PerGroup):
            if not operand:
                return q.Int4WeightOnlyConfig(group_size=own.group_size)
            if operand == "float8_e4m3:row" and own.group_size == 128 and fmt.symmetric:
                return q.Float8DynamicActivationInt4WeightConfig()
    if isinstance(fmt, Float8Format) and fmt.variant == "float8_e4m3":
        if not operand and size is not None:
            return q.Float8WeightOnlyConfig(granularity=size)
        if operand == weight and coarse:
            return q.Float8DynamicActivationFloat8WeightConfig(granularity=size)
        if (weight, operand) == ("float8_e4m3:b128x128", "float8_e4m3:g128"):
            blocks = [g.PerBlock([1, 128]), g.PerBlock([128, 128])]
            return q.Float8DynamicActivationFloat8WeightConfig(granularity=blocks)
    if isinstance(fmt, (MXFormat, NVFP4Format)):
        from torchao.prototype import mx_formats as mx

        if weight == "nvfp4" and operand in ("", "nvfp4"):
            return mx.NVFP4DynamicActivationNVFP4WeightConfig() if operand else mx.NVFP4WeightOnlyConfig()
        dtypes = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}
        variant = weight.removesuffix(":rceil")
        if variant in dtypes and operand == weight:
            dtype = dtypes[variant]
            return mx.MXDynamicActivationMXWeightConfig(activation_dtype=dtype, weight_dtype=dtype)
    raise _none("torchao", scheme)


# gemlite -----------------------------------------------------------------------------------------


def gemlite(scheme: Scheme) -> Maker:
    """Its helper for the scheme; integers below 8 bits get lowbit's own codes, in its form (code - zero) * scale."""
    from gemlite import helper

    fmt, operand, bf16 = scheme.weight, scheme.act.spec if scheme.act else "", torch.bfloat16
    whole = {
        ("int8:row", ""): "A16W8_INT8",
        ("float8_e4m3:row", ""): "A16W8_FP8",
        ("int8:row", "int8:row"): "A8W8_int8_dynamic",
        ("float8_e4m3:row", "float8_e4m3:row"): "A8W8_fp8_dynamic",
        ("mxfp8_e4m3", ""): "A16W8_MXFP",
        ("mxfp4", ""): "A16W4_MXFP",
        ("nvfp4", ""): "A16W4_NVFP",
        ("mxfp8_e4m3", "mxfp8_e4m3"): "A8W8_MXFP_dynamic",
        ("mxfp4", "mxfp8_e4m3"): "A8W4_MXFP_dynamic",
        ("mxfp4", "mxfp4"): "A4W4_MXFP_dynamic",
        ("nvfp4", "nvfp4"): "A4W4_NVFP_dynamic",
    }
    if name := whole.get((fmt.spec, operand)):
        processor = getattr(helper, name)
        return lambda w: _called(processor(device=str(w.device), dtype=bf16).from_linear(_layer(w), del_orig=False))
    if isinstance(fmt, IntFormat) and fmt.bits in (1, 2, 4) and isinstance(fmt.granularity, PerGroup):
        quantized = {"": f"A16W{fmt.bits}_HQQ_INT", "float8_e4m3:row": f"A8W{fmt.bits}_HQQ_INT_dynamic"}
        processor = getattr(helper, quantized.get(operand, ""), None)
        if processor is not None:
            codes = fmt

            def make(w: Tensor) -> Function:
                levels, scale, zero = unsigned_codes(codes, w)
                return _called(processor(device=str(w.device), dtype=bf16).from_weights(levels, scale, zero))

            return make
    raise _none("gemlite", scheme)


def _called(layer: Any) -> Function:
    return lambda x: layer(x)


def unsigned_codes(fmt: IntFormat, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lowbit's quantization of `w` as codes from 0 (uint8), scale and zero point (bf16), `w ~ (code - zero) * scale`.

    The same numbers in another form: the two libraries multiply the same weights.
    """
    params, element = fmt.choose_params(w), fmt.element
    scale = params["scale"].to(torch.bfloat16) * element.step
    zero = params.get("zero_point", torch.full_like(scale, element.offset / element.step))
    return fmt.encode(w.float(), params).to(torch.uint8), scale, zero.to(torch.bfloat16)


# humming -----------------------------------------------------------------------------------------


def humming(scheme: Scheme) -> Maker:
    """Its layer, quantized by itself. It compiles for each scheme and range of M when it is first called."""
    weight, inputs = humming_configs(scheme)
    from humming.layer import HummingLayer

    def make(w: Tensor) -> Function:
        layer = HummingLayer(
            shape_n=w.shape[0], shape_k=w.shape[1], weight_config=dict(weight), input_config=dict(inputs),
            torch_dtype=torch.bfloat16,
        ).to(w.device)  # fmt: skip
        layer.load_from_unquantized(w)
        layer.transform()
        return _called(layer)

    return make


def humming_configs(scheme: Scheme) -> tuple[dict[str, Any], dict[str, Any]]:
    """What its layer is told about the weight and about the input."""
    inputs: dict[str, dict[str, Any]] = {
        "": {},
        "int8:row": {"dtype": "int8"},
        "float8_e4m3:row": {"dtype": "float8e4m3"},
        "float8_e4m3:g128": {"dtype": "float8e4m3", "group_size": 128},
    }
    fmt, operand = scheme.weight, scheme.act.spec if scheme.act else ""
    if operand not in inputs:
        raise _none("humming", scheme)
    own, weight = getattr(fmt, "granularity", None), {}
    if isinstance(fmt, (IntFormat, Float8Format)):
        if isinstance(fmt, IntFormat):
            weight = {"dtype": f"int{fmt.bits}", "has_zero_point": not fmt.symmetric}
        else:
            weight = {"dtype": fmt.variant.replace("_", "")}
        if isinstance(own, PerGroup):
            weight |= {"group_size": own.group_size}
        elif isinstance(own, PerBlock) and isinstance(fmt, Float8Format):
            weight |= {"group_size_n": own.block_size[0], "group_size": own.block_size[1]}
        elif not isinstance(own, PerRow):
            raise _none("humming", scheme)
    elif isinstance(fmt, (MXFormat, NVFP4Format)):
        e = fmt.element
        weight = {"dtype": f"float{e.bits}e{e.exponent_bits}m{e.mantissa_bits}"}
        if isinstance(fmt, MXFormat):
            weight |= {"group_size": 32, "scale_dtype": "float8e8m0"}
        else:
            weight |= {"group_size": 16, "scale_dtype": "float8e4m3", "scale_2_type": "tensor"}
    else:
        raise _none("humming", scheme)
    return weight, inputs[operand]


# bitsandbytes ------------------------------------------------------------------------------------


def bitsandbytes(scheme: Scheme) -> Maker:
    """Its 4-bit tables. Its int8 layers round activations to fp16 first and are left out."""
    table = scheme.weight
    if not isinstance(table, TableFormat) or scheme.act is not None:
        raise _none("bitsandbytes", scheme)
    import bitsandbytes as bnb

    def make(w: Tensor) -> Function:
        packed, state = bnb.functional.quantize_4bit(
            w, blocksize=table.group_size, quant_type=table.variant, compress_statistics=table.double_quant
        )
        return lambda x: bnb.matmul_4bit(x, packed, quant_state=state)

    return make


PEERS: tuple[Peer, ...] = (
    Peer("torchao", "torchao", ("torchao", "mslk-cuda", "mslk"), torchao),
    Peer("gemlite", "gemlite", ("gemlite",), gemlite),
    Peer("humming", "humming", ("humming-kernels",), humming),
    Peer("bitsandbytes", "bitsandbytes", ("bitsandbytes",), bitsandbytes),
)
