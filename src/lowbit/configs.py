"""The configs users know: torchao's names and defaults, one small frozen dataclass each.

A config says *what* a linear layer becomes: a weight format and, for W8A8-like schemes, how its input is quantized.
Each has a short name (`spec`), which `lowbit.parse_config` of specs.py turns back into it; every format spec is a
config too (`parse_config("int4:g128:asym")`, `parse_config("int8:row->int4:g32")`, activation first).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from lowbit.errors import see
from lowbit.formats.activation import Activation, parse_activation
from lowbit.formats.base import Format, parse_format
from lowbit.formats.codebook import CodebookFormat, TableFormat
from lowbit.formats.fp8 import Float8Format
from lowbit.formats.int import IntFormat
from lowbit.formats.mx import MXFormat
from lowbit.formats.nvfp4 import NVFP4Format
from lowbit.granularity import Granularity, PerBlock, PerGroup, PerRow, PerTensor


class Scheme(NamedTuple):
    """What a layer becomes: its weight's format and its input's quantization (None: weight-only)."""

    weight: Format
    act: Activation | None = None

    @property
    def spec(self) -> str:
        return f"{self.act.spec}->{self.weight.spec}" if self.act else self.weight.spec


class Support(NamedTuple):
    """Whether a scheme runs on a device, and how. True or false like the first field."""

    ok: bool
    how: str

    def __bool__(self) -> bool:
        return self.ok


class Config(ABC):
    """Base of all configs."""

    @property
    @abstractmethod
    def scheme(self) -> Scheme:
        """The weight format and activation that this config stands for."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """Short name; `parse_config(config.spec) == config`."""

    def supported(self, device: str | torch.device = "cuda") -> Support:
        """Whether layers of this config run fused on `device`, and which units multiply.

        Formats whose tensor cores a GPU lacks still run: their operands are exact in bf16.
        """
        device = torch.device(device)
        if device.type == "cpu":
            return Support(True, "fp32 matmul on dequantized blocks of rows")
        if device.type != "cuda":
            return Support(False, f"no kernels for {device.type}")
        if not torch.cuda.is_available():
            return Support(False, "no CUDA GPU is available")
        arch = torch.cuda.get_device_capability(device)
        if arch < (8, 0):
            return Support(False, f"needs compute capability 8.0, this GPU has {arch[0]}.{arch[1]}")
        return Support(True, "weights decoded to bf16 in registers" if self.scheme.act is None else _units(self, arch))


def _units(config: Config, arch: tuple[int, int]) -> str:
    weight, act = config.scheme
    assert act is not None
    same = act.format.element == weight.element and not weight.has("codebook")
    if same and weight.planes[0].dtype == torch.int8:
        return "int8 tensor cores"
    if same and isinstance(weight, Float8Format) and arch >= (8, 9):
        return "float8 tensor cores"
    return "activations quantized exactly, multiplied in bf16, which holds the operands exactly"


@dataclass(frozen=True)
class FormatConfig(Config):
    """Any registered format by its spec, and any activation: what a format without a named config is used through."""

    weight: str
    act: str = ""

    @property
    def scheme(self) -> Scheme:
        return Scheme(parse_format(self.weight), parse_activation(self.act))

    @property
    def spec(self) -> str:
        return self.scheme.spec


def _words(*parts: object) -> str:
    return "-".join(str(p) for p in parts if p not in (None, "", False))


def _float8_name(dtype: torch.dtype) -> str:
    names = {torch.float8_e4m3fn: "float8_e4m3", torch.float8_e5m2: "float8_e5m2"}
    if dtype not in names:
        raise ValueError(f"float8 dtype must be one of {list(names)}, got {dtype}" + see("bad-option"))
    return names[dtype]


def _granularity_word(g: Granularity) -> str:
    """The word for a granularity in a config's short name: nothing for rows, the bare number for groups."""
    if isinstance(g, PerRow):
        return ""
    if isinstance(g, PerBlock):
        return "block" if g == PerBlock() else g.spec
    return str(g.group_size) if isinstance(g, PerGroup) else "tensor"


