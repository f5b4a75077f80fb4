"""Generation with a model cut over GPUs, beside the same model on one: steps per second and the time of the sums.

    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --config int4:g128 --out benchmarks/results/NAME.json

Every rank makes the same random weights of a known shape. Without GPUs it runs on gloo, to see that it does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lowbit.models import Session, parallelize_, random_model, shape_of
from lowbit.models.llama import Llama, added_up
from lowbit.tools.bench_linear import parse_scheme
from lowbit.tools.timing import synchronize

ROUNDS = 5


def step_us(model: Llama, batch: int, prompt: int, steps: int, device: torch.device) -> float:
    """Microseconds of a step, the median over generations; a rank waits for the others at the beginning."""
    session = Session(model, batch, prompt + steps + 1)
    ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)

    def run() -> None:
        for _ in range(steps):
            session.step()

    found = []
    for _ in range(ROUNDS):
        session.prefill(ids)
        found.append(seconds_of(run, device) * 1e6 / steps)
    return statistics.median(found)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def sum_us(model: Llama, batch: int, device: torch.device, times: int = 100) -> float:
    """Microseconds of one sum over ranks of what a step adds up, in a graph of `times` on a GPU."""
    x = torch.zeros(batch, 1, model.config.hidden_size, dtype=model.model.norm.weight.dtype, device=device)

    def run() -> None:
        for _ in range(times):
            added_up(x, model.ranks)

    run()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    return statistics.median(seconds_of(run, device) * 1e6 / times for _ in range(ROUNDS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--config", default="int4:g128")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    scheme = None if args.config == "bf16" else parse_scheme(args.config)
    model = random_model(shape_of(args.model), scheme, device).model
    batches = [int(b) for b in args.batch.split(",")]
    alone = {b: step_us(model, b, args.prompt, args.steps, device) for b in batches}
    parallelize_(model)
    rows: list[dict[str, Any]] = []
    for b in batches:
        us = step_us(model, b, args.prompt, args.steps, device)
        rows.append({
            "model": args.model, "config": args.config, "batch": b, "ranks": dist.get_world_size(), "us": us,
            "one_rank_us": alone[b], "speedup": alone[b] / us, "sum_us": sum_us(model, b, device),
            "sums": 2 * model.config.num_layers,
        })  # fmt: skip
        if rank == 0:
            row = rows[-1]
            print(f"{args.config} batch {b}: {alone[b]:.0f} us a step on one rank, {us:.0f} on {row['ranks']} "
                  f"({row['speedup']:.2f}x); {row['sums']} sums of {row['sum_us']:.1f} us", flush=True)  # fmt: skip
    if rank == 0 and args.out is not None:
        name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
        info = {"command": "torchrun " + " ".join(sys.argv), "device": name, "torch": torch.__version__,
                "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip
        args.out.write_text(json.dumps({"info": info, "rows": rows}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
