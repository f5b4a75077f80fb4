"""Text to token ids and back, with the tokenizer that came with the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.errors import see
from lowbit.models.loading import reading

# How llama.cpp's names for pre-tokenizers cut text before the byte-level step.
_SPLITS_DIGITS = {"default": False, "gpt-2": False, "smollm": True}
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what generation needs to know besides.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        eos_ids: tokens that end a text.
        bos_id: put in front of every text, or None where the model was not trained so.
        chat_template: the model's own Jinja template, or None.
        special: texts of the special tokens that a chat template may ask for (`bos_token`, `eos_token`).
    """

    backend: Any
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    chat_template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it count as themselves."""
        ids = list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        return [self.bos_id, *ids] if add_special_tokens and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. A character cut in two by the end of `ids` shows as U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation (`{"role": ..., "content": ...}` each), ready for the assistant's answer.

        Raises:
            ValueError: the model has no chat template.
            ImportError: the package jinja2 is not installed.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; use encode(text) for plain completion")
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError(
                "chat templates need the package jinja2; pip install 'lowbit[cli]'" + see("missing-package")
            ) from error

        # The template comes with the model: it runs in a sandbox, and with the whitespace rules it was written for.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        template = environment.from_string(self.chat_template)
        text = template.render(messages=list(messages), add_generation_prompt=True, **self.special)
        return self.encode(text, add_special_tokens=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a Hugging Face directory (`tokenizer.json`) or a GGUF file (byte-level BPE).

    Raises:
        ImportError: the package `tokenizers` (or `gguf`) is not installed.
        FileNotFoundError: there is none at `path`.
        ValueError: a GGUF file with another kind of tokenizer.
    """
    path = Path(path).expanduser()
    with reading(path):
        return _from_gguf(path) if path.suffix == ".gguf" else _from_huggingface(path)


def _from_huggingface(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; save the tokenizer in this form with transformers' save_pretrained"
            + see("model-not-readable")
        )
    backend = _tokenizers().Tokenizer.from_file(str(file))
    settings = _json(directory / "tokenizer_config.json")
    special = {key: _text(settings[key]) for key in ("bos_token", "eos_token") if settings.get(key)}
    eos = {backend.token_to_id(special["eos_token"])} if "eos_token" in special else set()
    for name in ("config.json", "generation_config.json"):
        ids = _json(directory / name).get("eos_token_id")
        eos |= set(ids if isinstance(ids, list) else [ids])
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if (own := directory / "chat_template.jinja").is_file():
        template = own.read_text(encoding="utf-8")
    return Tokenizer(backend, tuple(sorted(eos - {None})), None, template, special)


def _from_gguf(path: Path) -> Tokenizer:
    from lowbit.models.gguf import metadata, open_gguf

    reader = open_gguf(path)
    kind, pre = metadata(reader, "tokenizer.ggml.model"), metadata(reader, "tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _SPLITS_DIGITS:
        raise ValueError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported, only byte-level BPE ('gpt2') "
            f"with {', '.join(map(repr, _SPLITS_DIGITS))}; use a Hugging Face directory with a tokenizer.json"
            + see("model-not-readable")
        )
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in metadata(reader, "tokenizer.ggml.merges")]
    backend = _byte_level_bpe({t: i for i, t in enumerate(tokens)}, merges, _SPLITS_DIGITS[pre])
    types = metadata(reader, "tokenizer.ggml.token_type")
    backend.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL])
    backend.add_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED])
    bos, eos = (metadata(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    return Tokenizer(
        backend,
        eos_ids=() if eos is None else (eos,),
        bos_id=bos if metadata(reader, "tokenizer.ggml.add_bos_token", False) else None,
        chat_template=metadata(reader, "tokenizer.chat_template"),
        special={f"{n}_token": tokens[i] for n, i in (("bos", bos), ("eos", eos)) if i is not None},
    )


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, ...]], split_digits: bool) -> Any:
    """Byte-pair encoding over GPT-2's printable stand-ins for bytes; digits one by one where the model wants it."""
    t = _tokenizers()
    backend = t.Tokenizer(t.models.BPE(vocab=vocab, merges=merges))
    steps = [t.pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    steps.append(t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    backend.pre_tokenizer = t.pre_tokenizers.Sequence(steps)
    backend.decoder = t.decoders.ByteLevel()
    return backend


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "reading text needs the package tokenizers; pip install 'lowbit[cli]'" + see("missing-package")
        ) from error
    return tokenizers


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _raise(message: str) -> None:
    raise ValueError(f"chat template: {message}")