# float8 ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Float8WeightOnlyConfig(Config):
    """W8A16 with float8 weights. `float8wo`, `float8wo-tensor`, `float8wo-128`, `float8wo-block`, `float8wo-e5m2`."""

    weight_dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Granularity = PerRow()

    @property
    def scheme(self) -> Scheme:
        return Scheme(Float8Format(_float8_name(self.weight_dtype), self.granularity))

    @property
    def spec(self) -> str:
        e5m2 = "e5m2" if self.weight_dtype == torch.float8_e5m2 else ""
        return _words("float8wo", _granularity_word(self.granularity), e5m2)


@dataclass(frozen=True)
class Float8DynamicActivationFloat8WeightConfig(Config):
    """W8A8 in float8 with scales of the activation found while running: per tensor (default), per row, or per block
    (activation 1x128, weight 128x128). `float8dq`, `float8dq-row`, `float8dq-block`."""

    granularity: Granularity = PerTensor()
    activation_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn

    def __post_init__(self) -> None:
        if isinstance(self.granularity, PerGroup):
            raise ValueError(
                f"float8 dynamic granularity is PerTensor, PerRow or PerBlock, got {self.granularity}"
                + see("bad-option")
            )

    @property
    def scheme(self) -> Scheme:
        g = self.granularity
        act = PerGroup(g.block_size[1]) if isinstance(g, PerBlock) else g
        weight = Float8Format(_float8_name(self.weight_dtype), g)
        return Scheme(weight, Activation(Float8Format(_float8_name(self.activation_dtype), act)))

    @property
    def spec(self) -> str:
        if self.activation_dtype != torch.float8_e4m3fn or self.weight_dtype != torch.float8_e4m3fn:
            return self.scheme.spec
        row = "row" if isinstance(self.granularity, PerRow) else ""
        g = _granularity_word(self.granularity)
        return _words("float8dq", row, "" if g == "tensor" else g)


@dataclass(frozen=True)
class Float8StaticActivationFloat8WeightConfig(Config):
    """W8A8 in float8 with a calibrated per-tensor scale of the activation. `float8sq`.

    `scale` (fp32, activation = code * scale) holds for every layer; leave it out to use `quantize_`'s `calibration`.
    """

    scale: float | None = None
    granularity: PerTensor | PerRow = PerTensor()

    @property
    def scheme(self) -> Scheme:
        act = Activation(Float8Format("float8_e4m3", PerTensor()), static=True)
        return Scheme(Float8Format("float8_e4m3", self.granularity), act)

    @property
    def spec(self) -> str:
        return _words("float8sq", "row" if isinstance(self.granularity, PerRow) else "")


# Integers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int8WeightOnlyConfig(Config):
    """W8A16 with int8 weights. `int8wo`, `int8wo-tensor`, `int8wo-128`."""

    granularity: Granularity = PerRow()

    @property
    def scheme(self) -> Scheme:
        return Scheme(IntFormat(8, self.granularity))

    @property
    def spec(self) -> str:
        return _words("int8wo", _granularity_word(self.granularity))


@dataclass(frozen=True)
class Int8DynamicActivationInt8WeightConfig(Config):
    """W8A8 in int8, one scale per token and per output channel. `int8dq`, `int8dq-asym`, `int8dq-tensor`."""

    granularity: PerRow | PerTensor = PerRow()
    act_symmetric: bool = True

    @property
    def scheme(self) -> Scheme:
        act = Activation(IntFormat(8, self.granularity, self.act_symmetric))
        return Scheme(IntFormat(8, self.granularity), act)

    @property
    def spec(self) -> str:
        return _words("int8dq", _granularity_word(self.granularity), "" if self.act_symmetric else "asym")


@dataclass(frozen=True)
class Int8StaticActivationInt8WeightConfig(Config):
    """W8A8 in int8 with a calibrated per-tensor scale of the activation. `int8sq`. `scale` as for float8."""

    scale: float | None = None
    granularity: PerRow | PerTensor = PerRow()

    @property
    def scheme(self) -> Scheme:
        act = Activation(IntFormat(8, PerTensor()), static=True)
        return Scheme(IntFormat(8, self.granularity), act)

    @property
    def spec(self) -> str:
        return _words("int8sq", _granularity_word(self.granularity))


