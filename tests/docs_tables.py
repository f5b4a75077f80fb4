"""The tables of the documentation that registries and result files know: rendered here, compared in test_docs.py.

`python tests/docs_tables.py` writes them into their pages after a format, config or result was added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_tests
import torch
from proofs import picked_rows, read_rows, written_rows

from lowbit import parse_config
from lowbit.errors import PAGES
from lowbit.formats import Format, Plane, registered
from lowbit.formats.elements import Element, FloatElement, IntElement, TableElement
from lowbit.specs import EXAMPLES

ROOT = Path(__file__).resolve().parent.parent
Cells = tuple[str, ...]
SCALE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e8m0fnu: "e8m0"}
SCALE_NAMES |= {torch.float8_e4m3fn: "e4m3", torch.int8: "int8", torch.uint8: "uint8"}


def element(e: Element) -> str:
    if isinstance(e, IntElement):
        return f"{e.bits}-bit integer" + ("" if e.symmetric else ", unsigned")
    if isinstance(e, FloatElement):
        return f"{e.bits}-bit float, E{e.exponent_bits}M{e.mantissa_bits}"
    assert isinstance(e, TableElement)
    return f"table of {1 << e.bits}" + (f" vectors of {e.vector}" if e.vector > 1 else "")


def scale(p: Plane) -> str:
    name = "" if p.name == "scale" else p.name.replace("_", " ") + " "
    if p.shape is not None:
        return f"{name}{SCALE_NAMES[p.dtype]} {'x'.join(map(str, p.shape))}"
    over = {(None, None): "the tensor", (1, None): "row"}.get((p.n, p.k))
    over = over or (f"{p.k} along K" if p.n == 1 else f"{p.n}x{p.k} block")
    return f"{name}{SCALE_NAMES[p.dtype]} per {over}".replace("per the tensor", "per tensor")


def format_row(fmt: Format) -> Cells:
    scales = "; ".join(scale(p) for p in fmt.scale_planes)
    return f"`{fmt.spec}`", f"{fmt.bits_per_weight:.4g}", element(fmt.element), scales


def error_rows() -> list[Cells]:
    return [(page.code, f"[{name}](errors/{name}.md)", page.line) for name, page in PAGES.items()]


def config_row(name: str) -> Cells:
    config = parse_config(name)
    weight, act = config.scheme
    return f"`{config.spec}`", f"`{type(config).__name__}`", f"`{weight.spec}`", f"`{act.spec}`" if act else "-"


# Results -----------------------------------------------------------------------------------------


def newest(pattern: str) -> tuple[str, Any]:
    """Name and content of the newest result file of a kind; names hold their date."""
    files = sorted((ROOT / "benchmarks" / "results").glob(pattern))
    assert files, f"no benchmarks/results/{pattern}"
    return files[-1].name, json.loads(files[-1].read_text())


def speed_rows() -> list[Cells]:
    """Of `gpu_smoke.py`: speed-up over bf16 of the chosen kernel (the first measured) with quantized activations."""
    _, result = newest("h100_*_kernels.json")
    speed: dict[tuple[str, str], dict[int, float]] = {}
    for r in result["records"]:
        if r["layer"] == "gate_up" and r["act"]:
            speed.setdefault((r["weight"], r["act"]), {}).setdefault(r["m"], r["speedup"])
    return [
        (f"`{weight}`", f"`{act}`", *(f"{row[m]:.2f}" if m in row else "" for m in (1, 16, 128, 1024)))
        for (weight, act), row in speed.items()
    ]


def linear_records(provider: str, layer: str, tokens: tuple[int, ...]) -> dict[str, list[dict[str, Any]]]:
    """Of `lowbit bench linear`: the records of each format with all of these numbers of tokens."""
    _, result = newest("h100_*_linear.json")
    found: dict[str, list[dict[str, Any]]] = {}
    for r in result["records"]:
        if r["provider"] == provider and r["layer"] == layer and r["m"] in tokens:
            found.setdefault(r["weight"], []).append(r)
    return {weight: records for weight, records in found.items() if len(records) == len(tokens)}


def linear_rows() -> list[Cells]:
    """Time and share of the read floor for one token, time and speed-up over bf16 for 16 and 128."""
    rows = []
    for weight, (one, *more) in linear_records("lowbit", "gate_up", (1, 16, 128)).items():
        cells = [
            f"{one['us']:.1f}",
            f"{one['floor_us']:.1f}",
            f"{100 * one['floor_share']:.0f} %",
            f"{one['speedup']:.2f}",
        ]
        cells += [f"{r['us']:.1f} ({r['speedup']:.2f})" for r in more]
        rows.append((f"`{weight}`", *cells))
    return rows


def layers_rows() -> list[Cells]:
    """Speed-up over bf16 of every layer for 1 to 2048 tokens."""
    layers = ("gate_up", "down", "qkv", "o")
    by_layer = {layer: linear_records("lowbit", layer, (1, 16, 64, 128, 512, 2048)) for layer in layers}
    return [
        (
            f"`{weight}`",
            *(", ".join(f"{r['speedup']:.2f}" for r in by_layer[layer].get(weight, [])) for layer in layers),
        )
        for weight in by_layer["gate_up"]
    ]


def tuned_rows() -> list[Cells]:
    """Of `tune_tiles.py`: the fastest instance for int4, over bf16, and the fastest with packed activations."""
    _, result = newest("h100_*_tune_wgmma.json")
    rows = []
    for r in sorted(result["rows"], key=lambda r: (r["m"], r["layer"])):
        best = {
            packed: min((us, name) for name, us in r["all"].items() if ("packed" in name) == packed)
            for packed in (False, True)
        }
        (us, name), (packed_us, packed_name) = best[False], best[True]
        rows.append((
            str(r["m"]), r["layer"], f"{r['bf16_us']:.1f}", f"{us:.1f} ({r['bf16_us'] / us:.2f})", f"`{tile(name)}`",
            f"{packed_us:.1f}", f"`{tile(packed_name)}`",
        ))  # fmt: skip
    return rows


def tile(instance: str) -> str:
    """The name of an instance without what most have in common."""
    return instance.replace(" packed", "").replace(" warpgroups 2", "").replace(" blocks 1", "")


def roofline_rows() -> list[Cells]:
    """Of `lowbit roofline --llama`: microseconds expected and observed, and both speed-ups, with the activation's
    quantization."""
    _, result = newest("h100_*_roofline.json")
    rows: dict[tuple[str, str], list[str]] = {}
    tokens = (1, 16, 128, 1024, 4096)
    for r in sorted(result["records"], key=lambda r: r["fwd_M"]):
        if r["act"] and not r["error"] and r["fwd_M"] in tokens:
            speed = f"{r['b_q_e2e_s'] * 1e6:.1f} ({r['r_q_gemm_and_ovhd_spdp']:.2f}, {r['b_q_e2e_spdp']:.2f})"
            rows.setdefault((r["recipe"], r["name"]), []).append(speed)
    return [(f"`{recipe}`", layer, *cells) for (recipe, layer), cells in sorted(rows.items())]


def peer_rows() -> list[Cells]:
    """Of `lowbit bench linear --peers`: microseconds of everybody in the same turns."""
    _, result = newest("h100_*_peers.json")
    rows: dict[tuple[str, str, int], dict[str, float]] = {}
    for r in result["records"]:
        if not r["error"]:
            rows.setdefault((r["weight"], r["act"] or "", r["m"]), {})[r["provider"]] = r["us"]
    return [
        (f"`{weight}`", f"`{act}`" if act else "", str(m),
         *(f"{us[p]:.1f}" if p in us else "" for p in ("bf16", "lowbit", "humming", "torchao")))
        for (weight, act, m), us in rows.items()
    ]  # fmt: skip


def codes_rows(gpu: str) -> list[Cells]:
    """Of `lowbit bench linear` with quantized activations: microseconds with their quantization, over bf16."""
    _, result = newest(f"{gpu}_*_linear_codes.json")
    rows: dict[tuple[str, str, str], list[str]] = {}
    for r in result["records"]:
        if r["provider"] == "lowbit":
            rows.setdefault((r["weight"], r["act"], r["layer"]), []).append(f"{r['us']:.1f} ({r['speedup']:.2f})")
    return [
        (f"`{weight}`" if weight == act else f"`{weight}`, `{act}`", layer, *cells)
        for (weight, act, layer), cells in rows.items()
    ]


def h200_layer_rows() -> list[Cells]:
    """Of `lowbit bench linear` in two runs: microseconds of weight-only layers, over bf16."""
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for kind in ("linear", "linear_layers"):
        for r in newest(f"h200_*_{kind}.json")[1]["records"]:
            if r["provider"] == "lowbit" and r["m"] in (1, 16, 128, 512, 2048):
                rows.setdefault((r["weight"], r["layer"]), {})[r["m"]] = f"{r['us']:.1f} ({r['speedup']:.2f})"
    return [(f"`{weight}`", layer, *cells.values()) for (weight, layer), cells in rows.items() if len(cells) == 5]


def h200_batches_rows() -> list[Cells]:
    """Of `lowbit bench generate`: tokens per second of all sequences, and speed-up over bf16, of each the newest."""
    found: dict[str, dict[int, str]] = {}
    for file in sorted((ROOT / "benchmarks" / "results").glob("h200_*_generate_batches.json")):
        for r in json.loads(file.read_text())["records"]:
            found.setdefault(r["config"], {})[r["batch"]] = f"{r['tokens_per_second']:.0f} ({r['speedup']:.2f})"
    return [(f"`{config}`", *(cells.get(b, "") for b in (1, 16, 64, 128))) for config, cells in found.items()]


def energy_rows() -> list[Cells]:
    """Of `energy.py`: what a product costs in a long run."""
    rows: list[Cells] = []
    for r in newest("h200_*_energy.json")[1]["rows"]:
        for name in ("bf16", "cuda_wgmma", "triton_chunked"):
            cost = r[name]
            over = f"{r['bf16']['us'] / cost['us']:.2f}"
            numbers = (f"{cost[k]:.0f}" for k in ("mj", "watts", "mhz"))
            rows.append((f"`{r['format']}`", r["layer"], str(r["m"]), f"`{name}`", f"{cost['us']:.0f}", over, *numbers))
    return rows


def held_rows() -> list[Cells]:
    """Of `lowbit bench linear` from 512 tokens on: microseconds of weight-only layers, over bf16."""
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for r in newest("h200_*_linear_held.json")[1]["records"]:
        if r["provider"] == "lowbit":
            rows.setdefault((r["weight"], r["m"]), {})[r["layer"]] = f"{r['us']:.1f} ({r['speedup']:.2f})"
    return [
        (f"`{weight}`", str(m), *(cells[layer] for layer in ("gate_up", "down", "qkv", "o")))
        for (weight, m), cells in rows.items()
    ]


def decode_attention_rows() -> list[Cells]:
    """Of `decode_attention.py`: microseconds of both kernels, and of a read of the cache."""
    return [
        (str(r["batch"]), str(r["held"]), str(r["tokens"]), *(f"{r[k]:.1f}" for k in ("triton_us", "us", "read_us")))
        for r in newest("h200_*_decode_attention.json")[1]["rows"]
    ]


def h200_tuned_rows() -> list[Cells]:
    """Of `tune_tiles.py --kernel cuda_scaled_mm`: the fastest instance beside what runs in its place otherwise."""
    rows: dict[tuple[str, str, int], Cells] = {}
    for kind in ("tune_scaled_mm", "tune_scaled_mm_8bit", "tune_blocks"):
        for r in newest(f"h200_*_{kind}.json")[1]["rows"]:
            if r["m"] not in (16, 128, 2048):
                continue
            other = min(r["others"], key=lambda name: r["others"][name])
            weight, _, act = r["format"].partition("+")
            rows[r["format"], r["layer"], r["m"]] = (
                f"`{weight}`, `{act}`", r["layer"], str(r["m"]), f"{r['bf16_us']:.1f}", f"{r['best_us']:.1f}",
                f"`{tile(r['best'])}`", f"{r['others'][other]:.1f} (`{other}`)",
            )  # fmt: skip
    return list(rows.values())


def host_time_rows() -> list[Cells]:
    """Of `host_time.py` in inference mode: microseconds of a call of a module, before and now, and on another host."""
    runs = [{(r["config"], r["m"]): r for r in newest(name)[1]["rows"] if r["mode"] == "inference_mode"}
            for name in ("h200_*-29_host_time_before.json", "h200_*-29_host_time.json", "h200_*-29b_host_time.json",
                         "h200_*-29c_host_time.json")
    ]  # fmt: skip
    return [
        (f"`{config}`", str(m), *(f"{run[config, m]['module_us']:.0f}" if (config, m) in run else "" for run in runs))
        for config, m in runs[0]
    ]


def act_quant_rows() -> list[Cells]:
    """Of `act_quant.py`: microseconds of both kernels, and of a copy that moves as many bytes."""
    return [
        (f"`{r['act']}`", str(r["k"]), str(r["m"]), f"{r['us']:.1f}", f"{r['triton_us']:.1f}", f"{r['copy_us']:.1f}")
        for r in newest("h200_*_act_quant.json")[1]["rows"]
    ]


def hadamard_rows() -> list[Cells]:
    """Of `hadamard.py`: microseconds of the Triton kernel, of the one in CUDA C++, and of a copy."""
    before, now = (
        {(r["k"], r["m"]): r for r in newest(f"h200_*_{name}.json")[1]["rows"]}
        for name in ("hadamard_before", "hadamard")
    )
    return [
        (str(k), str(m), f"{before[k, m]['us']:.1f}", f"{r['us']:.1f}", f"{r['copy_us']:.1f}")
        for (k, m), r in now.items()
    ]


def tensor_parallel_rows() -> list[Cells]:
    """Of `tensor_parallel.py`: microseconds of what ranks exchange, through NCCL and straight between GPUs."""
    return [
        (str(r["tokens"]), *(f"{r[f'{way}_{what}_us']:.1f}" for what in ("sum", "sum_and_norm", "gather")
                             for way in ("group", "direct")))
        for r in newest("h200_*_tensor_parallel.json")[1]["exchanges"]
    ]  # fmt: skip


def vllm_rows() -> list[Cells]:
    """Of `vllm_decode.py`: tokens per second of all sequences, and what a step takes on the GPU."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for r in newest("h200_*_vllm_decode.json")[1]["rows"]:
        if "error" not in r:
            cells = found.setdefault((r["config"], r["engine"]), {})
            cells[r["batch"]] = f"{r['tok_per_s']:.0f} ({r['graph_us'] / 1e3:.2f} ms)"
    names = {"vllm": "vLLM", "plugin": "vLLM with the plugin", "session": "lowbit's session"}
    return [
        (f"`{config}`", names[engine], *(cells.get(b, "") for b in (1, 16, 64, 128)))
        for (config, engine), cells in found.items()
    ]


