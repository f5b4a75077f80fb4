"""Decoding in vLLM with its own kernels and with lowbit's plugin, beside lowbit's own session.

    python benchmarks/vllm_decode.py --out benchmarks/results/NAME.json
    python benchmarks/vllm_decode.py --cases int4wo-128-sym@vllm,int4wo-128-sym@plugin --plain

Each case is a process of its own. vLLM's models come from a `config.json` alone: it fills their weights with dummies,
and quantized ones are filled with random codes here, because a GPU draws less power where it multiplies zeros. Every
engine gets the same directory, in the convention of compressed-tensors; the output projection stays in bf16. All linear
layers of the session have the same scheme and random weights.

A step is the difference between a long and a short generation divided by the difference of their lengths, so that it
includes what the engine does on the host. `graph_us` is the CUDA graph of a step by itself, in vLLM without the output
projection and the choice of a token. `prefill_ms` is a request for one token. `--plain` is vLLM without torch.compile;
it captures graphs either way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.checkpoints.config_groups import section
from lowbit.checkpoints.manifest import StoredWeight
from lowbit.models import Session, random_model, shape_of
from lowbit.tools.bench_generate import first_token
from lowbit.tools.bench_linear import parse_scheme
from lowbit.tools.bench_rows import about, reason_of
from lowbit.tools.timing import synchronize

CONFIGS = "bf16,int4wo-128-sym,int4wo-128,float8dq-row"
ENGINES = "vllm,plugin,session"
ROUNDS = 5
#: Tokens of the short generation: the first steps are not like the rest.
SHORT = 8
ROW = "ROW "
#: So that functions can be sent to vLLM's processes, and that it asks no network. A variable that is set stays.
ENVIRONMENT = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--configs", default=CONFIGS)
    parser.add_argument("--engines", default=ENGINES)
    parser.add_argument("--cases", default="", help="config@engine; instead of every config with every engine")
    parser.add_argument("--batch", default="1,16,64,128")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--layers", type=int, help="fewer than the model has, to try the program")
    parser.add_argument("--plain", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--one-process", action="store_true", help="vLLM's engine in the process that asks it")
    parser.add_argument("--memory", type=float, default=0.4, help="share of the GPU that vLLM may take")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds of one case")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no case begins later")
    parser.add_argument("--device", default="cuda", help="of the session")
    parser.add_argument("--logs", type=Path, help="a directory for what every process prints")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


# What is measured -----------------------------------------------------------------------------------------------------


def directory_of(model: str, config: str, layers: int | None, path: Path) -> Path:
    """A model as a `config.json`, without weights.

    Raises:
        ValueError: compressed-tensors has no word for the config.
    """
    shape = shape_of(model)
    assert not shape.qk_norm, f"{model} is no Llama"
    found: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size, "num_hidden_layers": layers or shape.num_layers,
        "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_positions, "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if config != "bf16":
        scheme = parse_scheme(config)
        stored = StoredWeight(*scheme, (shape.hidden_size, shape.hidden_size), torch.bfloat16)
        found["quantization_config"] = section({"every.weight": stored}, ["lm_head"], by_class=True)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(found, indent=1) + "\n")
    return path


def row(batch: int, step_us: float, prefill_s: float, graph_us: float | None = None) -> dict[str, Any]:
    return {"batch": batch, "us_per_step": step_us, "tok_per_s": batch / step_us * 1e6, "graph_us": graph_us,
            "prefill_ms": prefill_s * 1e3}  # fmt: skip


def by_session(args: argparse.Namespace, config: str) -> Iterator[dict[str, Any]]:
    device = torch.device(args.device)
    shape = shape_of(args.model)
    if args.layers:
        shape = type(shape)(**{**vars(shape), "num_layers": args.layers})
    model = random_model(shape, None if config == "bf16" else parse_scheme(config), device).model
    size = (shape.vocab_size, shape.hidden_size)
    head = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)
    model.lm_head.weight = nn.Parameter(head, requires_grad=False)
    for batch in map(int, args.batch.split(",")):
        session = Session(model, batch, args.prompt + SHORT + args.steps + 1)
        ids = torch.tensor([prompt_of(i, args.prompt, shape.vocab_size) for i in range(batch)], device=device)

        def seconds(steps: int, session: Session = session, ids: torch.Tensor = ids) -> float:
            session.prefill(ids)
            synchronize(device)
            started = time.perf_counter()
            for _ in range(steps):
                session.step()
            session.token.tolist()
            return time.perf_counter() - started

        first_token(session, ids)
        seconds(SHORT)
        steps = statistics.median(seconds(SHORT + args.steps) - seconds(SHORT) for _ in range(ROUNDS))
        first = statistics.median(first_token(session, ids) for _ in range(ROUNDS))
        yield row(batch, steps / args.steps * 1e6, first, session_graph_us(session, args.steps))
        del session


def session_graph_us(session: Session, times: int) -> float | None:
    """Microseconds of a step on the device, right behind a prompt; None where there is no graph."""
    if not session.uses_graph:
        return None
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    session.step()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        session.step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / times


def by_vllm(args: argparse.Namespace, config: str, engine: str, path: Path) -> Iterator[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    batches = [int(b) for b in args.batch.split(",")]
    compilation: dict[str, Any] = {"cudagraph_capture_sizes": sorted(batches)}
    if args.plain:
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    llm = LLM(
        model=str(directory_of(args.model, config, args.layers, path)), skip_tokenizer_init=True, load_format="dummy",
        quantization="lowbit" if engine == "plugin" else None, dtype="bfloat16", seed=0,
        max_model_len=args.prompt + SHORT + args.steps + 16, max_num_seqs=max(batches),
        max_num_batched_tokens=max(max(batches) * args.prompt, 2048), gpu_memory_utilization=args.memory,
        enable_prefix_caching=False, disable_log_stats=True, compilation_config=compilation,
    )  # fmt: skip
    print("filled:", llm.collective_rpc(fill_codes)[0], flush=True)
    vocabulary = shape_of(args.model).vocab_size

    def seconds(batch: int, new: int) -> float:
        prompts = [{"prompt_token_ids": prompt_of(i, args.prompt, vocabulary)} for i in range(batch)]
        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        out = llm.generate(prompts, sampling, use_tqdm=False)
        passed = time.perf_counter() - started
        assert all(len(o.outputs[0].token_ids) == new for o in out)
        return passed

    for batch in batches:
        seconds(batch, SHORT)
        first = statistics.median(seconds(batch, 1) for _ in range(ROUNDS))
        # Last, since the graph reads what the last step has left: behind a prompt, more tokens than it has room for.
        steps = statistics.median(seconds(batch, SHORT + args.steps) - seconds(batch, SHORT) for _ in range(ROUNDS))
        graph = llm.collective_rpc(replay_us, args=(batch,))[0]
        yield row(batch, steps / args.steps * 1e6, first, graph)


def prompt_of(sequence: int, length: int, vocabulary: int) -> list[int]:
    draw = random.Random(sequence)
    return [draw.randrange(vocabulary) for _ in range(length)]


def fill_codes(worker: Any) -> dict[str, int]:
    """In vLLM's process: random codes in quantized weights. The counts, by dtype."""
    found: dict[str, int] = {}
    runner = worker.model_runner
    model = runner.get_model() if hasattr(runner, "get_model") else runner.model
    for name, p in model.named_parameters():
        if p.numel() < 1 << 16 or any(word in name for word in ("scale", "zero", "zp", "norm")):
            continue
        with torch.no_grad():
            for start in range(0, p.shape[0], 4096):  # as few temporaries as possible
                part = p.data[start : start + 4096]
                if part.dtype.is_floating_point:
                    part.copy_(torch.randn(part.shape, device=part.device).mul_(0.02 if part.itemsize > 1 else 1.0))
                else:
                    few = torch.iinfo(part.dtype)
                    part.copy_(torch.randint(few.min, few.max, part.shape, dtype=part.dtype, device=part.device))
        found[str(p.dtype)] = found.get(str(p.dtype), 0) + 1
    return found


