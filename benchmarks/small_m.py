"""Time of the few-token kernel per format next to the read floor and cuBLAS bf16, for layers of Llama-3.1-8B.

    python benchmarks/small_m.py --out benchmarks/results/NAME.json

The floor is a sum over as many bytes as the packed weight has, measured in the same run. Weights rotate through more
than the L2 cache, one CUDA graph per variant, medians; `blocks` is the least number of resident blocks per
multiprocessor that the compiler is held to.
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
from gpu_smoke import COLD_BYTES, median_us

from lowbit import QuantizedTensor
from lowbit.formats import parse_format
from lowbit.kernels.cuda import loader, small_m
from lowbit.kernels.select import Problem

LAYERS = {"gate_up": (28672, 4096), "down": (4096, 14336), "qkv": (6144, 4096), "o": (4096, 4096)}
FORMATS = (
    "int4:g128", "int4:g128:asym", "int4:g32", "int8:row", "float8_e4m3:row", "mxfp4", "nvfp4", "nf4:g64", "int3:g64",
    "int2:g64", "int1:g128", "int6:g64:asym", "mxfp8_e4m3", "codebook4v2:g64",
)  # fmt: skip


def floor_us(size: int) -> float:
    """Median time of reading `size` bytes once, as a sum of int64."""
    count = max(2, COLD_BYTES // size + 1)
    buffers = [torch.ones(size // 8, dtype=torch.int64, device="cuda") for _ in range(count)]
    return median_us([lambda b=b: b.sum() for b in buffers])


def variant(weights: list[QuantizedTensor], x: torch.Tensor, blocks: int, rows: int) -> list[Any]:
    w = weights[0]
    fmt, (n, k) = w.format, w.shape
    defines = small_m.constants(fmt)
    assert not isinstance(defines, str)
    problem = Problem(x.shape[0], n, k, fmt.spec, "", x.dtype, "cuda", torch.cuda.get_device_capability())
    tiles = 1 if x.shape[0] <= 8 else 2 if x.shape[0] <= 16 else 4
    kernel = loader.load(
        "small_m.cu", "small_m", (*defines, ("TOKEN_TILES", tiles), ("ROW_TILES", rows), ("MIN_BLOCKS", blocks)), 0
    )

    def call(planes: dict[str, torch.Tensor]) -> torch.Tensor:
        small_m._kernel = lambda *_: kernel
        small_m.MANY_ROWS = 0 if rows == 2 else 1 << 30
        return small_m.small_m(x, planes, None, problem, None)

    return [lambda p=w.planes: call(p) for w in weights]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default="1,16")
    parser.add_argument("--variants", default="2x1,2x2", help="BLOCKSxROW_TILES")
    args = parser.parse_args()
    started, rows = time.monotonic(), []
    for layer in args.layers.split(","):
        n, k = LAYERS[layer]
        dense = [
            torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
            for _ in range(max(2, COLD_BYTES // (2 * n * k) + 1))
        ]
        for spec in args.formats.split(","):
            if time.monotonic() - started > args.seconds:
                print("out of time")
                break
            fmt = parse_format(spec)
            size = fmt.nbytes(n, k)
            first = QuantizedTensor.from_float(dense[0], fmt)
            weights = [first.clone() for _ in range(COLD_BYTES // size + 2)]
            for m in map(int, args.tokens.split(",")):
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                row = {"layer": layer, "format": spec, "m": m, "MB": size / 1e6, "floor_us": floor_us(size)}
                row["bf16_us"] = median_us([lambda w=w, x=x: F.linear(x, w) for w in dense])
                for blocks, tiles in (map(int, v.split("x")) for v in args.variants.split(",")):
                    us = median_us(variant(weights, x, blocks, tiles))
                    row |= {f"us_{blocks}x{tiles}": us}
                rows.append(row)
                print(
                    " ".join(f"{key}={v:.2f}" if isinstance(v, float) else f"{key}={v}" for key, v in row.items()),
                    flush=True,
                )
    if args.out:
        info = {
            "command": "python " + " ".join(sys.argv), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
            "python": platform.python_version(), "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        args.out.write_text(json.dumps({"info": info, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
