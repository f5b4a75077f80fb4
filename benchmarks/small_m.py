"""Time of the few-token kernel per format next to the read floor and cuBLAS bf16, for layers of Llama-3.1-8B.

    python benchmarks/small_m.py --out benchmarks/results/NAME.json

The floor is a sum over as many bytes as the packed weight has, measured in the same run. Weights rotate through more
than the L2 cache, one CUDA graph per variant, medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from gpu_smoke import COLD_BYTES, median_us

from lowbit import QuantizedTensor
from lowbit.formats import parse_format
from lowbit.kernels.cuda import small_m

LAYERS = {"gate_up": (28672, 4096), "down": (4096, 14336), "qkv": (6144, 4096), "o": (4096, 4096)}
FORMATS = (
    "int4:g128", "int4:g128:asym", "int4:g32", "int8:row", "float8_e4m3:row", "mxfp4", "nvfp4", "nf4:g64", "int3:g64",
    "int2:g64", "int1:g128", "int6:g64:asym", "mxfp8_e4m3", "codebook4v2:g64",
)  # fmt: skip


@triton.jit
def read_kernel(source, sums, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(source + at, mask=at < count, other=0)))


def floor_us(size: int, block: int = 8192) -> float:
    """Median time of reading `size` bytes once: a kernel that adds them up."""
    words = size // 4
    grid = (-(-words // block),)
    sums = torch.empty(grid, dtype=torch.int32, device="cuda")

    def read(buffer: torch.Tensor) -> None:
        read_kernel[grid](buffer, sums, words, BLOCK=block, num_warps=8)

    buffers = [torch.randint(9, (words,), dtype=torch.int32, device="cuda") for _ in range(COLD_BYTES // size + 2)]
    return median_us([partial(read, b) for b in buffers])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default="1,16")
    parser.add_argument("--row-tiles", default="0", help="0: the kernel's own rule; 1 and 2 force it")
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
                row["bf16_us"] = median_us([partial(F.linear, x, w) for w in dense])
                for tiles in map(int, args.row_tiles.split(",")):
                    calls = [partial(small_m.launch, x, w.planes, fmt, n, row_tiles=tiles) for w in weights]
                    row[f"us_{tiles or 'chosen'}"] = median_us(calls)
                rows.append(row)
                print(
                    " ".join(f"{key}={v:.2f}" if isinstance(v, float) else f"{key}={v}" for key, v in row.items()),
                    flush=True,
                )
    if args.out:
        info = {
            "command": "python " + " ".join(sys.argv), "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__, "triton": triton.__version__,
            "python": platform.python_version(), "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        args.out.write_text(json.dumps({"info": info, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
