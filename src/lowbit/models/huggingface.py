"""Reads a Hugging Face model directory: `config.json` and `*.safetensors`, whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lowbit.checkpoints.files import is_plain_name
from lowbit.errors import see
from lowbit.models.config import LlamaConfig
from lowbit.models.llama import Llama
from lowbit.models.loading import assign_weights, reading


def load_huggingface(directory: Path, dtype: torch.dtype) -> Llama:
    """The model of a directory, in eval mode, every weight in `dtype` on the CPU.

    Tensors are read one at a time: the peak is the model plus its largest tensor.

    Raises:
        FileNotFoundError: there is no `config.json`, or no safetensors file.
        ValueError: the architecture is not supported, a file is damaged, or the files lack or add tensors.
    """
    path = _existing(directory / "config.json")
    with reading(path):
        config = LlamaConfig.from_huggingface(json.loads(path.read_bytes()))
    with reading(directory):
        return assign_weights(config, _tensors(directory), dtype, source=str(directory))


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for path in _weight_files(directory):
        with reading(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if not name.endswith("rotary_emb.inv_freq"):  # some old files store what the configuration implies
                    yield name, file.get_tensor(name)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        with reading(index):
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            if not all(is_plain_name(name) for name in names):
                raise ValueError("weight_map must map tensors to files in the same directory")
        return [_existing(directory / name) for name in names]
    return [_existing(directory / "model.safetensors")]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a Hugging Face model directory holds config.json and either model.safetensors or "
            "model.safetensors.index.json with its shards (other weight files, such as pytorch_model.bin, are not read)"
            + see("model-not-readable")
        )
    return path
