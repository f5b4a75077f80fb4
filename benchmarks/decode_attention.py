"""Times the attention of new tokens over a KV cache: the CUDA C++ kernel, the Triton kernel, and a read of the cache.

    python benchmarks/decode_attention.py --out benchmarks/results/NAME.json

Heads of Llama-3.1-8B (32 of queries, 8 of keys, 128 numbers each), bf16, caches that rotate through more than L2 holds.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import write

from lowbit.kernels.cuda import decode_attention as cuda
from lowbit.kernels.triton import decode_attention as triton
from lowbit.tools.timing import copies_for, floor_us, median_us

HEADS, GROUPS, WIDTH = 32, 8, 128
#: Sequences, positions that the cache has room for, positions that it holds, new tokens.
CASES = ((1, 256, 135, 1), (1, 512, 400, 1), (1, 2048, 1500, 1), (1, 8192, 8000, 1), (1, 32768, 32000, 1),
         (16, 256, 135, 1), (16, 2048, 2000, 1), (64, 256, 150, 1), (64, 2048, 2000, 1), (128, 256, 150, 1),
         (1, 2048, 1500, 4), (1, 2048, 1500, 8))  # fmt: skip


def row_of(batch: int, capacity: int, held: int, tokens: int) -> dict[str, Any]:
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    nbytes = 4 * batch * GROUPS * held * WIDTH
    shape = (batch, GROUPS, capacity, WIDTH)
    copies = min(8, copies_for(nbytes))
    caches = [(torch.randn(shape, **like), torch.randn(shape, **like)) for _ in range(copies)]
    qkv = torch.randn(batch, tokens, (HEADS + 2 * GROUPS) * WIDTH, **like)
    positions = torch.full((batch,), held, dtype=torch.int32, device="cuda")
    angles = [torch.rand(capacity, WIDTH // 2, device="cuda") for _ in range(2)]
    arrived = torch.zeros(batch * GROUPS, dtype=torch.int32, device="cuda")
    rest = (positions, *angles, None, None, 1e-5, HEADS)
    us = median_us([partial(cuda.decode_attention, qkv, *cache, *rest) for cache in caches])
    before = median_us([partial(triton.decode_attention, qkv, *cache, *rest, arrived) for cache in caches])
    return {
        "batch": batch, "capacity": capacity, "held": held, "tokens": tokens, "bytes": nbytes, "us": us,
        "triton_us": before, "read_us": floor_us(nbytes),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    started, rows = time.monotonic(), list[dict[str, Any]]()
    print(f"{'batch':>5} {'room':>6} {'held':>6} {'new':>3} {'us':>8} {'triton':>8} {'read':>8}")
    for case in CASES:
        if time.monotonic() - started > args.seconds:
            print(f"out of time: {case} and what follows are left out")
            break
        r = row_of(*case)
        rows.append(r)
        print(f"{r['batch']:>5} {r['capacity']:>6} {r['held']:>6} {r['tokens']:>3} {r['us']:8.2f} "
              f"{r['triton_us']:8.2f} {r['read_us']:8.2f}", flush=True)  # fmt: skip
    write(args.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