def replay_us(worker: Any, batch: int, times: int = 20) -> float | None:
    """In vLLM's process: microseconds of a step's CUDA graph; None where its runner has no such graph."""
    runner = worker.model_runner
    graphs = getattr(getattr(runner, "cudagraph_manager", None), "graphs", None)
    if graphs is None:
        entries = getattr(runner.model, "concrete_cudagraph_entries", {})
        graphs = {d: e.cudagraph for d, e in entries.items() if e.cudagraph is not None}
    full = [g for d, g in graphs.items() if d.num_tokens == batch and d.num_reqs in (None, batch)]
    if not full:
        return None
    # Not a function of this file: this one is sent to another process, by itself.
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    full[0].replay()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        full[0].replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / times


# Processes ------------------------------------------------------------------------------------------------------------


def run_case(args: argparse.Namespace) -> int:
    """One case, in a process of its own: a line for each batch."""
    config, _, engine = args.case.partition("@")
    if engine == "session":
        with torch.inference_mode():
            for found in by_session(args, config):
                print(ROW + json.dumps(found), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as path:
        for found in by_vllm(args, config, engine, Path(path)):
            print(ROW + json.dumps(found), flush=True)
    return 0


def of_process(case: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a case as they come, and one with an error if it fails or takes too long."""
    environment = ENVIRONMENT | dict(os.environ)
    if args.one_process:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    process = subprocess.Popen(
        [sys.executable, *sys.argv, "--case", case], env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    started = time.monotonic()
    watch = threading.Timer(args.limit, kill, [process])
    watch.start()
    lines: list[str] = []
    kernels: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith(ROW):
            yield json.loads(line.removeprefix(ROW)) | {"seconds": time.monotonic() - started, "kernels": kernels}
        elif " Using " in line and "]" in line:
            kernels.append(line.partition("]")[2].strip())
    code = process.wait()
    watch.cancel()
    kill(process)  # what it started and left
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
        (args.logs / f"{case.replace('@', '_').replace(':', '-')}.log").write_text("".join(lines))
    if code:
        why = f"took more than {args.limit:g} s" if code == -signal.SIGKILL else f"ended with {code}"
        yield {"error": f"{case} {why}: " + "".join(lines[-25:])}


def kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("vllm", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def main() -> int:
    args = arguments()
    if args.case:
        try:
            return run_case(args)
        except Exception as error:
            print(reason_of(error), flush=True)
            raise
    cases = args.cases.split(",") if args.cases else [
        f"{config}@{engine}" for config, engine in product(args.configs.split(","), args.engines.split(","))
        if (config, engine) != ("bf16", "plugin")
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + args.seconds
    print(f"{'config':<16} {'engine':<8} {'batch':>5} {'us/step':>9} {'tok/s':>9} {'graph us':>9} {'prefill ms':>10}")
    for case in cases:
        config, _, engine = case.partition("@")
        if time.monotonic() > deadline:
            print(f"{case}: no time left", flush=True)
            continue
        mode = "" if engine == "session" else "plain" if args.plain else "compiled"
        for found in of_process(case, args):
            found = {"model": args.model, "config": config, "engine": engine, "mode": mode} | found
            rows.append(found)
            if "error" in found:
                print(found["error"], flush=True)
            else:
                graph = "" if found["graph_us"] is None else f"{found['graph_us']:9.1f}"
                print(f"{config:<16} {engine:<8} {found['batch']:>5} {found['us_per_step']:9.1f} "
                      f"{found['tok_per_s']:9.0f} {graph:>9} {found['prefill_ms']:10.2f}", flush=True)  # fmt: skip
            if args.out is not None:
                facts = about(torch.device(args.device), "python " + " ".join(sys.argv))
                args.out.write_text(json.dumps({"info": facts | versions(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
