"""Times the GPU kernels for weight-only layers against each other: where each of them is the fastest.

    python benchmarks/crossover.py --out benchmarks/results/NAME.json

Kernels run whatever the table of kernels would choose. The conditions in `small_m.why_not` and `wgmma.why_not` were
written from such a run. Weights rotate through more than the L2 cache, one CUDA graph per kernel, medians.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from cases import arguments, cases, write
from torch import Tensor

from lowbit import QuantizedTensor
from lowbit.formats import Format
from lowbit.kernels.cuda import small_m, wgmma
from lowbit.kernels.select import use_kernel
from lowbit.kernels.triton import weight_only
from lowbit.tools.timing import median_us

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
    args = arguments(
        __doc__, seconds=300, formats="int4:g128,int8:row,nf4:g64", tokens="1,4,8,16,32,64,128,256,512,1024,2048,4096"
    )
    rows = []
    for case in cases(args):
        us = {
            kernel: median_us([partial(run_of(kernel, case.format), case.x, w) for w in case.weights], hold=case.hold)
            for kernel, (least, most) in RANGES.items() if least <= case.m <= most
        }  # fmt: skip
        rows.append(case.row | {"us": us})
        print(case, ", ".join(f"{kernel} {t:.1f}" for kernel, t in us.items()), flush=True)
    write(args.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
