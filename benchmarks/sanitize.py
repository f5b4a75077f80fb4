"""Runs the GPU kernels once on small layers with edges, for compute-sanitizer; prints the error against fp64.

    compute-sanitizer --tool memcheck --report-api-errors no python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --report-api-errors no python benchmarks/sanitize.py --kernels cuda_wgmma

Under memcheck set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own whose end is seen.
Without `--report-api-errors no` the tool also counts the version probes of cuda-bindings, which are no memory errors.
"""

from __future__ import annotations

import argparse
import time
from itertools import product

import torch

import lowbit
from lowbit import QuantizedTensor
from lowbit.formats import parse_format
from lowbit.formats.activation import parse_activation

#: One format for every way of decoding: widths of one, two and three planes, tables, floats, scales of every kind.
FORMATS = (
    "int8:row,int4:g128,int4:g32,int4:g64:asym,int3:g64,int7:g64,int1:g128,float8_e4m3:row,float8_e4m3:b128x128,"
    "mxfp4,nvfp4,nf4:g64,codebook4v2:g64"
)
KERNELS = {
    "cuda_small_m": (1, 7), "cuda_wgmma": (65, 130), "cuda_scaled_mm": (5, 70, 128), "triton_weight_only": (5,),
    "triton_chunked": (300,),
}  # fmt: skip
# Multiplied by 8-bit codes, of these formats.
CODES = {
    "int8:row": "int8:row", "float8_e4m3:row": "float8_e4m3:row", "int4:g128": "float8_e4m3:row",
    "int4:g32": "int8:row", "int4:g64:asym": "float8_e4m3:row", "float8_e4m3:b128x128": "float8_e4m3:g128",
}  # fmt: skip
SHAPES = ((100, 1152), (386, 640))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    started, ran = time.monotonic(), 0
    for kernel, spec, (n, k) in product(args.kernels.split(","), args.formats.split(","), SHAPES):
        if time.monotonic() - started > args.seconds:
            print(f"out of time: {kernel} {spec} {n} x {k} and what follows are left out")
            break
        if kernel == "cuda_scaled_mm" and spec not in CODES:
            continue
        act = parse_activation(CODES[spec]) if kernel == "cuda_scaled_mm" else None
        generator = torch.Generator().manual_seed(n)
        w = QuantizedTensor.from_float(torch.randn(n, k, generator=generator).bfloat16(), parse_format(spec), act)
        dense, on_gpu = w.dequantize(torch.float64), w.to("cuda")
        for m in KERNELS[kernel]:
            x = torch.randn(m, k, generator=generator).bfloat16()
            with lowbit.use_kernel(kernel):
                y = torch.nn.functional.linear(x.cuda(), on_gpu).cpu().double()
            operand = x if act is None else act.format.dequantize(act.quantize(x), m, k)
            exact = operand.double() @ dense.T
            error = float((y - exact).norm() / exact.norm())
            print(f"{kernel} {spec} {m} x {n} x {k}: {error:.1e}", flush=True)
            assert error < 1e-2, "wrong"
            ran += 1
    print(f"{ran} products")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