@dataclass(frozen=True)
class Int4WeightOnlyConfig(Config):
    """W4A16 with integer zero points (default) or symmetric. `int4wo-128`, `int4wo-32`, `int4wo-128-sym`."""

    group_size: int = 128
    symmetric: bool = False

    @property
    def scheme(self) -> Scheme:
        return Scheme(IntFormat(4, PerGroup(self.group_size), self.symmetric))

    @property
    def spec(self) -> str:
        return _words("int4wo", self.group_size, "sym" if self.symmetric else "")


@dataclass(frozen=True)
class IntxWeightOnlyConfig(Config):
    """Integers of 1 to 8 bits, for Linear and Conv2d. `weight_dtype` is `torch.int1` ... `torch.int8`.
    `int3wo-64`, `int2wo-32-asym`, `int5wo` (per output channel)."""

    weight_dtype: torch.dtype = torch.int8
    granularity: Granularity = PerRow()
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None

    @property
    def scheme(self) -> Scheme:
        return Scheme(IntFormat(_int_bits(self.weight_dtype), self.granularity, self.symmetric, self.scale_dtype))

    @property
    def spec(self) -> str:
        bits = _int_bits(self.weight_dtype)
        if self.scale_dtype is not None or bits in (4, 8):  # int4wo and int8wo name the configs above
            return self.scheme.spec
        return _words(f"int{bits}wo", _granularity_word(self.granularity), "" if self.symmetric else "asym")


@dataclass(frozen=True)
class Float8DynamicActivationInt4WeightConfig(Config):
    """W4A8: symmetric int4 weights, float8 activations per token. `float8dq-int4-128`."""

    group_size: int = 128

    @property
    def scheme(self) -> Scheme:
        return Scheme(IntFormat(4, PerGroup(self.group_size)), Activation(Float8Format("float8_e4m3", PerRow())))

    @property
    def spec(self) -> str:
        return _words("float8dq-int4", self.group_size)


@dataclass(frozen=True)
class Int8DynamicActivationInt4WeightConfig(Config):
    """W4A8: symmetric int4 weights, asymmetric int8 activations per token. `int8dq-int4-32`."""

    group_size: int = 32
    act_symmetric: bool = False

    @property
    def scheme(self) -> Scheme:
        return Scheme(IntFormat(4, PerGroup(self.group_size)), Activation(IntFormat(8, PerRow(), self.act_symmetric)))

    @property
    def spec(self) -> str:
        return _words("int8dq-int4", self.group_size, "sym" if self.act_symmetric else "")


@dataclass(frozen=True)
class Int8DynamicActivationIntxWeightConfig(Config):
    """WxA8: symmetric integers of 1 to 8 bits, int8 activations per token. `int8dq-int3-32`."""

    weight_dtype: torch.dtype = torch.int8
    weight_granularity: Granularity = PerGroup(32)
    act_symmetric: bool = False

    @property
    def scheme(self) -> Scheme:
        weight = IntFormat(_int_bits(self.weight_dtype), self.weight_granularity)
        return Scheme(weight, Activation(IntFormat(8, PerRow(), self.act_symmetric)))

    @property
    def spec(self) -> str:
        if _int_bits(self.weight_dtype) == 4 and isinstance(self.weight_granularity, PerGroup):
            return self.scheme.spec  # int8dq-int4 names the config above
        bits, g = _int_bits(self.weight_dtype), self.weight_granularity
        return _words(f"int8dq-int{bits}", _granularity_word(g), "sym" if self.act_symmetric else "")


def _int_bits(dtype: torch.dtype) -> int:
    bits = {getattr(torch, f"int{b}"): b for b in range(1, 9)}
    if dtype not in bits:
        raise ValueError(f"weight_dtype must be torch.int1 to torch.int8, got {dtype}" + see("bad-option"))
    return bits[dtype]


