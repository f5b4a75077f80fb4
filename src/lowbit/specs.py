"""Short names of configs for the command line and rules: `int4wo-128`, `float8dq-row`, `int8dq-int4-32`."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from lowbit.configs import (
    MX_WORDS,
    CodebookWeightOnlyConfig,
    Config,
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Float8StaticActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FormatConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MXDynamicActivationMXWeightConfig,
    MXWeightOnlyConfig,
    NF4WeightOnlyConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
)
from lowbit.errors import see
from lowbit.formats.activation import parse_activation
from lowbit.formats.base import families, parse_format
from lowbit.granularity import Granularity, PerBlock, PerGroup, PerRow, PerTensor


def _granularity(word: str | None, default: Granularity) -> Granularity:
    named: dict[str, Granularity] = {"": default, "row": PerRow(), "tensor": PerTensor(), "block": PerBlock()}
    word = word or ""
    return named[word] if word in named else PerGroup(int(word))


def _int_dtype(bits: str) -> torch.dtype:
    return getattr(torch, f"int{bits}")  # type: ignore[no-any-return]


_G = r"(?:-(row|tensor|block|\d+))?"
_PATTERNS: tuple[tuple[str, Callable[..., Config]], ...] = (
    (rf"float8wo{_G}(-e5m2)?", lambda g, e: Float8WeightOnlyConfig(
        torch.float8_e5m2 if e else torch.float8_e4m3fn, _granularity(g, PerRow()))),
    (r"float8dq(?:-(row|tensor|block))?", lambda g: Float8DynamicActivationFloat8WeightConfig(
        _granularity(g, PerTensor()))),
    (r"float8sq(?:-(row))?", lambda g: Float8StaticActivationFloat8WeightConfig(
        granularity=_granularity(g, PerTensor()))),  # type: ignore[arg-type]
    (r"float8dq-int4(?:-(\d+))?", lambda g: Float8DynamicActivationInt4WeightConfig(int(g or 128))),
    (rf"int8wo{_G}", lambda g: Int8WeightOnlyConfig(_granularity(g, PerRow()))),
    (r"int8dq(?:-(tensor|row))?(-asym)?", lambda g, a: Int8DynamicActivationInt8WeightConfig(
        _granularity(g, PerRow()), not a)),  # type: ignore[arg-type]
    (r"int8sq(?:-(tensor|row))?", lambda g: Int8StaticActivationInt8WeightConfig(
        granularity=_granularity(g, PerRow()))),  # type: ignore[arg-type]
    (r"int4wo(?:-(\d+))?(-sym)?", lambda g, s: Int4WeightOnlyConfig(int(g or 128), bool(s))),
    (rf"int([1235-7])wo{_G}(-asym)?", lambda b, g, a: IntxWeightOnlyConfig(
        _int_dtype(b), _granularity(g, PerRow()), not a)),
    (r"int8dq-int4(?:-(\d+))?(-sym)?", lambda g, s: Int8DynamicActivationInt4WeightConfig(int(g or 32), bool(s))),
    (rf"int8dq-int([1-8]){_G}(-sym)?", lambda b, g, s: Int8DynamicActivationIntxWeightConfig(
        _int_dtype(b), _granularity(g, PerRow()), bool(s))),
    (rf"({'|'.join(MX_WORDS)})wo(?:-(floor|rceil))?", lambda n, s: MXWeightOnlyConfig(
        MX_WORDS[n], s or "floor")),  # type: ignore[arg-type]
    (rf"({'|'.join(MX_WORDS)})dq(?:-(floor|rceil))?", lambda n, s: MXDynamicActivationMXWeightConfig(
        MX_WORDS[n], MX_WORDS[n], s or "floor")),  # type: ignore[arg-type]
    (r"nvfp4wo", NVFP4WeightOnlyConfig),
    (r"nvfp4dq", NVFP4DynamicActivationNVFP4WeightConfig),
    (r"nvfp4sq", lambda: NVFP4DynamicActivationNVFP4WeightConfig(static_global_scale=True)),
    (r"nf4wo(?:-(\d+))?(-dq)?", lambda g, d: NF4WeightOnlyConfig(int(g or 64), bool(d))),
    (r"codebook(\d)(?:v(\d))?wo(?:-(\d+))?", lambda b, v, g: CodebookWeightOnlyConfig(
        int(b), int(g or 64), int(v or 1))),
)  # fmt: skip

#: One config per short name that `doctor`, the demo and the tests iterate over.
EXAMPLES = (
    "float8wo", "float8wo-tensor", "float8wo-128", "float8wo-block", "float8wo-e5m2", "float8dq", "float8dq-row",
    "float8dq-block", "float8sq", "int8wo", "int8wo-128", "int8dq", "int8dq-asym", "int8sq", "int4wo-256",
    "int4wo-128", "int4wo-64", "int4wo-32", "int4wo-128-sym", "int1wo-64", "int2wo-32-asym", "int3wo-64", "int5wo",
    "int6wo-128", "int7wo", "float8dq-int4-128", "int8dq-int4-32", "int8dq-int3-32", "mxfp8wo", "mxfp6wo", "mxfp4wo",
    "mxfp4wo-rceil", "mxfp8dq", "mxfp6dq", "mxfp4dq", "nvfp4wo", "nvfp4dq", "nvfp4sq", "nf4wo-64", "nf4wo-64-dq",
    "codebook4wo-64", "codebook4v2wo-64",
)  # fmt: skip


def parse_config(spec: str) -> Config:
    """The config that a short name or a format spec stands for.

    Raises:
        ValueError: neither; the message shows names that exist.
    """
    for pattern, build in _PATTERNS:
        match = re.fullmatch(pattern, spec)
        if match:
            return build(*match.groups())
    act, _, weight = spec.rpartition("->")
    if weight.split(":")[0] in families():
        config = FormatConfig(weight, act)
        parse_format(weight), parse_activation(act)  # a bad option is reported here, not at the first use
        return config
    raise ValueError(
        f"unknown config {spec!r}; examples: {', '.join(EXAMPLES)}; or a format such as 'int4:g128:asym'"
        + see("unknown-config")
    )
