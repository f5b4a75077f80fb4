"""Times the Hadamard transform of activations, as it stands before a down projection, against the memory's own speed.

    python benchmarks/hadamard.py --out benchmarks/results/NAME.json

Beside it: a copy of as many bytes, and `silu_mul_quantized` of the same width, the kernel that it would run behind.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from act_quant import copy_us
from cases import write

from lowbit.decoder_ops import hadamard
from lowbit.linear import random_signs
from lowbit.operand_ops import silu_mul_quantized
from lowbit.tools.timing import copies_for, median_us


def row_of(k: int, m: int) -> dict[str, Any]:
    nbytes = 4 * m * k
    signs = random_signs(k).cuda()
    xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies_for(nbytes))]
    us = median_us([partial(hadamard, x, signs) for x in xs])
    gates = [torch.randn(m, 2 * k, device="cuda", dtype=torch.bfloat16) for _ in range(copies_for(5 * m * k))]
    before = median_us([partial(silu_mul_quantized, g, None, "float8_e4m3:row", torch.float8_e4m3fn) for g in gates])
    copy = copy_us(nbytes)
    return {"k": k, "m": m, "us": us, "copy_us": copy, "silu_mul_quantized_us": before, "share_of_copy": copy / us}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--widths", default="4096,8192,11008,14336")
    parser.add_argument("--tokens", default="1,16,128,4096")
    args = parser.parse_args()
    started, rows = time.monotonic(), list[dict[str, Any]]()
    print(f"{'K':>6} {'M':>5} {'us':>8} {'copy':>8} {'silu_mul_quantized':>18}")
    for k, m in product(args.widths.split(","), args.tokens.split(",")):
        if time.monotonic() - started > args.seconds:
            print(f"out of time: K = {k} M = {m} and what follows are left out")
            break
        r = row_of(int(k), int(m))
        rows.append(r)
        print(f"{k:>6} {m:>5} {r['us']:8.2f} {r['copy_us']:8.2f} {r['silu_mul_quantized_us']:18.2f}", flush=True)
    write(args.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
