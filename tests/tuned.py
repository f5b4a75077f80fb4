"""What the tests of tuning share: text, and which planes of a model's weights have changed."""

from __future__ import annotations

import torch
from tiny_llama import tiny_ids
from torch import Tensor, nn

from lowbit import QuantizedTensor

LAYERS = "re:model.layers.*"


def batches(count: int) -> list[Tensor]:
    return [tiny_ids(8, 60, seed=s) for s in range(count)]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}


def changed_planes(model: nn.Module, before: dict[str, Tensor]) -> dict[str, set[str]]:
    """By quantized layer. Other weights are the same objects, and formats, dtypes and shapes are the same."""
    changed = dict[str, set[str]]()
    for name, old in before.items():
        new = model.get_submodule(name).weight
        if not isinstance(old, QuantizedTensor):
            assert new is old
            continue
        assert isinstance(new, QuantizedTensor)
        assert (new.format, new.act, new.dtype, new.shape) == (old.format, old.act, old.dtype, old.shape)
        changed[name] = {
            p for p, t in old.planes.items() if not torch.equal(t.view(torch.uint8), new.planes[p].view(torch.uint8))
        }
    return changed
