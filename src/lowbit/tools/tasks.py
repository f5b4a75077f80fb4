"""Multiple choice through lm-eval: which answer a model holds for the most likely, and whether its original agrees.

Tasks are lm-eval's own, by name, or YAML files in a folder that it reads; with files of data beside them nothing is
downloaded. Accuracies are lm-eval's. Of some hundred questions their error is several percent, more than most formats
lose, so two models are also compared question by question: the share for which both choose the same answer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import see
from lowbit.models.tokenizer import Tokenizer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TaskResult:
    """What one task says of a model.

    Attributes:
        metrics: lm-eval's, such as `acc` and `acc_norm`, by name.
        stderrs: their standard errors, where lm-eval gives them.
        choices: the most likely answer to each question, by log-likelihood; empty where there are none to choose from.
        agreement: share of questions that the original answers alike; None without one.
    """

    task: str
    questions: int
    metrics: dict[str, float]
    stderrs: dict[str, float]
    choices: tuple[int, ...]
    agreement: float | None = None

    def against(self, original: TaskResult) -> TaskResult:
        """The same with its agreement.

        Raises:
            ValueError: the other result is of other questions.
        """
        if (self.task, len(self.choices)) != (original.task, len(original.choices)):
            raise ValueError(
                f"tasks: {self.task} with {len(self.choices)} answers cannot be compared with {original.task} with "
                f"{len(original.choices)}; evaluate both with the same tasks and limit" + see("reference-mismatch")
            )
        same = [a == b for a, b in zip(self.choices, original.choices)]
        return replace(self, agreement=sum(same) / len(same) if same else None)


def run_tasks(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Ask a model the questions of some tasks.

    Args:
        model: in eval mode; maps ids `(B, T)` to logits `(B, T, V)`, or to an object with such `.logits`.
        tasks: names that lm-eval knows, or that YAML files in `folder` define.
        folder: where tasks are defined; lm-eval's own are not looked at then.
        limit: only the first so many questions of each.
        batch: sequences at once; shorter ones are padded behind their end, which a causal model does not see.
        progress: called with (sequences done, sequences in all).

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown task, or one that wants generated text instead of likelihoods.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("tasks need the package lm-eval; pip install 'lm-eval>=0.4.13'" + see("missing-package"))
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    if unknown := [t for t in tasks if t not in manager.all_tasks]:
        raise ValueError(
            f"unknown tasks {unknown}; {folder or 'lm-eval'} has {_some(manager.all_tasks)}" + see("bad-option")
        )
    asked = scorer(model, tokenizer, batch, progress)
    out = simple_evaluate(
        model=asked, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=100, log_samples=True,
        verbosity="ERROR",
    )  # fmt: skip
    return [_result(name, out["results"][name], out["samples"][name]) for name in out["samples"]]


def scorer(model: nn.Module, tokenizer: Tokenizer, batch: int, progress: Progress | None) -> Any:
    """The model as lm-eval's `LM`."""
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]

    class Scorer(TemplateLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_ids[0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string, add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, answer) for _, context, answer in requests]
            return log_likelihoods(model, pairs, batch, progress)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise ValueError("tasks: for the perplexity of whole texts use lowbit.tools.evaluate" + see("bad-option"))

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise ValueError(
                "tasks: a task wants generated text; take one that asks for likelihoods" + see("bad-option")
            )

    return Scorer()


@torch.inference_mode()
def log_likelihoods(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], batch: int = 8, progress: Progress | None = None
) -> list[tuple[float, bool]]:
    """Of each `(context, answer)` in token ids: log p(answer | context), and whether greedy decoding would give it.

    Raises:
        ValueError: a context or an answer is empty.
    """
    if not all(context and answer for context, answer in pairs):
        raise ValueError("tasks: a context and an answer have at least one token each" + see("input-mismatch"))
    device = next(model.parameters()).device
    # Longest first: memory is asked for once, and what is padded is of nearly one length.
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    found: dict[int, tuple[float, bool]] = {}
    for start in range(0, len(order), batch):
        if progress is not None:
            progress(start, len(order))
        some = order[start : start + batch]
        # The last token predicts nothing.
        rows = [torch.tensor([*pairs[i][0], *pairs[i][1]][:-1]) for i in some]
        out = model(nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device))
        logits: Tensor = getattr(out, "logits", out)
        for row, i, scores in zip(rows, some, logits):
            answer = torch.tensor(pairs[i][1], device=device)
            log_p = scores[len(row) - len(answer) : len(row)].float().log_softmax(-1)
            likelihood = log_p.gather(1, answer[:, None]).sum(dtype=torch.float64)
            found[i] = float(likelihood), bool((log_p.argmax(1) == answer).all())
    return [found[i] for i in range(len(pairs))]


def _result(name: str, values: dict[str, Any], samples: list[dict[str, Any]]) -> TaskResult:
    metrics, stderrs = dict[str, float](), dict[str, float]()
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if kind == "none" and isinstance(value, float | int):
            (stderrs if metric.endswith("_stderr") else metrics)[metric.removesuffix("_stderr")] = float(value)
    answers = [
        [likelihood for likelihood, _ in s["filtered_resps"]] for s in sorted(samples, key=lambda s: s["doc_id"])
    ]
    choices = tuple(max(range(len(a)), key=a.__getitem__) for a in answers if len(a) > 1)
    return TaskResult(name, len(samples), metrics, stderrs, choices)


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