def scaled_rows() -> list[Cells]:
    """Of `tune_tiles.py --kernel cuda_scaled_mm`: the rule's choice beside the kernels in whose place it runs."""
    _, result = newest("h100_*_tune_scaled_mm.json")
    return [
        (f"`{r['format']}`", r["layer"], str(r["m"]), f"{r['floor_us']:.1f}", f"{r['us']:.1f}",
         *(f"{r['others'][k]:.1f}" if k in r["others"] else "" for k in ("cublas_scaled_mm", "triton_scaled_mm")))
        for r in sorted(result["rows"], key=lambda r: (r["format"], r["layer"], r["m"]))
    ]  # fmt: skip


PEERS = ("torchao ", "hqq ", "bitsandbytes ", "optimum-quanto ")
# What we set ourselves: tokens per second of Llama-3.1-8B's shapes for one sequence, and GB at the peak.
GENERATE_GOALS = {
    "bf16": (165, None), "int8wo": (275, 8.9), "float8wo": (275, 8.9), "float8dq-row": (270, 8.9), "int8dq": (270, 8.9),
    "int4:g128": (450, 5.3), "int4wo-128": (450, 5.3), "nf4wo-64": (400, None), "codebook4wo-64": (400, None),
}  # fmt: skip


def generate_rows() -> list[Cells]:
    """Of `lowbit bench generate`: a token's time, the first token's, bandwidth and memory, for one sequence."""
    _, result = newest("h100_*_generate.json")
    rows = []
    for r in result["records"]:
        if r["batch"] != 1 or r["error"]:
            continue
        speed, memory = GENERATE_GOALS.get(r["config"], (None, None))
        peak = max(r[f"peak_{phase}"]["allocated"] for phase in ("make", "capture", "prefill", "decode"))
        rows.append((
            f"`{r['config']}`", f"{r['tokens_per_second']:.0f}" + (f" (>= {speed})" if speed else ""),
            f"{r['speedup']:.2f}", f"{r['first_token_ms']:.1f}", f"{r['gb_s']:.0f}", f"{100 * r['floor_share']:.0f} %",
            f"{r['model_bytes'] / 1e9:.2f}", f"{peak / 1e9:.2f}" + (f" (<= {memory})" if memory else ""),
        ))  # fmt: skip
    return rows


