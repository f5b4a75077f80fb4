"""The demo: one real language model in every kind of weight format, measured and heard.

The original stays in memory once; every config quantizes a copy that shares all weights not yet replaced. What the
original says about the text is kept once too, and every config is compared with it token by token.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowbit.calibrate import Statistics, calibrate
from lowbit.explain import explain
from lowbit.models.llama import Llama
from lowbit.models.tokenizer import Tokenizer
from lowbit.quantize import quantize_
from lowbit.report import Report
from lowbit.specs import parse_config
from lowbit.tensor import QuantizedTensor
from lowbit.tools.doctor import machine
from lowbit.tools.evaluate import EvalResult, Reference, evaluate, held_out_text, reference_of
from lowbit.tools.generate import GenerateResult, generate
from lowbit.tools.sources import is_static, rules_for, variant, weight_bytes

CONFIGS = (
    "float8wo", "float8dq-row", "int8wo", "int8dq", "int4wo-128", "int4wo-32", "int3wo-64", "int2wo-32-asym",
    "mxfp8wo", "mxfp4wo", "nvfp4wo", "nf4wo-64", "codebook4wo-64",
)  # fmt: skip
QUESTION = "Explain in two sentences why the sky is blue."
#: A text that follows a text: for models without a chat template.
OPENING = "The sky is blue because"

#: What the demo's own model flatters; shown wherever its numbers are.
GRID_NOTE = (
    "This model's layers come from a Q4_1 file: every weight already lies on a 4-bit grid (blocks of 32, a scale and a "
    "float minimum each). That flatters formats that can hit the grid: four-bit integers with a float minimum are "
    "exact at groups of 32 and look too good at 64, and methods that search for scales or codebooks may find it. "
    "Symmetric int4, int4 with integer zero points, int8 and float8 lose as much weight precision here as on weights "
    "that lie on no grid; the other formats of this table were not compared. Judge a format by your own model."
)


@dataclass(frozen=True)
class DemoPlan:
    """How much is measured. `tokens` of text in windows of `window`; `new_tokens` are generated per config."""

    configs: tuple[str, ...] = CONFIGS
    tokens: int = 2048
    window: int = 1024
    new_tokens: int = 32


FULL = DemoPlan()
QUICK = DemoPlan(("int8wo", "int4wo-32", "nvfp4wo", "int2wo-32-asym"), tokens=768, window=768, new_tokens=20)


@dataclass(frozen=True)
class DemoRow:
    """One config, or the original (`config` is its dtype).

    Attributes:
        model_bytes: all weights, embedding and norms included.
        layer_bytes: the quantized layers alone, codes and scales; of the original, the same layers.
        bits_per_weight: of those layers, as stored.
        prefill_tokens_per_second, tokens_per_second: one sequence; reading the prompt, and generating.
        sqnr_db: per quantized layer, signal to quantization noise of its weights.
        kernels: what runs the layers for one token, and for a whole window.
    """

    config: str
    model_bytes: int
    layer_bytes: int
    bits_per_weight: float
    quality: EvalResult
    tokens_per_second: float
    prefill_tokens_per_second: float
    sample: str
    quantize_seconds: float = 0.0
    sqnr_db: dict[str, float] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()


@dataclass
class DemoResult:
    """All rows, the original first, and what is needed to read them."""

    model: str
    parameters: int
    device: str
    prompt: str
    plan: DemoPlan
    machine: dict[str, str]
    notes: list[str]
    rows: list[DemoRow] = field(default_factory=list)
    seconds: float = 0.0
    command: str = ""


Progress = Callable[[int, int, str], None]


def run_demo(
    model: Llama,
    tokenizer: Tokenizer,
    plan: DemoPlan = FULL,
    *,
    name: str = "model",
    notes: tuple[str, ...] = (),
    text: str | None = None,
    on_row: Callable[[DemoRow], None] | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Measure the original, then every config of `plan`.

    Args:
        model: the original; it is not changed.
        text: what to measure on; the default is the packaged held-out prose.
        on_row: called with each row as soon as it is complete.
        progress: called with (steps done, steps in all, what comes next).

    Raises:
        ValueError: an unknown config, a text shorter than two tokens, or a config that fits no layer.
    """
    started = time.perf_counter()
    configs = [parse_config(spec) for spec in plan.configs]
    ids = torch.tensor(tokenizer.encode(text or held_out_text()))
    measured, rest = ids[: plan.tokens], ids[plan.tokens :]
    window = min(plan.window, model.config.max_positions)
    device = model.model.norm.weight.device
    prompt, prompt_ids = _prompt(tokenizer)
    result = DemoResult(
        model=name,
        parameters=sum(p.numel() for p in model.parameters()),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        prompt=prompt,
        plan=plan,
        machine=machine(),
        notes=[*notes, _speed_note(device)],
    )
    steps = 3 * len(configs) + 2
    done = 0

    def step(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(done, steps, what)
        done += 1

    def add(row: DemoRow) -> None:
        result.rows.append(row)
        if on_row is not None:
            on_row(row)

    def speak(of: nn.Module) -> tuple[GenerateResult, str]:
        assert isinstance(of, Llama)
        room = model.config.max_positions - len(prompt_ids)
        new = min(plan.new_tokens, room)
        ends = tokenizer.eos_ids
        said = generate(of, torch.tensor([prompt_ids]), new, eos_ids=ends, warmup=True)
        text = tokenizer.decode(said.ids[0, said.prompt_tokens :].tolist())
        return said, " ".join("".join(c if c.isprintable() else " " for c in text).split())

    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    step(f"{dtype}: measuring")
    read = time.perf_counter()
    reference = reference_of(model, measured, window)
    quality = original_quality(reference, time.perf_counter() - read)
    step(f"{dtype}: generating")
    said, sample = speak(model)
    linears = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    numbers = sum(w.numel() for w in linears)
    size = sum(w.numel() * w.element_size() for w in linears)
    add(DemoRow(
        dtype, weight_bytes(model), size, 8 * size / numbers, quality, said.tokens_per_second,
        said.prefill_tokens_per_second, sample,
    ))  # fmt: skip

    statistics: dict[str, Statistics] | None = None
    for config in configs:
        step(f"{config.spec}: quantizing")
        if is_static(config) and statistics is None:
            statistics = calibrate(model, [calibration_ids(rest, measured, window, device)])
        copy = variant(model)
        report = quantize_(copy, rules_for(copy, config.spec), calibration=statistics)
        step(f"{config.spec}: measuring")
        quality = evaluate(copy, measured, reference, window)
        step(f"{config.spec}: generating")
        said, sample = speak(copy)
        add(_row(config.spec, copy, report, quality, said, sample, window))
        del copy
    if progress is not None:
        progress(steps, steps, "done")
    result.seconds = time.perf_counter() - started
    return result


def best_threads(model: Llama) -> int:
    """How many CPU threads generate fastest now: all that torch uses, or one.

    Threads meet after every layer. Where other programs hold a core, all wait for the one that is not running, and a
    single thread can be many times faster.
    """
    threads = torch.get_num_threads()
    ids = torch.ones(1, 8, dtype=torch.long)
    speeds: dict[int, float] = {}
    try:
        for count in {threads, 1}:
            torch.set_num_threads(count)
            speeds[count] = generate(model, ids, 6, warmup=True).tokens_per_second
    finally:
        torch.set_num_threads(threads)
    return max(speeds, key=lambda count: speeds[count])


def original_quality(reference: Reference, seconds: float) -> EvalResult:
    """What `evaluate` says of the original compared with itself, without another run."""
    losses = torch.cat(reference.losses)
    perplexity = math.exp(min(float(losses.mean()), 700.0))
    error = float(losses.std()) / math.sqrt(losses.numel())
    return EvalResult(losses.numel(), perplexity, perplexity * error, seconds, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def calibration_ids(rest: Tensor, measured: Tensor, window: int, device: torch.device | str) -> Tensor:
    """One window `(1, T)` to calibrate on: text that is not measured, where there is some."""
    return (rest if rest.numel() > 1 else measured)[:window].view(1, -1).to(device)


def _row(
    config: str, model: nn.Module, report: Report, quality: EvalResult, said: GenerateResult, sample: str, window: int
) -> DemoRow:
    weights = [m.weight for m in model.modules() if isinstance(getattr(m, "weight", None), QuantizedTensor)]
    size = sum(w.nbytes_packed for w in weights)  # type: ignore[union-attr,misc,operator]
    layers = explain(model, tokens=(1, window)).layers
    kernels = tuple(dict.fromkeys(r.kernel for layer in layers for r in layer.ranges))
    return DemoRow(
        config=config,
        model_bytes=weight_bytes(model),
        layer_bytes=int(size),
        bits_per_weight=8 * int(size) / sum(w.numel() for w in weights),  # type: ignore[union-attr,misc,operator]
        quality=quality,
        tokens_per_second=said.tokens_per_second,
        prefill_tokens_per_second=said.prefill_tokens_per_second,
        sample=sample,
        quantize_seconds=report.seconds,
        sqnr_db={r.name: r.sqnr_db for r in report.quantized if r.sqnr_db is not None},
        kernels=kernels,
    )


def _prompt(tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The question as the model's own template asks it, or the beginning of a sentence."""
    if tokenizer.chat_template is None:
        return OPENING, tokenizer.encode(OPENING)
    return QUESTION, tokenizer.encode_chat([{"role": "user", "content": QUESTION}])


def _speed_note(device: torch.device) -> str:
    if device.type == "cuda":
        return "Speeds are of one sequence, in eager mode, without CUDA graphs."
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    return (
        f"Speeds are CPU speeds ({threads}, {platform.machine()}) of one sequence, with weights decoded on the "
        "fly. They show that every format runs here; they say nothing about a GPU, where other kernels run."
    )
