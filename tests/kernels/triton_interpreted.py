"""Run by test_triton_interpret.py with TRITON_INTERPRET=1: the kernels themselves, on the CPU, against the definitions.

The interpreter computes bf16 products and roundings wrongly, so operands are fp32 and fp16 and scales fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import KINDS, sqnr_db, weights

from lowbit.formats import parse_format
from lowbit.formats.activation import parse_activation
from lowbit.kernels.triton import act_quant, dequant, scaled_mm, weight_only

FORMATS = (
    "int4:g128", "int3:g64", "int2:g32:asym", "int1:g64:asym", "int8:row", "int8:b128x128", "int7:row", "nf4:g64:dq",
    "codebook4v2:g64", "mxfp4", "mxfp6_e3m2", "mxfp8_e4m3", "nvfp4", "float8_e4m3:b128x128", "float8_e5m2:tensor",
)  # fmt: skip
ACTIVATIONS = (
    "float8_e4m3:row", "float8_e5m2:row", "float8_e4m3:tensor", "int8:row", "int8:row:asym", "int8:tensor@static",
    "float8_e4m3:g128", "int8:g32:fp32", "mxfp8_e4m3", "mxfp6_e2m3:rceil", "mxfp4", "nvfp4", "nvfp4@static",
)  # fmt: skip


def check_weights(spec: str) -> None:
    """Dequantization to the bit; products in fp32 and fp16, with and without a split of K."""
    fmt, n, k, m = parse_format(spec), 70, 300, 5
    planes = fmt.quantize(weights("zeros", n, k))
    dense = fmt.dequantize(planes, n, k)
    assert torch.equal(dequant.dequantize_into(torch.full((n, k), 7.0), planes, fmt, k, (0, n), (0, k)), dense)
    part = dequant.dequantize_into(torch.full((33, 108), 7.0), planes, fmt, k, (37, 70), (192, 300))
    assert torch.equal(part, dense[37:, 192:])
    for dtype, limit in ((torch.float32, 120), (torch.float16, 60)):
        x, bias = weights("normal", m, k, seed=1).to(dtype), torch.linspace(-1, 1, n)
        reference = x.double() @ dense.double().T + bias
        for config in (None, weight_only.Config(16, 64, 64, 4, 2, 2)):
            y = weight_only.matmul(x, planes, fmt, n, bias, torch.float32, config=config)
            assert sqnr_db(reference, y) > limit, f"{dtype} {config}: {sqnr_db(reference, y):.1f} dB"


def check_activation(spec: str) -> None:
    """Operand and scales equal those of `Activation.split`."""
    act = parse_activation(spec)
    assert act is not None
    static = torch.full((1, 1), 0.0021) if act.static else None
    for kind in KINDS:
        x = weights(kind, 3, 2100)
        operand, scale = act.split(x, static)
        got = act_quant.quantize(x, act, static, torch.float32)
        assert got is not None, "no fused kernel"
        assert torch.equal(got[0], operand.float()), f"{kind}: operands"
        assert torch.equal(got[1], scale), f"{kind}: scales"


def check_int8(spec: str) -> None:
    fmt, m, n, k = parse_format(spec), 17, 70, 300
    x, w = fmt.quantize(weights("normal", m, k)), fmt.quantize(weights("normal", n, k, seed=1))
    y = scaled_mm.matmul(x["qdata"], x["scale"], w["qdata"], w["scale"], None, torch.float32)
    reference = fmt.dequantize(x, m, k).double() @ fmt.dequantize(w, n, k).double().T
    assert sqnr_db(reference, y) > 120


def main() -> int:
    failures = 0
    groups: list[tuple[Callable[[str], None], tuple[str, ...]]] = [
        (check_weights, FORMATS), (check_activation, ACTIVATIONS), (check_int8, ("int8:row", "int8:tensor")),
    ]  # fmt: skip
    for check, specs in groups:
        for spec in specs:
            try:
                check(spec)
            except AssertionError as error:
                failures += 1
                print(f"{check.__name__} {spec}: {error}")
    return failures


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
