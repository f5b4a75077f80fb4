"""Configs and algorithms per layer against one of them for all: size, time and KL divergence of a real model.

    python benchmarks/autoquant.py MODEL --out benchmarks/results/NAME.json

What is evaluated, what sensitivities are measured on and what algorithms see are different parts of the packaged text,
or of the files given. For each config there are uniform models, one per algorithm, the plan of at most their bytes, and
the plan of at most their time. The layers of all of them are timed in turns. Measurements that the output file has
already are kept: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.quantize import quantize_
from lowbit.recipe import parse_recipe
from lowbit.specs import parse_config
from lowbit.tools.autoquant import autoquant, layers_us, quantized_by
from lowbit.tools.autoquant_plan import FLOAT, Candidate, Group, Measurements, Plan
from lowbit.tools.evaluate import evaluate, held_out_text, reference_of
from lowbit.tools.sources import find_source, variant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--configs", default="int3wo-64,int4wo-128,int4wo-32,int8wo")
    parser.add_argument("--algorithms", default="rtn,awq+gptq")
    parser.add_argument("--text", type=Path, help="what is evaluated; default: the packaged prose")
    parser.add_argument("--calibration", type=Path, help="the other text; default: the end of the packaged prose")
    parser.add_argument("--tokens", type=int, default=1024, help="of the evaluation")
    parser.add_argument("--calibration-tokens", type=int, default=256, help="that sensitivities are measured on")
    parser.add_argument("--algorithm-tokens", type=int, default=4096, help="that algorithms see")
    args = parser.parse_args()
    source, started = find_source(args.model), time.perf_counter()
    model, encode = source.model(), source.tokenizer().encode
    ids = torch.tensor(encode(args.text.read_text() if args.text else held_out_text()))
    other = torch.tensor(encode(args.calibration.read_text())) if args.calibration else ids[len(ids) // 2 :]
    specs, words = [parse_config(c).spec for c in args.configs.split(",")], args.algorithms.split(",")
    seen = any(parse_recipe(word).takes_batches for word in words)
    batches = list(other[: args.algorithm_tokens][None].split(1024, 1)) if seen else None
    out: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}

    def save() -> None:
        args.out.write_text(json.dumps(out, indent=1) + "\n")

    if "groups" not in out:
        sensitive = other[-args.calibration_tokens :]
        found = autoquant(model, sensitive, specs, algorithms=words, batches=batches, window=1024, progress=tell)
        out["info"] = {
            "command": " ".join(["python", *sys.argv]), "model": source.path.resolve().name,
            "torch": torch.__version__, "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
            "seconds_measuring": time.perf_counter() - started, "float_bytes": found.uniform(FLOAT).bytes,
            "tokens": args.tokens, "calibration_tokens": args.calibration_tokens,
            "algorithm_tokens": args.algorithm_tokens, "text": args.text.name if args.text else "packaged",
            "calibration": args.calibration.name if args.calibration else "packaged",
        }  # fmt: skip
        out["groups"] = [asdict(g) for g in found.groups]
        save()
    groups = [Group(tuple(g["layers"]), tuple(Candidate(**c) for c in g["candidates"])) for g in out["groups"]]
    found = Measurements(tuple(groups), 1)
    choices = [c for c in found.choices if c != FLOAT]
    plans = {f"bytes of {spec}": found.within(max_bytes=found.uniform(spec).bytes) for spec in specs}
    plans |= {f"time of {spec}": found.within(max_us=found.uniform(spec).us) for spec in specs}
    plans |= {name: found.uniform(name) for name in choices}
    if "float_us" not in out["info"]:
        times = timed(model, found, plans)
        out["info"]["float_us"] = {"sum": found.uniform(FLOAT).us, "measured": times.pop(FLOAT)}
        out["info"]["measured_us"] = times
        save()
    reference = reference_of(model, ids[: args.tokens])
    kls = {tuple(r["choices"]): r["measured_kl"] for r in out["rows"]}
    done = {r["name"] for r in out["rows"]}
    # Those that need no algorithm first: they take seconds, the others minutes.
    for name, plan in sorted(plans.items(), key=lambda item: found.takes_batches(item[1])):
        if name in done:
            continue
        if plan.choices not in kls:
            copy = quantized_by(model, found, plan, batches)
            kls[plan.choices] = evaluate(copy, reference.ids, reference).kl_mean
        plan = replace(plan, measured_kl=kls[plan.choices], measured_us=out["info"]["measured_us"][name])
        out["rows"].append({"name": name, **asdict(plan)})
        save()
        print(f"{name:40} {plan.bytes / 1e6:8.2f} MB {plan.us / 1e3:8.3f} ms KL {plan.kl:.4f}, measured "
              f"{plan.measured_kl:.4f}", flush=True)  # fmt: skip
    return 0


def timed(model: nn.Module, found: Measurements, plans: dict[str, Plan]) -> dict[str, float]:
    """Microseconds of the layers of each plan and of the original, in turns. Which algorithm chose the values does not
    matter to that, so rounding to nearest stands for all, with the same things beside the weights."""
    models = {FLOAT: model}
    for name, plan in plans.items():
        models[name] = variant(model)
        words = {layer: str(parse_recipe(word).to_nearest) for layer, word in found.algorithms(plan).items()}
        quantize_(models[name], found.rules(plan), algorithm=words, measure=False)
    return layers_us(models, list(found.rules(found.uniform(FLOAT))), found.tokens)


def tell(done: int, total: int, what: str) -> None:
    print(f"\r{done}/{total} {what:50}", end="\n" if done + 1 == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
