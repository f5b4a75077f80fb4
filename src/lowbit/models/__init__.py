"""Language models that the tools run: one readable decoder, and loaders for the files that people have."""

from __future__ import annotations

from pathlib import Path

import torch

from lowbit.errors import see
from lowbit.models.config import LlamaConfig
from lowbit.models.fuse import Fusion, fuse_projections_, unfuse_projections_
from lowbit.models.llama import KVCache, Llama
from lowbit.models.parallel import parallelize_
from lowbit.models.random import random_model
from lowbit.models.sampling import Sampling
from lowbit.models.session import Session
from lowbit.models.shapes import shape_of

__all__ = [
    "Fusion",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Sampling",
    "Session",
    "fuse_projections_",
    "load_model",
    "parallelize_",
    "random_model",
    "shape_of",
    "unfuse_projections_",
]


def load_model(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> Llama:
    """The language model in a Hugging Face directory or a `.gguf` file, in eval mode, on the CPU.

    Args:
        path: a directory with `config.json` and safetensors files, or one GGUF file.
        dtype: of every weight, whatever the file stores: bf16, fp16 or fp32.

    Raises:
        FileNotFoundError: nothing readable is at `path`.
        ValueError: the file's architecture is not supported, or its tensors do not fit its configuration.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        from lowbit.models.huggingface import load_huggingface

        return load_huggingface(path, dtype)
    if path.suffix == ".gguf":
        from lowbit.models.gguf import load_gguf

        return load_gguf(path, dtype)
    raise FileNotFoundError(
        f"{path} is neither a Hugging Face model directory nor a .gguf file" + see("model-not-readable")
    )