def cpu_generate_rows() -> list[Cells]:
    """Of `lowbit bench generate --device cpu`: tokens per second and the first token, and both before."""
    _, result = newest("cpu_*_generate.json")
    _, before = newest("cpu_*_generate_before.json")
    old = {r["config"]: r for r in before["records"]}

    def cells(r: dict[str, Any] | None) -> Cells:
        if r is None:
            return ("", "")
        return (f"{r['tokens_per_second']:.1f} ({r['speedup']:.2f})", f"{r['first_token_ms']:.0f}")

    return [(f"`{r['config']}`", *cells(r), *cells(old.get(r["config"]))) for r in result["records"]]


def batches_rows() -> list[Cells]:
    """Of `lowbit bench generate` with several sequences: tokens per second of all, and speed-up over bf16."""
    _, result = newest("h100_*_generate_batches.json")
    found: dict[str, dict[int, str]] = {}
    for r in result["records"]:
        if not r["error"]:
            cell = f"{r['tokens_per_second']:.0f} ({r['speedup']:.2f})"
            found.setdefault(r["config"], {})[r["batch"]] = cell
    return [(f"`{config}`", *(cells.get(b, "") for b in (16, 64))) for config, cells in found.items()]


def profile_rows() -> list[Cells]:
    """Of `profile_peers.py`: what each model's profile says."""
    _, result = newest("h100_*_profiles.json")
    rows = []
    for r in result["rows"]:
        spike = r["spikes"]["decode"]
        rows.append((
            r["title"].partition(" ")[2], r["verdicts"],
            *(f"{r['tokens_per_second'][p]:.1f}" for p in ("prefill", "decode")),
            *(f"{r['peak_bytes'][p] / 1e9:.2f}" for p in ("prefill", "decode")),
            f"{spike['bytes'] / 1e6:,.1f} MB at `{spike['at'].partition(' in ')[0]}`", f"{r['report_s']:.0f}",
        ))  # fmt: skip
    return rows


