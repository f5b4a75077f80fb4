"""Profiles a Llama of random weights as lowbit or torchao quantizes it: a page per scheme, and a line per scheme.

    python benchmarks/profile_peers.py torchao:Float8WeightOnlyConfig lowbit:float8wo bf16 --size 8b --out profiles

A scheme is `bf16`, `lowbit:` and a config's short name, or `torchao:` and a config's class. The output projection is
quantized too. Pages, data and traces go into the folder.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn

import lowbit
from lowbit.models import Llama, LlamaConfig
from lowbit.tools.profile import Files, profile
from lowbit.tools.profile.language import RECORDED, reads_and_generates
from lowbit.tools.profile.report import write_json, write_report
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
        seconds = {t.phase: t.seconds for t in found.phases}
        peaks = {m.phase: m.peak / 1e9 for m in found.timeline.phases}
        speeds = ", ".join(
            f"{phase} {n / seconds[phase]:.1f} tokens/s, peak {peaks.get(phase, 0):.2f} GB"
            for phase, n in tokens.items()
            if phase in seconds
        )
        print(f"{scheme}: {found.verdicts.summary}; {speeds}; {time.perf_counter() - started:.0f} s in all")
        print(f"  attributed {100 * found.attributed:.1f} % of the time, "
              f"{100 * min((m.attributed for m in found.timeline.phases), default=1):.1f} % of the bytes")  # fmt: skip
        for i, s in enumerate(found.suggestions, 1):
            print(f"  {i}. {s.gain}\n     {s.text}")
        if found.error:
            print(f"  ended early: {found.error}")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