# Block-scaled floats -----------------------------------------------------------------------------

MXName = Literal["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"]
MX_WORDS = {
    "mxfp8": "mxfp8_e4m3",
    "mxfp8e5m2": "mxfp8_e5m2",
    "mxfp6": "mxfp6_e2m3",
    "mxfp6e3m2": "mxfp6_e3m2",
    "mxfp4": "mxfp4",
}


def _mx_word(name: str) -> str:
    return next(word for word, full in MX_WORDS.items() if full == name)


@dataclass(frozen=True)
class MXWeightOnlyConfig(Config):
    """OCP MX weights. `mxfp8wo`, `mxfp6wo`, `mxfp4wo`, `mxfp4wo-rceil`."""

    weight_dtype: MXName = "mxfp8_e4m3"
    scaling: Literal["floor", "rceil"] = "floor"

    @property
    def scheme(self) -> Scheme:
        return Scheme(MXFormat(self.weight_dtype, self.scaling))

    @property
    def spec(self) -> str:
        return _words(f"{_mx_word(self.weight_dtype)}wo", "" if self.scaling == "floor" else self.scaling)


@dataclass(frozen=True)
class MXDynamicActivationMXWeightConfig(Config):
    """OCP MX weights and activations. `mxfp8dq`, `mxfp6dq`, `mxfp4dq`, `mxfp8dq-rceil`."""

    activation_dtype: MXName = "mxfp8_e4m3"
    weight_dtype: MXName = "mxfp8_e4m3"
    scaling: Literal["floor", "rceil"] = "floor"

    @property
    def scheme(self) -> Scheme:
        return Scheme(
            MXFormat(self.weight_dtype, self.scaling), Activation(MXFormat(self.activation_dtype, self.scaling))
        )

    @property
    def spec(self) -> str:
        if self.activation_dtype != self.weight_dtype:
            return self.scheme.spec
        return _words(f"{_mx_word(self.weight_dtype)}dq", "" if self.scaling == "floor" else self.scaling)


@dataclass(frozen=True)
class NVFP4WeightOnlyConfig(Config):
    """NVFP4 weights. `nvfp4wo`."""

    @property
    def scheme(self) -> Scheme:
        return Scheme(NVFP4Format())

    @property
    def spec(self) -> str:
        return "nvfp4wo"


@dataclass(frozen=True)
class NVFP4DynamicActivationNVFP4WeightConfig(Config):
    """NVFP4 weights and activations; the activation's global scale is found while running (`nvfp4dq`) or calibrated
    (`static_global_scale=True`, `nvfp4sq`). Block scales are always dynamic."""

    static_global_scale: bool = False
    scale: float | None = None

    @property
    def scheme(self) -> Scheme:
        return Scheme(NVFP4Format(), Activation(NVFP4Format(), static=self.static_global_scale))

    @property
    def spec(self) -> str:
        return "nvfp4sq" if self.static_global_scale else "nvfp4dq"


# Tables ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NF4WeightOnlyConfig(Config):
    """NormalFloat 4-bit weights of QLoRA. `nf4wo-64`, `nf4wo-64-dq` (double-quantized scales)."""

    group_size: int = 64
    double_quant: bool = False

    @property
    def scheme(self) -> Scheme:
        return Scheme(TableFormat("nf4", self.group_size, self.double_quant))

    @property
    def spec(self) -> str:
        return _words("nf4wo", self.group_size, "dq" if self.double_quant else "")


@dataclass(frozen=True)
class CodebookWeightOnlyConfig(Config):
    """Learned codebooks, of scalars, pairs (`vector=2`) or fours. `codebook4wo-64`, `codebook4v2wo-64`,
    `codebook2v4wo-64`."""

    bits: int = 4
    group_size: int = 64
    vector: int = 1

    @property
    def scheme(self) -> Scheme:
        return Scheme(CodebookFormat(self.bits, self.group_size, self.vector))

    @property
    def spec(self) -> str:
        return _words(f"codebook{self.bits}{f'v{self.vector}' if self.vector > 1 else ''}wo", self.group_size)
