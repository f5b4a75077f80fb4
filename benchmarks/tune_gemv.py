"""Times instances of the kernel for one token and plain bf16 layers of Llama-3.1-8B, beside cuBLAS and the floor.

    python benchmarks/tune_gemv.py

Weights rotate through more than the L2 cache, one CUDA graph per variant, medians.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from lowbit.kernels.triton.gemv import CONFIG, Config, gemv
from lowbit.tools.bench_linear import LAYERS
from lowbit.tools.timing import copies_for, floor_us, median_us


def main() -> int:
    for layer, (n, k) in LAYERS.items():
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies_for(2 * n * k))]
        x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
        cublas = median_us([partial(F.linear, x, w) for w in weights])
        times = {}
        for rows, block, warps in product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (2, 4, 8)):
            if 8 <= rows * block // (32 * warps) <= 128:
                config = Config(rows, block, warps)
                times[config] = median_us([partial(gemv, x, w, None, config) for w in weights])
        best = sorted(times, key=lambda c: times[c])[:4]
        found = ", ".join(f"{times[c]:.1f} ({c.rows}x{c.block} warps {c.warps})" for c in best)
        print(f"{layer} floor {floor_us(2 * n * k):.1f} cuBLAS {cublas:.1f} rule {times[CONFIG]:.1f} best {found}",
              flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
