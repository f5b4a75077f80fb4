"""Fills a model made on the meta device with weights that arrive one by one, and what all loaders say of bad files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.errors import see
from lowbit.models.config import LlamaConfig
from lowbit.models.llama import Llama


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes a parser stumble over is one kind of error, which names the file.

    Raises:
        ValueError: the file cannot be read. Missing files and packages are errors of their own.
    """
    try:
        yield
    except (ImportError, FileNotFoundError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # parsers of other packages raise anything
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        if "[lowbit: " in told:
            if str(path) in told:
                raise
            raise ValueError(f"{path}: {told}") from error
        raise ValueError(f"{path} cannot be read: {told}" + see("model-not-readable")) from error


def assign_weights(
    config: LlamaConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, source: str
) -> Llama:
    """A model of shape `config` whose parameters are `tensors`, cast to `dtype`; eval mode, no gradients.

    Raises:
        ValueError: a tensor is missing, unknown or of the wrong shape; `source` tells the reader which file.
    """
    with torch.device("meta"):
        model = Llama(config)
    missing = {name for name, _ in model.named_parameters()}  # a tied output projection is not listed twice
    unknown = []
    for name, tensor in tensors:
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        if name not in missing:
            unknown.append(name)
            continue
        missing.remove(name)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        expected = getattr(module, leaf).shape
        if tensor.shape != expected:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, its config asks for {tuple(expected)}"
                + see("model-not-readable")
            )
        setattr(module, leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))
    if missing or unknown:
        raise ValueError(
            f"{source}: the weights do not fit the config; missing {_some(missing)}; unknown {_some(unknown)}"
            + see("model-not-readable")
        )
    model.tie_weights()
    return model.eval()


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return (", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")) or "none"