def crossover_rows() -> list[Cells]:
    """Of `crossover.py`: microseconds of the kernels for two formats and two layers."""
    rows = [*newest("h100_*_crossover_few.json")[1]["rows"], *newest("h100_*_crossover_many.json")[1]["rows"]]
    kernels = ("cuda_small_m", "triton_weight_only", "cuda_wgmma", "triton_chunked")
    return [
        (r["layer"], f"`{r['format']}`", str(r["m"]), f"{r['bf16_us']:.1f}",
         *(f"{r['us'][k]:.1f}" if k in r["us"] else "" for k in kernels))
        for r in sorted(rows, key=lambda r: (r["layer"], r["format"], r["m"]))
        if r["layer"] in ("gate_up", "o") and r["format"] in ("int4:g128", "int8:row")
    ]  # fmt: skip


def kept_rows() -> list[Cells]:
    """Of `accuracy.py` with rounding alone: what every format keeps."""
    _, result = newest("cpu_*_accuracy_formats.json")
    rows: list[Cells] = []
    for r in result["rows"]:
        ratio = f"{r['perplexity_ratio']:.3f} ± {r['perplexity_ratio_stderr']:.3f}" if r["algorithm"] else ""
        kl = f"{r['kl_mean']:.4f} ± {r['kl_stderr']:.4f}" if r["algorithm"] else ""
        bits = f"{r['bits_per_weight']:.2f}"
        rows.append((f"`{r['config']}`", bits, f"{r['perplexity']:.2f}", ratio, kl, f"{100 * r['top1_agreement']:.1f}"))
    return rows


