"""Configs per layer against one config for all: size and KL divergence of a real model.

    python benchmarks/autoquant.py MODEL --out benchmarks/results/NAME.json

Sensitivities are measured on the end of the packaged text, the whole models on its beginning. For each uniform config
the plan of at most its bytes is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from lowbit.tools.autoquant import FLOAT, autoquant, measured
from lowbit.tools.evaluate import held_out_text, reference_of
from lowbit.tools.sources import find_source


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--configs", default="int3wo-64,int4wo-128,int4wo-32,int6wo-128,int8wo")
    parser.add_argument("--tokens", type=int, default=1024, help="of the evaluation")
    parser.add_argument("--calibration-tokens", type=int, default=256)
    args = parser.parse_args()
    source, started = find_source(args.model), time.perf_counter()
    model = source.model()
    ids = torch.tensor(source.tokenizer().encode(held_out_text()))
    configs = args.configs.split(",")
    found = autoquant(model, ids[-args.calibration_tokens :], configs, window=args.calibration_tokens)
    seconds = time.perf_counter() - started
    print(f"measured in {seconds:.0f} s", flush=True)
    reference, rows = reference_of(model, ids[: args.tokens]), []
    info = {
        "command": " ".join(["python", *sys.argv]), "model": "SmolLM2-135M-Instruct" if args.model == "demo" else
        args.model, "torch": torch.__version__, "threads": torch.get_num_threads(), "seconds_measuring": seconds,
        "date": time.strftime("%Y-%m-%d"), "float_bytes": found.uniform(FLOAT).bytes,
    }  # fmt: skip
    for config in [g.config for g in found.groups[0].candidates if g.config != FLOAT]:
        uniform = measured(model, found, found.uniform(config), reference)
        plan = measured(model, found, found.within(max_bytes=uniform.bytes), reference)
        rows.append({"config": config, "uniform": dataclasses.asdict(uniform), "chosen": dataclasses.asdict(plan)})
        print(config, uniform.bytes, uniform.kl, uniform.measured_kl, plan.bytes, plan.kl, plan.measured_kl, flush=True)
        out = {"info": info, "rows": rows, "groups": [dataclasses.asdict(g) for g in found.groups]}
        args.out.write_text(json.dumps(out, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
