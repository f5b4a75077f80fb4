"""Times instances of the kernels for Hopper's matrix units at layers of Llama-3.1-8B; prints the fastest beside bf16.

    python benchmarks/tune_tiles.py --out benchmarks/results/NAME.json
    python benchmarks/tune_tiles.py --kernel cuda_scaled_mm --formats int8:row+int8:row,int4:g128+int8:row --out ...

Weights rotate through more than the L2 cache, one CUDA graph per variant, medians; from 512 tokens on variants are held
(lowbit.tools.timing). The constants of the models in
`wgmma.config_for` and `scaled_mm.config_for` were fitted to such runs. `cuda_scaled_mm` multiplies random codes, next
to the kernels that would run in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from cases import Case, arguments, cases, write
from torch import Tensor

from lowbit import QuantizedTensor
from lowbit.kernels.cuda import loader, scaled_mm, wgmma
from lowbit.kernels.cuda.loader import Source
from lowbit.kernels.cuda.tiles import Tiling
from lowbit.kernels.triton import scaled_mm as triton_scaled_mm
from lowbit.kernels.triton.launch import multiprocessors
from lowbit.tools.timing import median_us

Run = Callable[[Tensor, QuantizedTensor], Tensor]


def worth_a_try(candidates: Sequence[Tiling], m: int, n: int) -> list[Tiling]:
    """Instances with work for half of the GPU, and for not much more than all of it where blocks share tiles."""
    found = []
    for c in candidates:
        blocks = c.tiles(m, n) * c.split
        if (c.cut and 4 * blocks >= 132) or (not c.cut and blocks >= 66 and (c.split == 1 or blocks <= 140 * c.blocks)):
            found.append(c)
    return found


def variants(kernel: str, case: Case) -> tuple[Tiling, list[Tiling]]:
    """The rule's choice, and all that are worth a try."""
    (n, k), sms = case.weights[0].shape, multiprocessors(case.x.device)
    if kernel == "cuda_wgmma":
        chosen: Tiling = wgmma.config_for(case.format, case.m, n, k, sms)
        candidates: Sequence[Tiling] = wgmma.candidates(case.format, case.m, k)
    else:
        assert case.act is not None, "an activation is missing, as in int8:row+int8:row"
        chosen = scaled_mm.config_for(case.format, case.act, case.m, n, k, sms)
        candidates = scaled_mm.candidates(case.format, case.act, case.m, k)
    return chosen, list(dict.fromkeys([chosen, *worth_a_try(candidates, case.m, n)]))


def source_of(case: Case, tiling: Tiling) -> Source:
    n = case.weights[0].out_features
    if isinstance(tiling, wgmma.Config):
        return wgmma.source(case.format, tiling, n, torch.bfloat16)
    assert case.act is not None
    return scaled_mm.source(case.format, case.act, tiling, n, torch.bfloat16)


def run_of(case: Case, tiling: Tiling, scales: Tensor) -> Run:
    n = case.weights[0].out_features
    if isinstance(tiling, wgmma.Config):
        return lambda x, w: wgmma.launch(x, w.planes, case.format, n, config=tiling)
    act = case.act
    assert act is not None
    return lambda x, w: scaled_mm.launch(x, w.planes, case.format, act, n, torch.bfloat16, None, scales, tiling)


def scales_of(case: Case) -> Tensor:
    """Of the activations: one per token, or per token and group of K."""
    group = None if case.act is None else case.act.plane("scale").k
    return torch.ones(case.m, -(-case.x.shape[1] // group) if group else 1, device="cuda")


def others(case: Case, row_scale: Tensor) -> dict[str, Run]:
    """What multiplies these operands elsewhere: codes, or the activation's levels in bf16."""
    if case.format != case.act:
        (n, _), levels = case.weights[0].shape, case.x.bfloat16()
        return {"cuda_wgmma": lambda _, w: wgmma.launch(levels, w.planes, case.format, n)}
    scale = case.weights[0].planes["scale"].float()
    found: dict[str, Run] = {
        "triton_scaled_mm": lambda x, w: triton_scaled_mm.matmul(
            x, row_scale, w.planes["qdata"], scale, None, torch.bfloat16
        )
    }
    if case.format.planes[0].dtype == torch.float8_e4m3fn:
        column = scale.view(1, -1).contiguous()
        found["cublas_scaled_mm"] = lambda x, w: torch._scaled_mm(
            x, w.planes["qdata"].t(), row_scale, column, out_dtype=torch.bfloat16, use_fast_accum=False
        )
    return found


def codes_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Random codes in the shape of `x`."""
    return (x.float() * 30).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else x.to(dtype)


def main() -> int:
    args = arguments(
        __doc__, seconds=200, formats="int4:g128,int8:row", tokens="16,32,64,128,256,512,1024",
        kernels=("cuda_wgmma", "cuda_scaled_mm"),
    )  # fmt: skip
    rows = []
    for case in cases(args):
        chosen, tilings = variants(args.kernel, case)
        loader.compile_ahead([source_of(case, tiling) for tiling in tilings], (9, 0))
        scales, beside = scales_of(case), {}
        if case.act is not None:
            case = replace(case, x=codes_like(case.x, case.act.planes[0].dtype))
            beside = others(case, scales)
        times = {str(t): median(case, run_of(case, t, scales)) for t in tilings}
        best, us = min(times, key=lambda t: times[t]), times[str(chosen)]
        found = {name: median(case, run) for name, run in beside.items()}
        rows.append(
            case.row | {"us": us, "rule": str(chosen), "best": best, "best_us": times[best], "all": times}
            | ({"others": found} if found else {})
        )  # fmt: skip
        said = "".join(f" {name} {t:.1f}" for name, t in found.items())
        print(
            f"{case} rule {us:.1f} ({chosen}) best {times[best]:.1f} ({best}) {case.bf16_us / times[best]:.2f}x{said}",
            flush=True,
        )
    write(args.out, rows)
    return 0


def median(case: Case, run: Run) -> float:
    return median_us([partial(run, case.x, w) for w in case.weights], hold=case.hold)


if __name__ == "__main__":
    raise SystemExit(main())
