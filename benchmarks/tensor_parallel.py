"""Generation with a model cut over GPUs, beside the same model on one, and the time of the sums.

    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --config int4:g128,bf16 --out benchmarks/results/NAME.json

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

from lowbit.decoder_ops import add_rms_norm
from lowbit.models import Session, parallelize_, random_model, shape_of
from lowbit.models.llama import Llama
from lowbit.tools.bench_linear import parse_scheme
from lowbit.tools.timing import synchronize

ROUNDS = 5
TOKENS = (1, 16, 64, 128, 256, 1024)


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


def graph_us(call: Callable[[], object], device: torch.device, times: int = 100) -> float:
    """Microseconds of what ranks do together, in a graph of `times` on a GPU."""

    def run() -> None:
        for _ in range(times):
            call()

    run()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    return statistics.median(seconds_of(run, device) * 1e6 / times for _ in range(ROUNDS))


def exchanges(model: Llama, tokens: int, device: torch.device) -> dict[str, float | int]:
    """Microseconds of a sum and of gathering logits, by the process group and straight between GPUs."""
    ranks, config = model.ranks, model.config
    assert ranks is not None
    like = {"dtype": model.model.norm.weight.dtype, "device": device}
    y, weight = torch.zeros(tokens, config.hidden_size, **like), torch.ones(config.hidden_size, **like)
    logits = torch.zeros(tokens, config.vocab_size // dist.get_world_size(ranks.group), **like)
    everyone = [torch.empty_like(logits) for _ in range(dist.get_world_size(ranks.group))]

    def summed_then_normed() -> None:
        dist.all_reduce(y, group=ranks.group)
        add_rms_norm(y, y, weight, 1e-5)

    row: dict[str, float | int] = {"tokens": tokens}
    row["group_sum_us"] = graph_us(lambda: dist.all_reduce(y, group=ranks.group), device)
    row["group_sum_and_norm_us"] = graph_us(summed_then_normed, device)
    row["group_gather_us"] = graph_us(lambda: dist.all_gather(everyone, logits, group=ranks.group), device, 20)
    if not isinstance(direct := ranks.direct, str):
        row["direct_sum_us"] = graph_us(lambda: direct.add_up(y), device)
        row["direct_sum_and_norm_us"] = graph_us(lambda: direct.add_rms_norm(y, y, weight, 1e-5), device)
        row["direct_gather_us"] = graph_us(lambda: direct.gather(logits), device, 20)
    return row


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
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
    batches = [int(b) for b in args.batch.split(",")]
    rows: list[dict[str, Any]] = []
    sums: list[dict[str, float | int]] = []
    for config in args.config.split(","):
        model = random_model(shape_of(args.model), None if config == "bf16" else parse_scheme(config), device).model
        alone = {b: step_us(model, b, args.prompt, args.steps, device) for b in batches}
        parallelize_(model)
        assert model.ranks is not None
        for b in batches:
            us = step_us(model, b, args.prompt, args.steps, device)
            rows.append({
                "model": args.model, "config": config, "batch": b, "ranks": dist.get_world_size(), "us": us,
                "one_rank_us": alone[b], "speedup": alone[b] / us, "sums": 2 * model.config.num_layers,
            })  # fmt: skip
            say(f"{config} batch {b}: {alone[b]:.0f} us a step on one rank, {us:.0f} on {dist.get_world_size()} "
                f"({alone[b] / us:.2f}x)")  # fmt: skip
        if not sums:
            say(f"between GPUs: {model.ranks.direct if isinstance(model.ranks.direct, str) else 'direct'}")
            for tokens in TOKENS:
                sums.append(exchanges(model, tokens, device))
                say(", ".join(f"{name} {value:.4g}" for name, value in sums[-1].items()))
        del model
    if rank == 0 and args.out is not None:
        name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
        info = {"command": "torchrun " + " ".join(sys.argv), "device": name, "torch": torch.__version__,
                "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip
        args.out.write_text(json.dumps({"info": info, "rows": rows, "exchanges": sums}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