def accuracy_rows() -> list[Cells]:
    """Of `accuracy.py`: KL divergence and perplexity of every algorithm."""
    _, result = newest("cpu_*_accuracy.json")
    rows: dict[str, dict[str, str]] = {}
    bits: dict[str, float] = {}
    for r in result["rows"][1:]:
        rows.setdefault(r["config"], {})[r["algorithm"]] = f"{r['kl_mean']:.3f} ({r['perplexity']:.1f})"
        bits[r["config"]] = r["bits_per_weight"]
    return [
        (f"`{config}`", f"{bits[config]:.2f}", *(cells.get(a, "") for a in ("rtn", "mse", "hqq", "gptq")))
        for config, cells in rows.items()
    ]


def against_rounding(pattern: str) -> list[tuple[Any, float, float]]:
    """Rows of `accuracy.py` behind the first, bf16's: how far perplexity is above that, and the share of what rounding
    loses that is brought back."""
    base, *rows = newest(pattern)[1]["rows"]
    lost = {r["config"]: r["perplexity"] - base["perplexity"] for r in rows if r["algorithm"] == "rtn"}
    above = [r["perplexity"] - base["perplexity"] for r in rows]
    return [(r, a / base["perplexity"], 1 - a / lost[r["config"]]) for r, a in zip(rows, above)]


def steps_rows() -> list[Cells]:
    """Of `accuracy.py` with steps before the rounding: what was lost, and whether the goal is met.

    Of int4, the share of rounding's loss in perplexity that is brought back; of 8-bit activations, the loss itself.
    """
    rows: list[Cells] = []
    for r, loss, closed in against_rounding("cpu_*_accuracy_steps.json"):
        config, algorithm = r["config"], r["algorithm"]
        if config.startswith("int4"):
            goal = 0.7 if "+" in algorithm or algorithm == "align" else 0.6
            words, met = (f"{100 * closed:.0f} % of the gap closed", f">= {100 * goal:.0f} %"), closed >= goal
        else:
            goal = 0.01 if algorithm == "rtn" else 0.005
            words, met = (f"{100 * loss:+.1f} % perplexity", f"<= {100 * goal:.1f} %"), loss <= goal
        verdict = "" if algorithm == "rtn" and config.startswith("int4") else "met" if met else "missed"
        kl = f"{r['kl_mean']:.3f} ({r['perplexity']:.1f})"
        rows.append((f"`{config}`", f"`{algorithm}`", kl, *(words if verdict else ("", "")), verdict))
    return rows


def activation_rows() -> list[Cells]:
    """Of `accuracy.py` for quantized activations: what algorithms bring back of what rounding loses in perplexity.

    8-bit ones are to stay within 0.5 % of bf16, of 4-bit ones half of the gap is to close.
    """
    rows: list[Cells] = []
    for r, loss, closed in against_rounding("cpu_*_accuracy_activations.json"):
        config, algorithm = r["config"], r["algorithm"]
        met = closed >= 0.5 if "4" in config else loss <= 0.005
        words = ("", "") if algorithm == "rtn" else (f"{100 * closed:.0f} %", "met" if met else "missed")
        kl = f"{r['kl_mean']:.3f} ({r['perplexity']:.1f})"
        rows.append((f"`{config}`", f"`{algorithm}`", kl, f"{100 * loss:+.1f} %", *words))
    return rows


def same_text() -> dict[str, dict[str, dict[str, Any]]]:
    """All rows of `accuracy.py` on the text of the accuracy page, by config and algorithm; the newest where several."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for file in sorted((ROOT / "benchmarks" / "results").glob("cpu_*_accuracy*.json")):
        result = json.loads(file.read_text())
        base = rows.setdefault("bf16", {}).setdefault("", result["rows"][0])
        assert abs(result["rows"][0]["perplexity"] - base["perplexity"]) < 1e-3, f"{file.name}: another model or text"
        for r in result["rows"]:
            rows.setdefault(r["config"], {})[r["algorithm"]] = r
    return rows


def closing_row(r: dict[str, Any], rtn: dict[str, Any], bf16: dict[str, Any]) -> Cells:
    """The share of rounding's loss in perplexity that comes back, and KL over its KL."""
    closed = (rtn["perplexity"] - r["perplexity"]) / (rtn["perplexity"] - bf16["perplexity"])
    return (
        f"`{r['config']}`", f"{r['bits_per_weight']:.2f}", f"`{r['algorithm']}`",
        f"{r['kl_mean']:.3f} ({r['perplexity']:.1f})", f"{100 * closed:.0f} %", f"{r['kl_mean'] / rtn['kl_mean']:.2f}",
    )  # fmt: skip


