"""Tasks: likelihoods against the model asked directly, and lm-eval's reading of local files where it is installed."""

import json
from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_ids, tiny_llama

from lowbit import quantize_
from lowbit.models.tokenizer import Tokenizer
from lowbit.tools.tasks import TaskResult, log_likelihoods, run_tasks


def pairs() -> list[tuple[list[int], list[int]]]:
    ids = tiny_ids(1, 60)[0].tolist()
    return [(ids[i : i + 1 + i % 7], ids[i + 20 : i + 21 + i % 4]) for i in range(20)]


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_likelihoods_are_those_of_a_model_asked_alone(batch: int) -> None:
    """Padding and order change nothing."""
    model, seen = tiny_llama(), list[tuple[int, int]]()
    found = log_likelihoods(model, pairs(), batch, lambda i, n: seen.append((i, n)))
    for (context, answer), (likelihood, greedy) in zip(pairs(), found, strict=True):
        log_p = model(torch.tensor([context + answer]))[0].log_softmax(-1)[len(context) - 1 : -1]
        assert likelihood == pytest.approx(sum(float(p[t]) for p, t in zip(log_p, answer)), abs=1e-4)
        assert greedy == (log_p.argmax(1).tolist() == answer)
    assert seen == [(i, 20) for i in range(0, 20, batch)]


def test_greedy_answers_are_seen() -> None:
    model, ids = tiny_llama(), [1, 2, 3]
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    (_, greedy), (_, other) = log_likelihoods(model, [(ids[:3], ids[3:]), (ids[:3], [*ids[3:5], (ids[5] + 1) % 97])])
    assert greedy
    assert not other


def test_nothing_to_condition_on_is_refused() -> None:
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match=r"\[lowbit: input-mismatch\]"):
            log_likelihoods(tiny_llama(), [pair])


def test_agreement_counts_equal_choices() -> None:
    a, b = (TaskResult("t", 4, {}, {}, c) for c in ((0, 1, 2, 1), (0, 1, 0, 0)))
    assert a.against(b).agreement == 0.5
    assert a.against(a).agreement == 1
    with pytest.raises(ValueError, match=r"\[lowbit: reference-mismatch\]"):
        a.against(TaskResult("t", 3, {}, {}, (0, 1, 2)))


class Letters:
    """A tokenizer of bytes, with what `Tokenizer` asks of its backend."""

    def encode(self, text: str, add_special_tokens: bool) -> "Letters":
        self.ids = [c % 97 for c in text.encode()]
        return self


def test_local_files_are_read(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: reading tasks from local files is not tested")
    questions = [{"q": f"what is {i}?", "a": [f"it is {j}" for j in range(i, i + 4)], "gold": i % 4} for i in range(12)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "local.yaml").write_text(
        f"task: local\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/q.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc}]\n"
    )
    model, tokenizer = tiny_llama(), Tokenizer(Letters(), (0,))
    (result,) = run_tasks(model, tokenizer, ["local"], folder=tmp_path, limit=10)
    encoded = [
        ([c % 97 for c in q["q"].encode()], [c % 97 for c in f" {a}".encode()]) for q in questions for a in q["a"]
    ]
    scores = torch.tensor([s for s, _ in log_likelihoods(model, encoded)]).view(12, 4)[:10]
    assert result.choices == tuple(scores.argmax(1).tolist())
    golds = torch.tensor([q["gold"] for q in questions[:10]])
    assert result.metrics["acc"] == pytest.approx(float((scores.argmax(1) == golds).double().mean()))
    assert result.questions == 10
    p = result.metrics["acc"]
    assert result.stderrs["acc"] == pytest.approx((p * (1 - p) / 9) ** 0.5)
    quantize_(model, {"re:model.layers.*": "int2wo-16-asym"})
    (other,) = run_tasks(model, tokenizer, ["local"], folder=tmp_path, limit=10)
    assert 0 < other.against(result).agreement < 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="unknown tasks"):
        run_tasks(model, tokenizer, ["other"], folder=tmp_path)
