"""Profiles a Llama of random weights as lowbit or torchao quantizes it: a page per scheme, and a line per scheme.

    python benchmarks/profile_peers.py torchao:Float8WeightOnlyConfig lowbit:float8wo bf16 --size 8b --out profiles

A scheme is `bf16`, `lowbit:` and a config's short name, or `torchao:` and a config's class. The output projection is
quantized too. Pages, data, traces and a picture of the memory go into the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowbit
from lowbit.models import Llama, LlamaConfig
from lowbit.tools.page import standalone
from lowbit.tools.profile import Files, profile
from lowbit.tools.profile.language import RECORDED, reads_and_generates
from lowbit.tools.profile.report import memory_plot, write_json, write_report
from lowbit.tools.profile.session import Phase

# vocabulary, hidden, intermediate, layers, heads, key/value heads, head size; the first two are Llama-3.1-8B and 3.2-1B
SIZES = {
    "8b": (128256, 4096, 14336, 32, 32, 8, 128),
    "1b": (128256, 2048, 8192, 16, 32, 8, 64),
    "tiny": (1024, 256, 512, 4, 8, 4, 32),
}


def random_model(size: str, device: str) -> Llama:
    config = LlamaConfig(*SIZES[size], max_positions=8192, norm_eps=1e-5, rope_theta=500000.0)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Llama(config).bfloat16()
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        p.requires_grad_(False)
        p.fill_(1.0) if "norm" in name else p.normal_(0.0, 0.02)
    return model.eval()


def quantize(model: nn.Module, scheme: str) -> None:
    library, _, config = scheme.partition(":")
    if library == "lowbit":
        lowbit.quantize_(model, config, measure=False)
    elif library == "torchao":
        import torchao.quantization

        torchao.quantization.quantize_(model, getattr(torchao.quantization, config)())
    elif scheme != "bf16":
        raise SystemExit(f"{scheme}: give bf16, lowbit:CONFIG or torchao:CONFIG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schemes", nargs="+")
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("profiles"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokens = {"prefill": args.prompt_tokens, "decode": args.new_tokens}
    run = reads_and_generates(args.prompt_tokens, args.new_tokens)
    rows = []
    for scheme in args.schemes:

        def load(phase: Phase, scheme: str = scheme) -> nn.Module:
            with phase("load"):
                model = random_model(args.size, args.device)
            with phase("quantize"):
                quantize(model, scheme)
            return model

        page = args.out / f"{args.size}_{scheme.replace(':', '_')}.html"
        snapshot = page.with_suffix(".snapshot.pickle") if args.device.startswith("cuda") else None
        trace, few = page.with_suffix(".trace.json.gz"), min(args.new_tokens, RECORDED)
        started = time.perf_counter()
        found = profile(
            load, run, device=args.device, title=f"{args.size} {scheme}", tokens=tokens, files=Files(trace, snapshot),
            recorded=reads_and_generates(args.prompt_tokens, few), recorded_tokens=tokens | {"decode": few},
        )  # fmt: skip
        write_report(found, page)
        write_json(found, page.with_suffix(".json"))
        page.with_suffix(".memory.svg").write_text(standalone(memory_plot(found)))
        row = summary(json.loads(page.with_suffix(".json").read_text())) | {"report_s": time.perf_counter() - started}
        rows.append(row)
        speeds = ", ".join(f"{phase} {speed:.1f} tokens/s" for phase, speed in row["tokens_per_second"].items())
        print(f"{scheme}: {row['verdicts']}; {speeds}; {row['report_s']:.0f} s in all")
        print(f"  attributed {100 * row['time_attributed']:.1f} % of the time, "
              f"{100 * row['bytes_attributed']:.1f} % of the bytes")  # fmt: skip
        for i, (gain, text) in enumerate(row["suggestions"], 1):
            print(f"  {i}. {gain}\n     {text}")
        if found.error:
            print(f"  ended early: {found.error}")
        torch.cuda.empty_cache()
    (args.out / "summary.json").write_text(
        json.dumps({"command": "python " + " ".join(sys.argv), "rows": rows}, indent=1) + "\n"
    )


def summary(profile: dict[str, Any]) -> dict[str, Any]:
    """What a profile's data say in a few numbers."""
    seconds = {phase["phase"]: phase["seconds"] for phase in profile["phases"]}
    phases = [phase for phase in profile["memory"]["phases"] if phase["phase"]]
    spikes = {phase["phase"]: phase["spikes"][0] for phase in phases if phase["spikes"]}
    return {
        "title": profile["title"], "machine": profile["machine"], "verdicts": profile["verdicts"]["summary"],
        "tokens_per_second": {p: n / seconds[p] for p, n in profile["tokens"].items() if p in seconds},
        "peak_bytes": {phase["phase"]: phase["peak"] for phase in phases},
        "spikes": {p: {"bytes": s["bytes"], "at": s["stack"][0] if s["stack"] else ""} for p, s in spikes.items()},
        "time_attributed": profile["time_attributed"],
        "bytes_attributed": min((phase["attributed"] for phase in phases), default=1.0),
        "suggestions": [(s["gain"], s["text"]) for s in profile["suggestions"]],
    }  # fmt: skip


if __name__ == "__main__":
    main()