def tuned_scale_rows() -> list[Cells]:
    """Of `accuracy.py` with `+tune`."""
    _, result = newest("cpu_*_accuracy_tune.json")
    rounding = {c: found["rtn"] for c, found in same_text().items() if "rtn" in found}
    return [closing_row(r, rounding[r["config"]], result["rows"][0]) for r in result["rows"][1:]]


def low_rank_rows() -> list[Cells]:
    """Of `accuracy.py` with a low-rank term, and the best without one, by bits."""
    found, rows = same_text(), list[Cells]()
    for config in ("int4wo-128", "int3wo-128-asym"):
        chosen = [
            r for word, r in found[config].items() if "lowrank" in word or word in ("rtn", "awq+gptq", "awq+gptq+tune")
        ]
        chosen.sort(key=lambda r: (r["bits_per_weight"], -r["kl_mean"]))
        rows += [closing_row(r, found[config]["rtn"], found["bf16"][""]) for r in chosen]
    return rows


def two_bit_rows() -> list[Cells]:
    """Of `accuracy.py` for about two bits: everything against rounding to integers in groups of 64."""
    found, rows = same_text(), list[Cells]()
    for config in ("int2wo-64-asym", "codebook2v4wo-64"):
        ours = [r for word, r in found[config].items() if " " not in word]  # not what another library made
        chosen = sorted(ours, key=lambda r: -r["kl_mean"])
        rows += [closing_row(r, found["int2wo-64-asym"]["rtn"], found["bf16"][""]) for r in chosen]
    return rows


def turned_rows() -> list[Cells]:
    """Of `accuracy.py` with Hadamard transforms at run time, beside what there is without."""
    found, rows = same_text(), list[Cells]()
    for config in ("int8dq", "int8dq-asym", "mxfp4dq", "nvfp4dq"):
        ours = {word: r for word, r in found[config].items() if " " not in word}  # not what another library made
        for word, r in sorted(ours.items(), key=lambda item: -item[1]["kl_mean"]):
            kl, over = f"{r['kl_mean']:.4f} ± {r['kl_stderr']:.4f}", 100 * (r["perplexity_ratio"] - 1)
            rows.append((f"`{config}`", f"`{word}`", kl, f"{over:+.1f} ± {100 * r['perplexity_ratio_stderr']:.1f} %"))
    return rows


def smooth_rows() -> list[Cells]:
    """Of `accuracy.py`: SmoothQuant with one alpha and with one for every input."""
    _, result = newest("cpu_*_accuracy_smoothquant.json")
    base = result["rows"][0]["perplexity"]
    return [
        (f"`{r['config']}`", f"`{r['algorithm']}`", r["alpha"], f"{r['kl_mean']:.4f} ± {r['kl_stderr']:.4f}",
         f"{100 * (r['perplexity'] / base - 1):+.1f} ± {100 * r['perplexity_ratio_stderr']:.1f} %")
        for r in result["rows"][1:]
    ]  # fmt: skip


def accuracy_peer_rows() -> list[Cells]:
    """Of `accuracy.py --peers`: each library's way beside ours at the same or fewer bits."""
    _, result = newest("cpu_*_accuracy_peers.json")
    ours, rows = same_text(), list[Cells]()
    for r in result["rows"]:
        if not r["algorithm"].startswith(PEERS):
            continue
        found = {a: o for a, o in ours[r["config"]].items() if not a.startswith(PEERS)}
        best = min(found, key=lambda a: found[a]["kl_mean"])
        rtn, least = found["rtn"]["kl_mean"], found[best]["kl_mean"]
        error = (found["rtn"]["kl_stderr"] ** 2 + r["kl_stderr"] ** 2) ** 0.5
        lower = "rounding" if rtn < r["kl_mean"] - error else "equal" if rtn <= r["kl_mean"] + error else "theirs"
        rows.append((
            r["algorithm"], f"{r['bits_per_weight']:.2f}", f"{r['kl_mean']:.4f} ± {r['kl_stderr']:.4f}",
            f"`{r['config']}`", f"{found['rtn']['bits_per_weight']:.2f}", f"{rtn:.4f}",
            lower, f"{least:.4f} (`{best}`)" if best != "rtn" else "",
        ))  # fmt: skip
    return rows


def task_rows() -> list[Cells]:
    """Of `accuracy.py --tasks`; errors are those of a share among so many questions."""

    def share(p: float, questions: int) -> str:
        return f"{100 * p:.0f} ± {100 * (p * (1 - p) / (questions - 1)) ** 0.5:.0f}"

    _, result = newest("cpu_*_accuracy_tasks.json")
    return [
        (f"`{r['config']}`", f"`{r['algorithm']}`" if r["algorithm"] else "", t["task"],
         *(share(t["metrics"][m], t["questions"]) for m in ("acc", "acc_norm")), f"{100 * t['agreement']:.0f}")
        for r in result["rows"] for t in r["tasks"]
    ]  # fmt: skip


def fault_rows() -> list[Cells]:
    """Of `faults.py`: how often each promise was kept."""
    _, result = newest("cpu_*_faults.json")
    return [(r["fault"], r["promise"], f"{r['held']:,} of {r['cases']:,}", f"`{r['file']}`") for r in result["rows"]]


