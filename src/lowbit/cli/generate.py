"""The command generate: one prompt's text as it comes, or the texts of several prompts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from torch import Tensor

from lowbit.cli.output import Debug, Device, Dtype, Json, Model, command, emit_json, megabytes, say
from lowbit.cli.weights import Config, quantize_as_asked
from lowbit.errors import see
from lowbit.models.fuse import fuse_projections_
from lowbit.models.llama import Llama
from lowbit.models.speculative import Speculation
from lowbit.models.tokenizer import Tokenizer
from lowbit.tools.generate import GenerateResult
from lowbit.tools.generate import generate as generate_tokens
from lowbit.tools.sources import Source, find_source, parse_dtype, rules_for, variant, weight_bytes

# That are generated at once, of prompts of one length.
SEQUENCES = 32


@command
def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What the model continues or answers. May be repeated."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="UTF-8 file of prompts, one on each line.")] = None,
    config: Config = None,
    draft: Annotated[
        str | None,
        typer.Option(metavar="CONFIG|MODEL", help="Proposes tokens: the same model in this config, or another one."),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(help="That the draft proposes at a time.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 128,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop in front of. May be repeated.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; 1 draws as the model says.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that sum up to p.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text, and say how fast. The text of a single prompt is shown as it comes."""
    asked = [*(prompt or []), *(_lines(prompts) if prompts is not None else [])]
    if not asked:
        raise ValueError("generate: give a --prompt, or a file of --prompts")
    if "" in (stop or []):
        raise ValueError("--stop is empty; give at least one character")
    source = find_source(model)
    tokenizer = source.tokenizer()
    ids = [_encoded(tokenizer, text, raw) for text in asked]
    loaded = source.model(parse_dtype(dtype), device)
    proposing = None if draft is None else _draft(source, loaded, draft, parse_dtype(dtype), device)
    if config is not None:
        quantize_as_asked(source, loaded, rules_for(loaded, config), device)
    models = [loaded] if proposing is None else [loaded, proposing]
    for m in models:
        fuse_projections_(m)
    shown = len(asked) == 1 and not as_json
    texts = [Text(tokenizer, stop or []) for _ in asked]
    results: list[GenerateResult] = []
    for group in _equally_long(ids):
        show = _Shown([texts[i] for i in group], shown)
        results.append(generate_tokens(
            loaded, torch.tensor([ids[i] for i in group]), max_new_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=seed, eos_ids=tokenizer.eos_ids, on_token=show, draft=proposing,
            draft_tokens=draft_tokens,
        ))  # fmt: skip
        show.end()
    if as_json:
        emit_json(_document(source, config, draft, asked, ids, texts, results))
        return
    if not shown:
        for question, text in zip(asked, texts, strict=True):
            sys.stdout.write(f"> {_for_terminal(question)}\n{_for_terminal(text.text)}\n\n")
    say(f"[dim]{escape(_summary(results, weight_bytes(torch.nn.ModuleList(models))))}[/]")


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _encoded(tokenizer: Tokenizer, prompt: str, raw: bool) -> list[int]:
    if raw or tokenizer.chat_template is None:
        ids = tokenizer.encode(prompt)
    else:
        ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
    if not ids:
        raise ValueError("--prompt is empty; give at least one word")
    return ids


def _draft(source: Source, loaded: Llama, word: str, dtype: torch.dtype | None, device: str) -> Llama:
    """Another model, or this one in a config, with its output projection: what that costs is acceptance alone."""
    if word == "demo" or Path(word).expanduser().exists():
        other = find_source(word)
        return other.model(None if other.kind == "checkpoint" else dtype, device)
    if source.kind == "checkpoint":
        raise ValueError(
            f"{source.path} is quantized already, so that --draft {word!r} would be quantized twice; give a MODEL as "
            "--draft" + see("already-quantized")
        )
    copy = variant(loaded)
    assert isinstance(copy, Llama)
    quantize_as_asked(source, copy, rules_for(copy, word, {"lm_head": word}), device, "quantizing the draft")
    return copy


