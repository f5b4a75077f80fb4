"""Times what one eager call of a quantized linear layer costs on the host, beside a plain bf16 layer.

    python benchmarks/host_time.py --out benchmarks/results/NAME.json

Layers are small, so that the GPU waits for the host, and as many as a small model has, so that every call meets another
weight. A turn is every layer called a few times, without a wait in between; variants take turns, medians are reported.
`module` calls the layer as a model does, `linear` is `F.linear` with its weight, `op` is `torch.ops.lowbit.linear`,
which compiled code calls; `empty` makes an output and does nothing else. Times of `finished` include the GPU's part of
`module`: where they are far above it, launches waited for the GPU and the other numbers are not the host's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import write
from torch import Tensor, nn

import lowbit
from lowbit import QuantizedTensor, ops
from lowbit.tools.doctor import machine

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode, "no_grad": torch.no_grad,
}  # fmt: skip
ROUNDS = 25


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--calls", type=int, default=192, help="of a turn; fewer than launches that may wait: 1024")
    parser.add_argument(
        "--cases",
        default="bf16@1,bf16@64,int4:g128@1,int4:g128@64,float8dq-row@1,float8dq-row@64",
        help="config@tokens",
    )
    return parser.parse_args()


def layers_of(config: str, size: int, count: int) -> list[nn.Module]:
    layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(count)).to("cuda", torch.bfloat16)
    if config != "bf16":
        lowbit.quantize_(layers, config)
    return list(layers.requires_grad_(False))


def variants(layers: list[nn.Module], x: Tensor) -> Iterator[tuple[str, Callable[[Any], object]]]:
    """Names, and what is called with every layer."""
    yield "module", lambda layer: layer(x)
    yield "linear", lambda layer: F.linear(x, layer.weight)
    weight = layers[0].weight
    if isinstance(weight, QuantizedTensor):
        n, k, spec, act = weight.out_features, weight.in_features, weight.format.spec, weight.act_spec
        planes = {layer: list(layer.weight.planes.values()) for layer in layers}
        yield "op", lambda layer: ops.linear(x, planes[layer], None, None, spec, act, n, k)
    shape = (*x.shape[:-1], weight.shape[0])
    yield "empty", lambda layer: torch.empty(shape, dtype=x.dtype, device=x.device)


def turn(call: Callable[[Any], object], layers: list[nn.Module], calls: int) -> tuple[float, float]:
    """Microseconds of a call on the host, and with the wait for the GPU."""
    todo = list(islice(cycle(layers), calls))
    torch.cuda.synchronize()
    started = time.perf_counter()
    for layer in todo:
        call(layer)
    returned = time.perf_counter()
    torch.cuda.synchronize()
    finished = time.perf_counter()
    return (returned - started) / calls * 1e6, (finished - started) / calls * 1e6


def rows_of(config: str, m: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    layers = layers_of(config, args.size, args.layers)
    # What these times are those of.
    processor = machine()["processor"]
    # A batch of sequences, as models have it.
    x = torch.randn(1, m, args.size, device="cuda", dtype=torch.bfloat16)
    for mode, context in MODES.items():
        with context():
            calls = dict(variants(layers, x))
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
            for call in calls.values():
                turn(call, layers, args.calls)
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    times[name].append(turn(call, layers, args.calls))
        row: dict[str, Any] = {"config": config, "m": m, "n": args.size, "k": args.size, "mode": mode, "cpu": processor}
        for name, found in times.items():
            row[f"{name}_us"] = statistics.median(host for host, _ in found)
            row[f"{name}_us_min"] = min(host for host, _ in found)
        row["finished_us"] = statistics.median(both for _, both in times["module"])
        yield row


def main() -> int:
    args = arguments()
    names = ("module", "linear", "op", "empty", "finished")
    print(f"{'config':<14} {'M':>4} {'mode':<15}" + "".join(f" {name:>9}" for name in names))
    rows = []
    for case in args.cases.split(","):
        config, _, m = case.rpartition("@")
        for row in rows_of(config, int(m), args):
            rows.append(row)
            shown = (f"{row[f'{name}_us']:9.1f}" if f"{name}_us" in row else f"{'':>9}" for name in names)
            print(f"{config:<14} {m:>4} {row['mode']:<15} " + " ".join(shown), flush=True)
    write(args.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