def autoquant_rows() -> list[Cells]:
    """Of `autoquant.py`: uniform models and plans, all measured as a whole, and in what a plan beats each uniform one.

    A plan beats it in size or time if it has no more of that and a smaller divergence.
    """
    _, result = newest("cpu_*_autoquant.json")
    plans = [r for r in result["rows"] if " of " in r["name"]]
    rows = []
    for r in result["rows"]:
        beaten = [
            what for what, cost in (("size", "bytes"), ("time", "us"))
            if any(p[cost] <= r[cost] and p["measured_kl"] < r["measured_kl"] for p in plans)
        ]  # fmt: skip
        rows.append((
            r["name"] if r in plans else f"`{r['name']}`", f"{r['bytes'] / 1e6:.2f}", f"{r['us'] / 1e3:.2f}",
            f"{r['measured_us'] / 1e3:.2f}", f"{r['kl']:.4f}", f"{r['measured_kl']:.4f}",
            "" if r in plans else " and ".join(beaten) or "nothing",
        ))  # fmt: skip
    return rows


def demo_rows() -> list[Cells]:
    """Of `lowbit demo`: every config on its real language model."""
    _, result = newest("cpu_*_demo.json")
    rows: list[Cells] = []
    for r in result["rows"]:
        q = r["quality"]
        rows.append((
            f"`{r['config']}`", f"{r['bits_per_weight']:.2f}", f"{r['model_bytes'] / 1e6:.0f}",
            f"{q['perplexity']:.2f}", f"{q['kl_mean']:.4f}", f"{100 * q['top1_agreement']:.1f}",
            f"{r['tokens_per_second']:.1f}",
        ))  # fmt: skip
    return rows


@dataclass(frozen=True)
class Table:
    page: str
    header: Cells
    rows: Callable[[], list[Cells]]

    def render(self) -> str:
        lines = [self.header, tuple("---" for _ in self.header), *self.rows()]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


