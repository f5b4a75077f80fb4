"""Times activation quantization, alone and together with what stands before it, against the memory's own speed.

    python benchmarks/act_quant.py --out benchmarks/results/NAME.json

Every row is one kernel for one width and number of tokens: its time, the time of the same work in two kernels, of
reading as many bytes as it moves, and of copying half as many (which moves them too). What is quantized as it comes is
timed in Triton beside that, which another kernel may have taken it from. Inputs rotate through more than the L2 cache
where they are large enough; those of few tokens stay in it, as they would in a model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases import write
from torch import Tensor

from lowbit import decoder_ops, operand_ops
from lowbit.formats.activation import Activation, parse_activation
from lowbit.kernels.problem import early_launches
from lowbit.kernels.triton import row_quant
from lowbit.kernels.triton.act_rules import rule_of
from lowbit.tools.timing import copies_for, floor_us, median_us

SOURCES = ("quantized", "relu_quantized", "silu_mul_quantized", "rms_norm_quantized", "add_rms_norm_quantized")
#: What an op reads and writes beside the operand: tensors of 16-bit numbers as wide as it.
PASSED = {"quantized": 1, "relu_quantized": 1, "silu_mul_quantized": 2, "rms_norm_quantized": 1,
          "add_rms_norm_quantized": 3}  # fmt: skip
Op = Callable[..., Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--acts", default="float8_e4m3:row,int8:row,int8:row:asym,float8_e4m3:g128,mxfp8_e4m3")
    parser.add_argument("--widths", default="4096,14336")
    parser.add_argument("--tokens", default="1,16,1024,4096")
    return parser.parse_args()


def given(name: str, m: int, k: int) -> tuple[Any, ...]:
    """One copy of an op's inputs."""

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)

    x = normal(m, 2 * k if "silu" in name else k)
    y = (normal(m, k),) if "add" in name else ()
    return (x, *y, normal(1, k)[0], 1e-5) if "norm" in name else (x,)


def before(name: str, args: tuple[Any, ...]) -> Tensor:
    """What is quantized, by a kernel of its own."""
    if name == "quantized":
        return args[0]
    if name == "relu_quantized":
        return args[0].relu()
    result = getattr(decoder_ops, name.removesuffix("_quantized"))(*args)
    return result[1] if isinstance(result, tuple) else result


def in_two(name: str, args: tuple[Any, ...], spec: str, dtype: torch.dtype) -> Any:
    return operand_ops.quantized(before(name, args), None, spec, dtype)


def in_triton(x: Tensor, act: Activation, dtype: torch.dtype) -> Any:
    """`quantized` by the Triton kernel, whatever the op's own choice; started early in a graph, as the other is."""
    rule = rule_of(act.format)
    assert rule is not None, act
    with early_launches():
        return row_quant.launch(row_quant.Source("plain", x), rule, None, dtype, rule.scaling == "mx")


def copy_us(nbytes: int) -> float:
    """Of a copy that reads half of the bytes and writes the other half."""
    half = max(1, nbytes // 2)
    sources = [torch.randint(9, (half,), dtype=torch.uint8, device="cuda") for _ in range(copies_for(nbytes))]
    targets = [torch.empty_like(s) for s in sources]
    return median_us([partial(t.copy_, s) for t, s in zip(targets, sources, strict=True)])


def row_of(name: str, spec: str, k: int, m: int) -> dict[str, Any]:
    act = parse_activation(spec)
    assert act is not None
    # What layers take: codes of 8 bits without zero points, else levels in bf16.
    plain = act.format.element.bits == 8 and not act.format.has("zero_point") and not spec.startswith("mx")
    dtype = act.format.planes[0].dtype if plain else torch.bfloat16
    nbytes = m * k * (2 * PASSED[name] + dtype.itemsize)
    copies = [given(name, m, k) for _ in range(copies_for(nbytes))]
    op: Op = getattr(operand_ops, name)
    us = median_us([partial(op, *args, None, spec, dtype) for args in copies])
    apart = median_us([partial(in_two, name, args, spec, dtype) for args in copies])
    triton = median_us([partial(in_triton, *args, act, dtype) for args in copies]) if name == "quantized" else None
    read, copy = floor_us(nbytes), copy_us(nbytes)
    return {
        "op": name, "act": spec, "k": k, "m": m, "bytes": nbytes, "us": us, "triton_us": triton,
        "apart_us": apart, "read_us": read,
        "copy_us": copy, "gb_s": nbytes / us / 1e3, "share_of_read": read / us, "share_of_copy": copy / us,
    }  # fmt: skip


def main() -> int:
    args = arguments()
    started, rows = time.monotonic(), list[dict[str, Any]]()
    print(
        f"{'op':<24} {'act':<18} {'K':>6} {'M':>5} {'us':>8} {'triton':>8} {'apart':>8} {'read':>8} {'copy':>8} "
        f"{'GB/s':>6} of copy"
    )
    todo = product(args.sources.split(","), args.acts.split(","), args.widths.split(","), args.tokens.split(","))
    for name, spec, k, m in todo:
        if time.monotonic() - started > args.seconds:
            print(f"out of time: {name} {spec} K = {k} M = {m} and what follows are left out")
            break
        r = row_of(name, spec, int(k), int(m))
        rows.append(r)
        triton = "" if r["triton_us"] is None else f"{r['triton_us']:.2f}"
        print(f"{name:<24} {spec:<18} {k:>6} {m:>5} {r['us']:8.2f} {triton:>8} {r['apart_us']:8.2f} "
              f"{r['read_us']:8.2f} {r['copy_us']:8.2f} {r['gb_s']:6.0f} {100 * r['share_of_copy']:5.0f} %",
              flush=True)  # fmt: skip
    write(args.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
