"""Correctness and time of the GPU kernels for layers of Llama-3.1-8B, per format, next to torch's bf16 linear.

    python benchmarks/gpu_smoke.py --out benchmarks/results/NAME.json

Every measurement rotates enough copies of the layer to exceed the L2 cache, runs them in one CUDA graph, and takes
the median over replays; `GB/s` counts the packed weight alone. Where another kernel is chosen for few tokens, the
portable Triton kernel is measured as well. `sqnr_db` compares with fp64 on the dequantized
operands, at 256 output channels. Exits with 1 if a format misses its `kernel_sqnr_db`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lowbit
from lowbit import QuantizedTensor
from lowbit.formats import parse_format
from lowbit.formats.activation import parse_activation
from lowbit.kernels.problem import Problem
from lowbit.kernels.select import select, use_kernel
from lowbit.tools.doctor import sqnr_db
from lowbit.tools.timing import copies_for, median_us

LAYERS = {"gate_up": (28672, 4096), "o": (4096, 4096)}
TOKENS = (1, 16, 128, 1024)
# weight format, activation format
FORMATS = (
    ("int8:row", ""), ("int8:row", "int8:row"), ("float8_e4m3:row", ""), ("float8_e4m3:row", "float8_e4m3:row"),
    ("float8_e4m3:tensor", "float8_e4m3:tensor"), ("float8_e4m3:b128x128", "float8_e4m3:g128"), ("mxfp8_e4m3", ""),
    ("int6:g64:asym", ""), ("int4:g128", ""), ("int4:g32", ""), ("int4:g64:asym", ""), ("int4:g128", "int8:row"),
    ("int3:g64", ""), ("int2:g64", ""), ("int1:g128", ""), ("mxfp4", ""), ("nvfp4", ""), ("nf4:g64", ""),
    ("codebook4:g64", ""), ("codebook4v2:g64", ""),
)  # fmt: skip
FEW_TOKENS, PORTABLE = "cuda_small_m", "triton_weight_only"


def accuracy_db(w: QuantizedTensor, x: torch.Tensor) -> float:
    rows = w[:256]
    assert isinstance(rows, QuantizedTensor)
    a = x if w.act is None else w.act.format.dequantize(w.act.quantize(x, w.act_scale), *x.shape)
    return sqnr_db(a.double() @ rows.dequantize(torch.float32).double().T, F.linear(x, w)[:, :256])


def measure(tokens: tuple[int, ...], formats: tuple[tuple[str, str], ...], budget_s: float) -> list[dict[str, Any]]:
    """One record per layer, format and M, until `budget_s` is spent; what is left out is said."""
    began, records = time.monotonic(), []
    arch = torch.cuda.get_device_capability()
    for layer, (n, k) in LAYERS.items():
        torch.manual_seed(0)
        dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        weights = [dense] + [dense.clone() for _ in range(copies_for(dense.nbytes) - 1)]
        bf16 = {}
        for m in tokens:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            bf16[m] = median_us([lambda w=w, x=x: F.linear(x, w) for w in weights])
            row = {"layer": layer, "n": n, "k": k, "m": m, "weight": "bf16", "act": "", "kernel": "torch"}
            records.append(row | {"us": bf16[m], "gb_s": dense.nbytes / bf16[m] / 1e3, "speedup": 1.0})
        del weights
        for spec, act in formats:
            fmt = parse_format(spec)
            if time.monotonic() - began > budget_s:
                print(f"left out, {budget_s:.0f} s are spent: {layer} {spec} {act}", file=sys.stderr)
                continue
            first = QuantizedTensor.from_float(dense, fmt, parse_activation(act))
            copies = [first] + [first.clone() for _ in range(copies_for(first.nbytes_packed) - 1)]
            for m in tokens:
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                kernels = [select(Problem(m, n, k, spec, act, x.dtype, "cuda", arch)).kernel.name]
                kernels += [PORTABLE] if kernels[0] == FEW_TOKENS else []
                for kernel in kernels:
                    with use_kernel(kernel):
                        us = median_us([lambda w=w, x=x: F.linear(x, w) for w in copies])
                        sqnr = accuracy_db(first, x)
                    row = {"layer": layer, "n": n, "k": k, "m": m, "weight": spec, "act": act, "kernel": kernel}
                    row |= {"us": us, "gb_s": first.nbytes_packed / us / 1e3, "speedup": bf16[m] / us}
                    records.append(row | {"sqnr_db": sqnr, "sqnr_limit_db": fmt.kernel_sqnr_db})
            del copies, first
    return records


def variant(record: dict[str, Any]) -> tuple[str, str, bool]:
    """What shares a line of the table: the formats, and whether it is the kernel for few tokens."""
    return record["weight"], record["act"], record["kernel"] == FEW_TOKENS


def table(records: list[dict[str, Any]], tokens: tuple[int, ...]) -> str:
    lines = []
    for layer in dict.fromkeys(r["layer"] for r in records):
        mine = [r for r in records if r["layer"] == layer]
        lines.append(f"{layer} {mine[0]['n']}x{mine[0]['k']}: us (speed-up over bf16) for M =")
        lines.append(f"{'':42}" + "".join(f"{m:>16}" for m in tokens) + "   least SQNR")
        for weight, act, few in dict.fromkeys(map(variant, mine)):
            row = {r["m"]: r for r in mine if variant(r) == (weight, act, few)}
            cells = (f"{row[m]['us']:9.1f} ({row[m]['speedup']:.2f})" if m in row else "" for m in tokens)
            worst = min(r.get("sqnr_db", float("inf")) for r in row.values())
            name = weight + (f" x {act}" if act else "") + (f" {FEW_TOKENS}" if few else "")
            lines.append(f"{name:42}{''.join(f'{cell:>16}' for cell in cells)}   {worst:6.1f} dB")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--budget", type=float, default=240, help="seconds after which no new format is started")
    parser.add_argument("--formats", nargs="*", help="weight formats instead of the default list, 'weight+activation'")
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_smoke.py measures GPU kernels; this machine has no CUDA GPU", file=sys.stderr)
        return 2
    import triton

    formats = FORMATS
    if args.formats:
        formats = tuple((f.partition("+")[0], f.partition("+")[2]) for f in args.formats)
    records = measure(tuple(args.tokens), formats, args.budget)
    print(table(records, tuple(args.tokens)))
    result = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(), "lowbit": lowbit.__version__,
        "date": time.strftime("%Y-%m-%d"), "command": "python " + " ".join(sys.argv), "records": records,
    }  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    missed = [r for r in records if "sqnr_db" in r and r["sqnr_db"] < r["sqnr_limit_db"]]
    for r in missed:
        print(f"MISSED {r['layer']} {r['weight']} {r['act']} M = {r['m']}: {r['sqnr_db']:.1f} dB", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