TABLES = {
    "formats": Table(
        "docs/formats.md",
        ("spec", "bits per weight", "element", "scales"),
        lambda: [format_row(f) for f in registered()],
    ),
    "configs": Table(
        "docs/configs-and-rules.md",
        ("short name", "config", "weight", "activation"),
        lambda: [config_row(name) for name in EXAMPLES],
    ),
    "errors": Table("docs/index.md", ("code", "page", "what it says"), error_rows),
    "demo": Table(
        "README.md",
        ("config", "bits per weight", "model MB", "perplexity", "KL (nats)", "same top-1 %", "tokens/s"),
        demo_rows,
    ),
    "speed": Table("docs/measured.md", ("weight", "activation", "M = 1", "16", "128", "1024"), speed_rows),
    "kept": Table(
        "docs/accuracy.md", ("config", "bits per weight", "perplexity", "ratio", "KL", "same top-1 %"), kept_rows
    ),
    "accuracy": Table("docs/accuracy.md", ("config", "bits per weight", "rtn", "mse", "hqq", "gptq"), accuracy_rows),
    "steps": Table("docs/accuracy.md", ("config", "algorithm", "KL (perplexity)", "measured", "goal", ""), steps_rows),
    "activations": Table(
        "docs/accuracy.md",
        ("config", "algorithm", "KL (perplexity)", "over bf16", "of the gap closed", ""),
        activation_rows,
    ),
    "tuned scales": Table(
        "docs/accuracy.md",
        ("config", "bits per weight", "algorithm", "KL (perplexity)", "of the gap closed", "KL over rounding's"),
        tuned_scale_rows,
    ),
    "low rank": Table(
        "docs/accuracy.md",
        ("config", "bits per weight", "algorithm", "KL (perplexity)", "of the gap closed", "KL over rounding's"),
        low_rank_rows,
    ),
    "two bits": Table(
        "docs/accuracy.md",
        ("config", "bits per weight", "algorithm", "KL (perplexity)", "of the gap closed", "KL over rounding's"),
        two_bit_rows,
    ),
    "turned": Table("docs/accuracy.md", ("config", "algorithm", "KL", "perplexity over bf16"), turned_rows),
    "smoothquant": Table(
        "docs/accuracy.md", ("config", "algorithm", "alpha", "KL", "perplexity over bf16"), smooth_rows
    ),
    "accuracy of peers": Table(
        "docs/accuracy.md",
        ("library", "bits", "KL", "lowbit", "bits", "KL, rounding", "lower", "KL, best algorithm"),
        accuracy_peer_rows,
    ),
    "tasks": Table(
        "docs/accuracy.md", ("config", "algorithm", "task", "accuracy %", "by length %", "same answer %"), task_rows
    ),
    "autoquant": Table(
        "docs/autoquant.md",
        ("model", "MB", "ms, sum of layers", "ms measured", "KL predicted", "KL measured", "beaten by a plan in"),
        autoquant_rows,
    ),
    "linear": Table(
        "docs/measured.md", ("weight", "M = 1, us", "read alone", "share", "speed-up", "M = 16", "M = 128"), linear_rows
    ),
    "tuned": Table(
        "docs/measured.md",
        ("M", "layer", "bf16, us", "in their own order (speed-up)", "tile", "packed", "tile"),
        tuned_rows,
    ),
    "roofline": Table("docs/measured.md", ("recipe", "layer", "M = 1", "16", "128", "1024", "4096"), roofline_rows),
    "layers": Table("docs/measured.md", ("weight", "gate_up", "down", "qkv", "o"), layers_rows),
    "generate": Table(
        "docs/measured.md",
        ("config", "tokens/s", "speed-up", "first token, ms", "GB/s", "of the floor", "model GB", "peak GB"),
        generate_rows,
    ),
    "cpu generate": Table(
        "docs/measured.md",
        ("config", "tokens/s (over bf16)", "first token, ms", "tokens/s before", "first token before, ms"),
        cpu_generate_rows,
    ),
    "batches": Table("docs/measured.md", ("config", "16 sequences", "64 sequences"), batches_rows),
    "peers": Table(
        "docs/measured.md", ("weight", "activation", "M", "bf16", "lowbit", "humming", "torchao"), peer_rows
    ),
    "codes": Table(
        "docs/measured.md",
        ("weight and activation", "layer", "M = 1", "16", "64", "128", "512", "1024", "4096"),
        lambda: codes_rows("h100"),
    ),
    "h200 layers": Table("docs/measured.md", ("weight", "layer", "M = 1", "16", "128", "512", "2048"), h200_layer_rows),
    "h200 codes": Table(
        "docs/measured.md",
        ("weight and activation", "layer", "M = 1", "16", "128", "512", "2048", "4096"),
        lambda: codes_rows("h200"),
    ),
    "h200 batches": Table("docs/measured.md", ("config", "1 sequence", "16", "64", "128"), h200_batches_rows),
    "energy": Table(
        "docs/measured.md", ("weight", "layer", "M", "kernel", "us", "over bf16", "mJ", "W", "MHz"), energy_rows
    ),
    "held": Table("docs/measured.md", ("weight", "tokens", "gate_up", "down", "qkv", "o"), held_rows),
    "decode attention": Table(
        "docs/measured.md", ("sequences", "held", "new tokens", "Triton", "CUDA C++", "read"), decode_attention_rows
    ),
    "host time": Table(
        "docs/measured.md",
        ("config", "M", "before, us", "now, us", "another host, us", "a third host, quantized in CUDA C++"),
        host_time_rows,
    ),
    "act quant": Table(
        "docs/measured.md", ("activation", "K", "M", "CUDA C++, us", "Triton, us", "copy, us"), act_quant_rows
    ),
    "hadamard": Table("docs/measured.md", ("K", "M", "Triton, us", "CUDA C++, us", "copy, us"), hadamard_rows),
    "tensor parallel": Table(
        "docs/measured.md",
        ("tokens", "sum, NCCL", "direct", "sum and norm, NCCL", "direct", "logits, NCCL", "direct"),
        tensor_parallel_rows,
    ),
    "vllm": Table("docs/measured.md", ("config", "engine", "1 sequence", "16", "64", "128"), vllm_rows),
    "h200 tuned": Table(
        "docs/measured.md",
        ("weight and activation", "layer", "M", "bf16, us", "cuda_scaled_mm", "tile", "otherwise"),
        h200_tuned_rows,
    ),
    "scaled": Table(
        "docs/measured.md",
        ("weight and activation", "layer", "M", "read alone", "cuda_scaled_mm", "cublas_scaled_mm", "triton_scaled_mm"),
        scaled_rows,
    ),
    "profiles": Table(
        "docs/profiling.md",
        (
            "model",
            "layers",
            "prompt, tokens/s",
            "decode, tokens/s",
            "peak GB",
            "peak GB, decode",
            "most of what a step adds",
            "report, s",
        ),
        profile_rows,
    ),
    "faults": Table("docs/reliability.md", ("what happens", "what lowbit does", "kept", "in `tests/`"), fault_rows),
    "tests of faults": Table("docs/reliability.md", ("what happens", "what lowbit does", "test"), fault_tests.rows),
    "written": Table(
        "docs/compatibility.md",
        ("scheme", "format", "compressed-tensors", "transformers, `dequantize=True`", "transformers, plain call"),
        written_rows,
    ),
    "picked": Table("docs/compatibility.md", ("scheme", "vLLM runs it as", "SGLang runs it as"), picked_rows),
    "read": Table("docs/compatibility.md", ("`quant_method`", "variants", "compared with", "test"), read_rows),
    "crossover": Table(
        "docs/measured.md",
        ("layer", "weight", "M", "bf16", "cuda_small_m", "triton_weight_only", "cuda_wgmma", "triton_chunked"),
        crossover_rows,
    ),
}


def section(name: str, text: str) -> re.Match[str]:
    """The rows after the mark of a table."""
    mark = f"<!-- table {name}: python tests/docs_tables.py -->\n"
    found = re.search(rf"(?<={mark})\|.*(\n\|.*)*", text)
    assert found is not None, f"the page has no rows after {mark}"
    return found


if __name__ == "__main__":
    for name, table in TABLES.items():
        text = (ROOT / table.page).read_text()
        at = section(name, text)
        (ROOT / table.page).write_text(text[: at.start()] + table.render() + text[at.end() :])
