"""Times instances of the wgmma kernel for layers of Llama-3.1-8B and prints the fastest beside bf16 and the floor.

    python benchmarks/tune_wgmma.py --out benchmarks/results/NAME.json

Weights rotate through more than the L2 cache, one CUDA graph per variant, medians. The constants of the model in
`wgmma.config_for` were fitted to such a run.
"""

from __future__ import annotations

from functools import partial

from cases import arguments, cases, write

from lowbit.formats import Format
from lowbit.kernels.cuda import wgmma
from lowbit.kernels.cuda.wgmma import Config
from lowbit.kernels.triton.launch import multiprocessors
from lowbit.tools.timing import median_us


def worth_a_try(fmt: Format, m: int, n: int, k: int) -> list[Config]:
    """Instances with work for half of the GPU, and for not much more than all of it where blocks share tiles."""
    found = []
    for c in wgmma.candidates(fmt, m, k):
        blocks = -(-n // c.rows) * -(-m // c.tokens) * c.split
        if c.cut or (blocks >= 66 and (c.split == 1 or blocks <= 140 * c.blocks)):
            found.append(c)
    return found


def main() -> int:
    args = arguments(__doc__, seconds=200, formats="int4:g128,int8:row", tokens="16,32,64,128,256,512,1024")
    rows = []
    for case in cases(args):
        n, k = case.weights[0].shape
        chosen, times = wgmma.config_for(case.format, case.m, n, k, multiprocessors(case.x.device)), {}
        for config in dict.fromkeys([chosen, *worth_a_try(case.format, case.m, n, k)]):
            times[str(config)] = median_us(
                [partial(wgmma.launch, case.x, w.planes, case.format, n, config=config) for w in case.weights]
            )
        best, us = min(times, key=lambda c: times[c]), times[str(chosen)]
        rows.append(case.row | {"us": us, "rule": str(chosen), "best": best, "best_us": times[best], "all": times})
        print(
            f"{case} rule {us:.1f} ({chosen}) best {times[best]:.1f} ({best}) {case.bf16_us / times[best]:.2f}x",
            flush=True,
        )
    write(args.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
