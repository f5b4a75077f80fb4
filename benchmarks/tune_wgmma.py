"""Times instances of the wgmma kernel for layers of Llama-3.1-8B and prints the fastest beside bf16 and the floor.

    python benchmarks/tune_wgmma.py --out benchmarks/results/NAME.json

Weights rotate through more than the L2 cache, one CUDA graph per variant, medians. The constants of the model in
`wgmma.config_for` were fitted to such a run.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

from lowbit import QuantizedTensor
from lowbit.formats import Format, parse_format
from lowbit.kernels.cuda import wgmma
from lowbit.kernels.cuda.wgmma import Config
from lowbit.tools.bench_linear import LAYERS
from lowbit.tools.timing import copies_for, floor_us, median_us


def candidates(fmt: Format, m: int, n: int) -> list[Config]:
    """Instances worth a try: the smallest tile that holds the tokens and the next, with enough tiles for half a GPU."""
    sizes = [t for t in (16, 32, 64, 128, 256) if t >= min(m, 128)][:2]
    found = []
    for tokens, row_tiles, cut, blocks, warpgroups in product(sizes, (1, 2), (False, True), (1, 2), (2, 4)):
        c = Config(tokens, row_tiles, cut, blocks, warpgroups)
        tiles = -(-n // c.rows) * -(-m // tokens)
        if isinstance(wgmma.constants(fmt, c), str) or (warpgroups, row_tiles) == (4, 2):
            continue
        if tiles >= 66 or cut:
            found.append(c)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--layers", default="gate_up,o,down,qkv")
    parser.add_argument("--formats", default="int4:g128,int8:row")
    parser.add_argument("--tokens", default="16,32,64,128,256,512,1024")
    args = parser.parse_args()
    started, rows = time.monotonic(), []
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for layer, spec in product(args.layers.split(","), args.formats.split(",")):
        (n, k), fmt = LAYERS[layer], parse_format(spec)
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies_for(2 * n * k))]
        size = fmt.nbytes(n, k)
        first = QuantizedTensor.from_float(dense[0], fmt)
        weights = [first, *(first.clone() for _ in range(copies_for(size) - 1))]
        floor = floor_us(size)
        for m in map(int, args.tokens.split(",")):
            if time.monotonic() - started > args.seconds:
                print(f"out of time: {layer} {spec} M = {m} and what follows are left out")
                break
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            bf16 = median_us([partial(F.linear, x, w) for w in dense])
            chosen, times = wgmma.config_for(fmt, m, n, k, sms), {}
            for config in dict.fromkeys([chosen, *candidates(fmt, m, n)]):
                times[str(config)] = median_us(
                    [partial(wgmma.launch, x, w.planes, fmt, n, config=config) for w in weights]
                )
            best, us = min(times, key=lambda c: times[c]), times[str(chosen)]
            rows.append({"layer": layer, "format": spec, "m": m, "floor_us": floor, "bf16_us": bf16, "us": us,
                         "rule": str(chosen), "best": best, "best_us": times[best], "all": times})  # fmt: skip
            print(
                f"{layer} {spec} M={m} floor {floor:.1f} bf16 {bf16:.1f} rule {us:.1f} ({chosen}) "
                f"best {times[best]:.1f} ({best}) {bf16 / times[best]:.2f}x", flush=True,
            )  # fmt: skip
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
