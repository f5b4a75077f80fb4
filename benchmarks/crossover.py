"""Times the GPU kernels for weight-only layers against each other: where each of them is the fastest.

    python benchmarks/crossover.py --out benchmarks/results/NAME.json

Kernels run whatever the table of kernels would choose. The conditions in `small_m.why_not` and `wgmma.why_not` were
written from such a run. Weights rotate through more than the L2 cache, one CUDA graph per kernel, medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lowbit import QuantizedTensor
from lowbit.formats import Format, parse_format
from lowbit.kernels.cuda import small_m, wgmma
from lowbit.kernels.select import use_kernel
from lowbit.kernels.triton import weight_only
from lowbit.tools.bench_linear import LAYERS
from lowbit.tools.timing import copies_for, floor_us, median_us

Run = Callable[[Tensor, QuantizedTensor], Tensor]
# The largest and the smallest number of tokens worth a try.
RANGES = {
    "cuda_small_m": (1, 8), "cuda_wgmma": (9, 16384), "triton_weight_only": (9, 64), "triton_chunked": (512, 16384),
}  # fmt: skip


def run_of(kernel: str, fmt: Format) -> Run:
    """A call of `kernel`, whose own conditions do not count here."""
    if kernel == "cuda_small_m":
        return lambda x, w: small_m.launch(x, w.planes, fmt, w.out_features)
    if kernel == "cuda_wgmma":
        return lambda x, w: wgmma.launch(x, w.planes, fmt, w.out_features)
    if kernel == "triton_weight_only":
        return lambda x, w: weight_only.matmul(x, w.planes, fmt, w.out_features, None, x.dtype)

    def by_name(x: Tensor, w: QuantizedTensor) -> Tensor:
        with use_kernel(kernel):
            return F.linear(x, w)

    return by_name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--layers", default="gate_up,o,down,qkv")
    parser.add_argument("--formats", default="int4:g128,int8:row,nf4:g64")
    parser.add_argument("--tokens", default="1,4,8,16,32,64,128,256,512,1024,2048,4096")
    args = parser.parse_args()
    started, rows = time.monotonic(), []
    for layer, spec in ((a, b) for a in args.layers.split(",") for b in args.formats.split(",")):
        (n, k), fmt = LAYERS[layer], parse_format(spec)
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies_for(2 * n * k))]
        first = QuantizedTensor.from_float(dense[0], fmt)
        weights = [first, *(first.clone() for _ in range(copies_for(fmt.nbytes(n, k)) - 1))]
        floor = floor_us(fmt.nbytes(n, k))
        for m in map(int, args.tokens.split(",")):
            if time.monotonic() - started > args.seconds:
                print(f"out of time: {layer} {spec} M = {m} and what follows are left out")
                break
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            us = {
                kernel: median_us([partial(run_of(kernel, fmt), x, w) for w in weights])
                for kernel, (least, most) in RANGES.items() if least <= m <= most
            }  # fmt: skip
            bf16 = median_us([partial(F.linear, x, w) for w in dense])
            rows.append({"layer": layer, "format": spec, "m": m, "bf16_us": bf16, "floor_us": floor, "us": us})
            times = ", ".join(f"{kernel} {t:.1f}" for kernel, t in us.items())
            print(f"{layer} {spec} M={m} floor {floor:.1f} bf16 {bf16:.1f} {times}", flush=True)
    if args.out:
        info = {
            "command": "python " + " ".join(sys.argv), "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__, "triton": triton.__version__,
            "python": platform.python_version(), "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        args.out.write_text(json.dumps({"info": info, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