def _equally_long(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of prompts of one length, some at a time."""
    lengths: dict[int, list[int]] = {}
    for i, tokens in enumerate(ids):
        lengths.setdefault(len(tokens), []).append(i)
    for group in lengths.values():
        for first in range(0, len(group), SEQUENCES):
            yield group[first : first + SEQUENCES]


# Text as it comes --------------------------------------------------------------------------------


class Text:
    """The text of one sequence: ends in front of a stop, and shows no part of a character or of a possible stop.

    Attributes:
        text: so far, or all of it after `end`.
        tokens: that it was made of, its end included.
        ended: whether nothing more belongs to it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.text, self.ended = "", False

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def add(self, token: int) -> str:
        """What is new in the text."""
        if self.ended:
            return ""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        before = self._before_stop(text)
        self.ended = before != text or token in self.tokenizer.eos_ids
        if before == text:
            if text.endswith("�"):
                return ""
            starts = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            before = text[: len(text) - max(starts, default=0)]
        return self._grown(before)

    def end(self) -> str:
        """What was held back."""
        return self._grown(self._before_stop(self.tokenizer.decode(self.ids)))

    def _before_stop(self, text: str) -> str:
        return text[: min((at for at in map(text.find, self.stops) if at >= 0), default=len(text))]

    def _grown(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text = text
        return new


class _Shown:
    """Passes tokens on to their texts, and writes a single one to stdout."""

    def __init__(self, texts: Sequence[Text], shown: bool) -> None:
        self.texts, self.shown = texts, shown

    def __call__(self, token: Tensor) -> list[bool]:
        for text, one in zip(self.texts, token.tolist(), strict=True):
            self._write(text.add(one))
        return [text.ended for text in self.texts]

    def end(self) -> None:
        for text in self.texts:
            self._write(text.end())
        self._write("\n")

    def _write(self, new: str) -> None:
        if self.shown and new:
            sys.stdout.write(_for_terminal(new))
            sys.stdout.flush()


def _for_terminal(text: str) -> str:
    """A model may write anything; to a terminal, control characters are commands."""
    return _visible(text) if sys.stdout.isatty() else text


def _visible(text: str) -> str:
    """Control characters other than ends of lines and tabs as U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


# What is said about it ---------------------------------------------------------------------------


def _speed(results: Sequence[GenerateResult]) -> float:
    """Tokens per second of all sequences, behind the first token of each; NaN if there are none."""
    seconds = sum(r.decode_seconds for r in results)
    tokens = sum(len(r.ids) * (r.new_tokens - 1) for r in results)
    return tokens / seconds if tokens else float("nan")


def _speculation(results: Sequence[GenerateResult]) -> Speculation | None:
    """Of all groups together."""
    found = [astuple(r.speculation) for r in results if r.speculation is not None]
    return Speculation(*map(sum, zip(*found, strict=True))) if found else None


def _summary(results: Sequence[GenerateResult], weights: int) -> str:
    read, seconds = sum(r.ids.shape[0] * r.prompt_tokens for r in results), sum(r.prefill_seconds for r in results)
    new, speed = sum(r.ids.shape[0] * r.new_tokens for r in results), _speed(results)
    line = f"{read} prompt tokens in {seconds:.2f} s, {new} new tokens"
    line += "" if speed != speed else f", {speed:.1f} tokens/s"
    line += f"; weights {megabytes(weights)} MB, cache {megabytes(max(r.cache_bytes for r in results))} MB"
    if (s := _speculation(results)) is not None and s.proposed:
        line += f"\ndraft: {s.accepted} of {s.proposed} proposals accepted ({100 * s.acceptance:.0f} %), "
        line += f"{s.tokens_per_pass:.2f} tokens per pass"
    return line


def _document(
    source: Source, config: str | None, draft: str | None, prompts: Sequence[str], ids: Sequence[Sequence[int]],
    texts: Sequence[Text], results: Sequence[GenerateResult],
) -> dict[str, Any]:  # fmt: skip
    said = [
        {"prompt": p, "text": t.text, "prompt_tokens": len(i), "new_tokens": t.tokens}
        for p, i, t in zip(prompts, ids, texts, strict=True)
    ]
    read = sum(r.ids.shape[0] * r.prompt_tokens for r in results)
    done = _speculation(results)
    shown = ("passes", "proposed", "accepted", "acceptance", "tokens_per_pass")
    return {
        "model": source.path,
        "config": config,
        **(said[0] if len(said) == 1 else {"texts": said}),
        "tokens_per_second": _speed(results),
        "prefill_tokens_per_second": read / sum(r.prefill_seconds for r in results),
        "cache_bytes": max(r.cache_bytes for r in results),
        "draft": draft,
        "speculation": None if done is None else {name: getattr(done, name) for name in shown},
    }
