"""Configs: torchao's names and defaults, short names that round-trip, schemes that say what they should."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import lowbit
from lowbit import configs, parse_config, quantize_
from lowbit.configs import Config
from lowbit.formats import registered
from lowbit.specs import EXAMPLES

NAMED = [getattr(configs, n) for n in dir(configs) if n.endswith("Config") and n not in ("Config", "FormatConfig")]


def test_the_public_names_are_all_there() -> None:
    for name in (
        "Float8DynamicActivationFloat8WeightConfig", "Float8StaticActivationFloat8WeightConfig",
        "Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Int8StaticActivationInt8WeightConfig",
        "Int8WeightOnlyConfig", "Int4WeightOnlyConfig", "Float8DynamicActivationInt4WeightConfig",
        "Int8DynamicActivationInt4WeightConfig", "IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig",
        "MXDynamicActivationMXWeightConfig", "MXWeightOnlyConfig", "NVFP4WeightOnlyConfig",
        "NVFP4DynamicActivationNVFP4WeightConfig", "NF4WeightOnlyConfig", "CodebookWeightOnlyConfig",
    ):  # fmt: skip
        assert name in lowbit.__all__
        assert isinstance(getattr(lowbit, name)(), Config)


@pytest.mark.parametrize("spec", EXAMPLES)
def test_short_names_round_trip(spec: str) -> None:
    config = parse_config(spec)
    assert config.spec == spec
    assert parse_config(config.scheme.spec).scheme == config.scheme


@pytest.mark.parametrize("cls", NAMED, ids=lambda c: c.__name__)
def test_defaults_round_trip_and_hash(cls: type[Config]) -> None:
    config = cls()
    assert parse_config(config.spec).scheme == config.scheme  # IntxWeightOnlyConfig of 8 bits is int8:row
    assert hash(config) == hash(cls())
    assert dataclasses.is_dataclass(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.nothing = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("fmt", registered(), ids=str)
def test_every_format_is_a_config(fmt: lowbit.formats.Format) -> None:  # type: ignore[name-defined]
    assert parse_config(fmt.spec).scheme.weight == fmt
    assert parse_config(f"int8:row->{fmt.spec}").scheme.spec == f"int8:row->{fmt.spec}"


@pytest.mark.parametrize(
    "spec", ["int9wo", "int4wo-", "float8", "", "int4:g0", "int4:g128:what", "int8:row@often->int8:row"]
)
def test_unknown_names_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"unknown|known|at least"):
        parse_config(spec)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lowbit.Float8DynamicActivationFloat8WeightConfig(lowbit.PerGroup(32)),
        lambda: lowbit.IntxWeightOnlyConfig(torch.float32).scheme,
        lambda: lowbit.Float8WeightOnlyConfig(torch.int8).scheme,
        lambda: lowbit.PerAxis(1),
        lambda: lowbit.PerGroup(0),
        lambda: lowbit.PerBlock((0, 128)),
        lambda: lowbit.CodebookWeightOnlyConfig(bits=5).scheme,
        lambda: parse_config("float8_e4m3:row@static->float8_e4m3:row"),
    ],
)
def test_bad_options_are_value_errors(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="got"):
        make()


@pytest.mark.parametrize("spec", EXAMPLES)
def test_every_config_runs_on_the_cpu(spec: str) -> None:
    """The quantized layer is close to the float one, as close as its report says within the activation's own noise."""
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(192, 64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 192, generator=g) * 0.05)
    x = torch.randn(9, 192, generator=g)
    y = layer(x)
    statistics = lowbit.calibrate(nn.Sequential(layer), [x])
    report = quantize_(nn.Sequential(layer), spec, calibration=statistics)
    assert report.worst is not None
    assert report.worst.sqnr_db is not None
    noise = layer(x) - y
    sqnr = float(10 * torch.log10(y.detach().square().sum() / noise.detach().square().sum()))
    assert sqnr > min(report.worst.sqnr_db, 12.0) - 4
    assert parse_config(spec).supported("cpu")
    assert not parse_config(spec).supported("mps")
