"""What each algorithm keeps of a language model, per config: perplexity, KL divergence and top-1 agreement.

    python benchmarks/accuracy.py MODEL --out benchmarks/results/NAME.json

MODEL is what the command line takes. Calibration and evaluation use different parts of the packaged text, or the files
given. Every row starts from the original; all are compared with it token by token. Behind an algorithm, `+blocks` is
`tune_blocks_` and `+tune` is `tune_scales_`, each on text that nothing before it has seen. `--peers` adds other
libraries that are installed, as accuracy_peers.py has them. Rows that the output file has already, measured in the same
way, are kept: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accuracy_peers import VARIANTS
from torch import nn

from lowbit.linear import beside, nbytes_beside
from lowbit.quantize import quantize_
from lowbit.recipe import ROUNDINGS, parse_recipe
from lowbit.specs import parse_config
from lowbit.tensor import QuantizedTensor
from lowbit.tools.evaluate import evaluate, held_out_text, reference_of
from lowbit.tools.sources import find_source, rules_for, variant
from lowbit.tools.tasks import TaskResult, run_tasks
from lowbit.tune import tune_scales_
from lowbit.tune_blocks import tune_blocks_

CONFIGS = "int4wo-128,int4wo-32,int3wo-64,int2wo-32-asym,nf4wo-64,mxfp4wo,nvfp4wo"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--configs", default=CONFIGS)
    parser.add_argument("--algorithms", default=",".join(ROUNDINGS), help="words as quantize_ takes them")
    parser.add_argument("--peers", help="libraries, joined by commas: torchao, hqq, bitsandbytes, optimum-quanto")
    parser.add_argument("--block-tokens", type=int, default=32768, help="behind those that algorithms see, for +blocks")
    parser.add_argument("--tune-tokens", type=int, default=16384, help="behind these, for +tune")
    parser.add_argument("--tasks", help="multiple choice of lm-eval, joined by commas")
    parser.add_argument("--task-folder", type=Path, help="where YAML files define them; default: lm-eval's own")
    parser.add_argument("--task-limit", type=int, help="only the first so many questions of each")
    parser.add_argument("--text", type=Path, help="what is evaluated; default: the packaged prose")
    parser.add_argument("--calibration", type=Path, help="what algorithms see; default: the end of the packaged prose")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()
    source = find_source(args.model)
    original, tokenizer = source.model(), source.tokenizer()
    ids = torch.tensor(tokenizer.encode(args.text.read_text() if args.text else held_out_text()))
    wanted = args.calibration_tokens // args.window * args.window
    algorithms = {a: stages_of(a) for a in args.algorithms.split(",")}
    sizes = {"+blocks": args.block_tokens, "+tune": args.tune_tokens}
    sizes = {stage: size for stage, size in sizes.items() if any(stage in stages for stages in algorithms.values())}
    more = sum(sizes.values())
    seen = torch.tensor(tokenizer.encode(args.calibration.read_text())) if args.calibration else ids[-wanted - more :]
    if not args.calibration and len(ids) < args.tokens + wanted + more:
        parser.error("the text is too short to keep what is evaluated apart from what algorithms see")
    # Half as long: as many tokens make twice as many steps.
    texts, at = dict[str, list[torch.Tensor]](), wanted
    for stage, size in sizes.items():
        texts[stage] = list(seen[at : at + size].view(1, -1).split(args.window // 2, 1))
        at += size
    seen = seen[:wanted]
    measured = ids[: args.tokens]
    reference = reference_of(original, measured, args.window)
    rows: list[dict[str, Any]] = []
    answers: list[TaskResult] = []  # of the original

    def add(config: str, algorithm: str, seconds: float, model: torch.nn.Module, bits: float) -> None:
        q = evaluate(model, measured, reference, args.window)
        # `seconds` is the time of the quantization, not of the evaluation.
        rows.append({"config": config, "algorithm": algorithm, "bits_per_weight": bits, **vars(q), "seconds": seconds})
        if args.tasks:
            asked = args.tasks.split(",")
            found = run_tasks(model, tokenizer, asked, folder=args.task_folder, limit=args.task_limit)
            answers.extend(found if not answers else [])
            rows[-1]["tasks"] = [vars(r.against(o)) for r, o in zip(found, answers)]
        kl = "" if q.kl_mean is None else f"KL {q.kl_mean:.4f} top-1 {100 * (q.top1_agreement or 0):.1f} %"
        print(f"{config:16} {algorithm:24} perplexity {q.perplexity:10.2f} {kl} {seconds:.0f} s", flush=True)
        if args.out:
            args.out.write_text(json.dumps({"info": info, "rows": rows}, indent=1) + "\n")

    info = {
        "command": "python " + " ".join(sys.argv), "model": source.path.resolve().name, "torch": torch.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
        "tokens": args.tokens, "calibration_tokens": len(seen), "window": args.window,
        "text": args.text.name if args.text else "packaged", "calibration": args.calibration and args.calibration.name,
    }  # fmt: skip
    info |= {f"{stage[1:].removesuffix('s')}_tokens": size for stage, size in sizes.items()}
    if args.tasks:
        info |= {"tasks": args.tasks, "task_limit": args.task_limit, "lm_eval": importlib.metadata.version("lm-eval")}
    libraries = args.peers.split(",") if args.peers else []
    if libraries:
        info["peers"] = {name: importlib.metadata.version(name) for name in libraries}
    if args.out and args.out.exists():
        kept = json.loads(args.out.read_text())
        if any(kept["info"].get(key) != value for key, value in info.items() if key not in ("command", "date")):
            parser.error(f"{args.out} was measured in another way: {kept['info']}; give another --out")
        info, rows = kept["info"] | {"command": info["command"]}, kept["rows"]
        answers = [TaskResult(**t | {"choices": tuple(t["choices"])}) for t in rows[0].get("tasks", [])]
    done = {(row["config"], row["algorithm"]) for row in rows}
    if not rows:
        add("bf16", "", 0.0, original, 16.0)
    model, last = original, ("", tuple[str, ...]())  # what the model at hand is
    for config, algorithm in product(args.configs.split(","), algorithms):
        if (config, algorithm) in done:
            continue
        started, stages = time.perf_counter(), algorithms[algorithm]
        for i, stage in enumerate(stages):
            if last == (config, stages[:-1]) and i + 1 < len(stages):
                continue  # the row before ends where the last stage begins
            if stage == "+blocks":
                tune_blocks_(model, original, texts[stage])
            elif stage == "+tune":
                tune_scales_(model, original, texts[stage])
            else:
                model, windows = variant(original), list(seen.view(-1, 1, args.window))
                batches = windows if parse_recipe(stage).takes_batches else None
                quantize_(model, rules_for(model, config, {}), algorithm=stage, batches=batches, measure=False)
        last = config, stages
        add(config, algorithm, time.perf_counter() - started, model, bits_per_weight(model, config))
    for peer in VARIANTS:
        if peer.library in libraries and (peer.config, peer.name) not in done:
            # Not `variant`: a library may change a weight where it lies.
            model, started = copy.deepcopy(original), time.perf_counter()
            names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
            peer.change(model, names)
            add(peer.config, peer.name, time.perf_counter() - started, model, peer.bits_per_weight)
    return 0


def stages_of(algorithm: str) -> tuple[str, ...]:
    """The word that quantize_ takes, and what follows it: `"awq+gptq+blocks+tune"`."""
    word = algorithm.removesuffix("+tune").removesuffix("+blocks")
    rest = algorithm.removeprefix(word)
    return word, *(stage for stage in ("+blocks", "+tune") if stage in rest)


def bits_per_weight(model: nn.Module, config: str) -> float:
    """Those of the format, and what lies beside the weights of all layers that have it."""
    weights = [m.weight.numel() for m in model.modules() if isinstance(getattr(m, "weight", None), QuantizedTensor)]
    more = sum(nbytes_beside(beside(m).values()) for m in model.modules())
    return parse_config(config).scheme.weight.bits_per_weight + 8 * more / sum(weights)


if __name__ == "__main__":
    raise SystemExit(main())
