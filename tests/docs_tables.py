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
    """Of `tune_wgmma.py`: the fastest instance for int4, over bf16, and the fastest with packed activations."""
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
        rows.setdefault((r["layer"], r["weight"], r["m"]), {})[r["provider"]] = r["us"]
    return [
        (layer, f"`{weight}`", str(m), *(f"{us[p]:.1f}" for p in ("bf16", "lowbit", "humming", "gemlite")))
        for (layer, weight, m), us in rows.items()
    ]


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


def batches_rows() -> list[Cells]:
    """Of `lowbit bench generate` with several sequences: tokens per second of all, and speed-up over bf16."""
    _, result = newest("h100_*_generate_batches.json")
    found: dict[str, dict[int, str]] = {}
    for r in result["records"]:
        if not r["error"]:
            cell = f"{r['tokens_per_second']:.0f} ({r['speedup']:.2f})"
            found.setdefault(r["config"], {})[r["batch"]] = cell
    return [(f"`{config}`", *(cells.get(b, "") for b in (16, 64))) for config, cells in found.items()]


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


def fault_rows() -> list[Cells]:
    """Of `faults.py`: how often each promise was kept."""
    _, result = newest("cpu_*_faults.json")
    return [(r["fault"], r["promise"], f"{r['held']:,} of {r['cases']:,}", f"`{r['file']}`") for r in result["rows"]]


def autoquant_rows() -> list[Cells]:
    """Of `autoquant.py`: each uniform config, and the plan of at most its bytes, both measured as a whole."""
    _, result = newest("cpu_*_autoquant.json")
    rows = []
    for r in result["rows"]:
        uniform, chosen = r["uniform"], r["chosen"]
        kl, ours = uniform["measured_kl"], chosen["measured_kl"]
        verdict = "less" if ours < kl else "the same plan" if chosen["configs"] == uniform["configs"] else "more"
        rows.append((
            f"`{r['config']}`", f"{uniform['bytes'] / 1e6:.2f}", f"{kl:.4f}",
            f"{chosen['bytes'] / 1e6:.2f}", f"{chosen['kl']:.4f}", f"{ours:.4f}", verdict,
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
    "autoquant": Table(
        "docs/autoquant.md",
        ("config", "MB", "KL measured", "MB chosen", "KL predicted", "KL chosen, measured", "chosen loses"),
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
    "batches": Table("docs/measured.md", ("config", "16 sequences", "64 sequences"), batches_rows),
    "peers": Table("docs/measured.md", ("layer", "weight", "M", "bf16", "lowbit", "humming", "gemlite"), peer_rows),
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
