"""What a round of speculative decoding costs beside a step, and from which acceptance on it pays.

    python benchmarks/speculative.py --target llama-3.1-8b=int8wo --draft llama-3.2-1b=int4:g128

Models have random weights, which are as fast as real ones. How many proposals are accepted depends on real weights and
texts: here is what follows for every rate. `step`, `read` (the target's pass over the proposals and one token more) and
`round` (everything, the host's wait included) are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowbit.models import Llama, Sampling, Session, random_model, shape_of
from lowbit.models.speculative import Speculative
from lowbit.tools.bench_linear import parse_scheme
from lowbit.tools.bench_rows import about
from lowbit.tools.timing import synchronize

RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def made(word: str, device: torch.device) -> Llama:
    """The model of `SHAPE=CONFIG`; bf16 is a config, too."""
    shape, _, config = word.partition("=")
    return random_model(shape_of(shape), None if config == "bf16" else parse_scheme(config), device).model


def expected_tokens(rate: float, proposals: int) -> float:
    """Tokens of a round where each proposal is accepted with probability `rate` (Leviathan et al., equation 1)."""
    return sum(rate**i for i in range(proposals + 1))


def median_us(run: Callable[[], object], before: Callable[[], object], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        before()
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times)


def measure(target: Llama, draft: Llama, proposals: int, args: argparse.Namespace) -> dict[str, float]:
    """Microseconds of a round and its parts, always from behind the prompt."""
    device, prompt = torch.device(args.device), args.prompt
    sessions = [Session(model, 1, prompt + 2 * proposals + 4) for model in (target, draft)]
    speculative = Speculative(sessions[0], sessions[1], proposals)
    speculative.prefill(torch.ones(1, prompt, dtype=torch.int64, device=device))
    random, sampling = torch.Generator(device), Sampling(args.temperature)
    some = torch.ones(1, proposals + 1, dtype=torch.int64, device=device)

    def rewind() -> None:
        for session in sessions:
            session.rewind(prompt + 1, some[:, 0])

    parts: dict[str, Callable[[], object]] = {
        "step": sessions[0].step,
        "draft_step": sessions[1].step,
        "read": lambda: sessions[0].read(some, prompt),
        "draft_read": lambda: sessions[1].read(some[:, :2], prompt - 1),
        "round": lambda: speculative.round(sampling, random),
    }
    times = {}
    for name, run in parts.items():
        median_us(run, rewind, device, 2)
        times[name] = median_us(run, rewind, device, args.rounds)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="llama-3.1-8b=int8wo", metavar="SHAPE=CONFIG")
    parser.add_argument("--draft", action="append", metavar="SHAPE=CONFIG")
    parser.add_argument("--draft-tokens", default="1,2,3,4,6")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        target = made(args.target, device)
        for word in args.draft or ["llama-3.1-8b=int4:g128", "llama-3.2-1b=int4:g128"]:
            draft = made(word, device)
            for proposals in map(int, args.draft_tokens.split(",")):
                us = measure(target, draft, proposals, args)
                gains = {f"{rate:g}": expected_tokens(rate, proposals) * us["step"] / us["round"] for rate in RATES}
                row = {"target": args.target, "draft": word, "draft_tokens": proposals, "us": us, "speedup_at": gains}
                rows.append(row)
                times = ", ".join(f"{name} {t:.0f}" for name, t in us.items())
                print(f"{args.target} with {word} x {proposals}: {times} us; speed-up at acceptance "
                      + ", ".join(f"{rate}: {gain:.2f}" for rate, gain in gains.items()), flush=True)  # fmt: skip
            del draft
    if args.out is not None:
        facts = about(device, "python " + " ".join(sys.argv))
        args.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
