"""Memory runs out at every layer of a quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny_llama import tiny_ids, tiny_llama
from torch import nn

import lowbit.quantize as quantizing
from faults.outcome import Outcome
from faults.subjects import OWN, net, on_meta, own, same_state, untouched
from lowbit import QuantizedTensor, load, quantize_
from lowbit.checkpoints.files import Files

ALGORITHMS = ("rtn", "mse", "hqq", "gptq")
ERRORS = (torch.OutOfMemoryError, MemoryError, KeyboardInterrupt)


def run(cases: int, directory: Path) -> Outcome:
    """With `restore` the model has the very tensors that it had. Without, the error lists exactly what is quantized,
    and going on gives what an uninterrupted run gives. `cases` bounds the layers per algorithm."""
    outcome = Outcome()
    layers = [name for name, m in tiny_llama().named_modules() if isinstance(m, nn.Linear)]
    for algorithm in ALGORITHMS:
        for k in range(min(cases, len(layers))):
            outcome.add(_not_restored(algorithm, k, ERRORS[k % len(ERRORS)]))
            outcome.counts["put back"] += 1
            if algorithm != "gptq":
                outcome.add(_not_continued(algorithm, k))
                outcome.counts["continued"] += 1
    return outcome


def run_loading(cases: int, directory: Path) -> Outcome:
    """Every tensor of a checkpoint in turn cannot be had; a model on the meta device stays there."""
    outcome = Outcome()
    for convention in OWN:
        place = own(directory / convention, convention)
        for k in range(cases):
            error = ERRORS[k % len(ERRORS)]
            model, real, left = on_meta(net), Files.get, iter(range(k))

            def fails(*arguments: Any, real: Any = real, left: Any = left, error: Any = error) -> Any:
                if next(left, None) is None:
                    raise error("injected")
                return real(*arguments)

            before = dict(model.named_parameters())
            with mock.patch.object(Files, "get", fails):
                try:
                    load(model, place)
                    break
                except ERRORS:
                    pass
            same = untouched(model) and all(before[name] is p for name, p in model.named_parameters())
            outcome.add(None if same else f"{convention}, tensor {k}: the model was changed")
    return outcome


def _quantize_and_fail(model: nn.Module, algorithm: str, k: int, error: type[BaseException], **options: Any) -> str:
    """What is said when layer number `k` has taken memory and got no more."""
    real, left = quantizing.quantize_weight, iter(range(k))

    def fails(*arguments: Any) -> Any:
        made = real(*arguments)
        if next(left, None) is None:
            raise error("injected")
        return made

    batches = [tiny_ids()] if algorithm == "gptq" else None
    with mock.patch.object(quantizing, "quantize_weight", fails):
        try:
            quantize_(model, "int4wo-16", algorithm=algorithm, batches=batches, **options)  # type: ignore[arg-type]
        except (torch.OutOfMemoryError, KeyboardInterrupt) as raised:
            return str(raised)
    raise AssertionError("nothing failed")


def _not_restored(algorithm: str, k: int, error: type[BaseException]) -> str | None:
    model = tiny_llama()
    before = dict(model.named_parameters())
    bits = {name: t.detach().clone() for name, t in model.state_dict().items()}
    told = _quantize_and_fail(model, algorithm, k, error, restore=True)
    if error is not KeyboardInterrupt and "the model is as it was" not in told:
        return f"{algorithm} at layer {k}: {told}"
    if any(before[name] is not p for name, p in model.named_parameters()):
        return f"{algorithm} at layer {k}: not the same parameters"
    return None if same_state(bits, dict(model.state_dict())) else f"{algorithm} at layer {k}: other values"


def _not_continued(algorithm: str, k: int) -> str | None:
    model, whole = tiny_llama(), tiny_llama()
    told = _quantize_and_fail(model, algorithm, k, torch.OutOfMemoryError)
    quantized = [n.removesuffix(".weight") for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)]
    named = (", ".join(quantized[:6]) or "no layers") + (f" and {len(quantized) - 6} more" if quantized[6:] else "")
    if len(quantized) != k or f"quantized are {named}, all others" not in told:
        return f"{algorithm} at layer {k}: {quantized} are quantized, and said is {told}"
    quantize_(model, "int4wo-16", algorithm=algorithm, on_unsupported="skip")  # type: ignore[arg-type]
    quantize_(whole, "int4wo-16", algorithm=algorithm)  # type: ignore[arg-type]
    same = same_state(dict(model.state_dict()), dict(whole.state_dict()))
    return None if same else f"{algorithm} at layer {k}: going on gave other bits"
