"""Times instances of the wgmma kernel for layers of Llama-3.1-8B and prints the fastest beside bf16 and the floor.

    python benchmarks/tune_wgmma.py --out benchmarks/results/NAME.json

Weights rotate through more than the L2 cache, one CUDA graph per variant, medians.
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

from lowbit import QuantizedTensor
from lowbit.formats import parse_format
from lowbit.kernels.cuda import wgmma
from lowbit.kernels.cuda.wgmma import Config
from lowbit.tools.bench_linear import LAYERS
from lowbit.tools.timing import COLD_BYTES, floor_us, median_us


def candidates(m: int, n: int, k: int) -> list[Config]:
    """Instances worth a try: the smallest tile that holds the tokens and its neighbours."""
    sizes = [t for t in (16, 32, 64, 128) if t >= min(m, 128)][:2]
    found = []
    for tokens in sizes:
        for row_tiles in (1, 2):
            for split in (1, 2, 4, 8):
                for blocks in (1, 2) if row_tiles == 1 and tokens <= 64 else (1,):
                    tiles = -(-n // (128 * row_tiles)) * -(-m // tokens)
                    if (tiles * split <= 3 * 132 * blocks or split == 1) and k // split >= 512:
                        found.append(Config(tokens, row_tiles, split, blocks))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--layers", default="gate_up,o,down,qkv")
    parser.add_argument("--formats", default="int4:g128,int8:row")
    parser.add_argument("--tokens", default="16,32,64,128,256,512,1024")
    parser.add_argument("--rule", action="store_true", help="only the rule's own choice")
    args = parser.parse_args()
    started, rows = time.monotonic(), []
    for layer in args.layers.split(","):
        n, k = LAYERS[layer]
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(COLD_BYTES // (2 * n * k) + 2)]
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        bf16: dict[int, float] = {}
        for spec in args.formats.split(","):
            fmt = parse_format(spec)
            size = fmt.nbytes(n, k)
            first = QuantizedTensor.from_float(dense[0], fmt)
            weights = [first.clone() for _ in range(COLD_BYTES // size + 2)]
            floor = floor_us(size)
            for m in map(int, args.tokens.split(",")):
                if time.monotonic() - started > args.seconds:
                    print("out of time")
                    break
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                if m not in bf16:
                    bf16[m] = median_us([partial(F.linear, x, w) for w in dense])
                chosen = wgmma.config_for(fmt, m, n, k, sms)
                times = {}
                for config in dict.fromkeys([chosen, *([] if args.rule else candidates(m, n, k))]):
                    calls = [partial(wgmma.launch, x, w.planes, fmt, n, config=config) for w in weights]
                    times[str(config)] = median_us(calls)
                best = min(times, key=lambda c: times[c])
                row = {"layer": layer, "format": spec, "m": m, "floor_us": floor, "bf16_us": bf16[m],
                       "us": times[str(chosen)], "best_us": times[best], "best": best, "rule": str(chosen), "all": times}  # fmt: skip
                rows.append(row)
                print(f"{layer} {spec} M={m} floor {floor:.1f} bf16 {bf16[m]:.1f} rule {row['us']:.1f} ({chosen}) "
                      f"best {times[best]:.1f} ({best}) {bf16[m] / times[best]:.2f}x", flush=True)  # fmt: skip
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
