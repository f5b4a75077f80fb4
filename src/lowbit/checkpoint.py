"""`save`, `load`, `verify`: quantized models as safetensors, bit by bit, never a pickle.

A directory holds safetensors files, `config.json` with a `quantization_config`, and `lowbit_manifest.json` with
checksums and what rebuilds every weight exactly. Where compressed-tensors has words for every quantized layer, its
convention is used, which serving engines read; otherwise lowbit's own. docs/checkpoints.md has the tables.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoints.files import (
    CONFIG,
    INDEX,
    MANIFEST,
    MARK,
    METADATA,
    SECTION,
    CheckpointError,
    Staging,
    checked_directory,
    json_bytes,
    read_json,
    safetensors_bytes,
    shards,
)
from lowbit.checkpoints.manifest import Manifest
from lowbit.checkpoints.reading import Checkpoint, misfits, to_be_beside
from lowbit.checkpoints.writing import plan, replaceable
from lowbit.linear import put_beside_
from lowbit.original import unharmed
from lowbit.tensor import QuantizedTensor

__all__ = ["CheckpointError", "Verification", "load", "read", "save", "verify"]

MAX_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Verification:
    """What `verify` found. True or false like `ok`.

    Attributes:
        files: how many files were compared with their checksums.
        tensors: how many tensors were compared with their dtypes and shapes.
        manifest: whether there are checksums at all; other tools write none.
        problems: everything that is wrong, one line each.
    """

    directory: Path
    files: int
    tensors: int
    manifest: bool
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.problems:
            return str(CheckpointError(self.directory, self.problems))
        checked = f"{self.files} files match their checksums" if self.manifest else "no manifest, so no checksums"
        return f"{self.directory}: {checked}; {self.tensors} tensors have the right dtype and shape"


# Saving ---------------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model to `directory`, which is created if need be.

    The same model gives the same bytes. Files get their names only when all are complete and flushed; `config.json`,
    without which nothing loads, comes last. An older checkpoint of lowbit in the directory is replaced; if anything
    fails on the way, it is still there. Temporary files of saves that were killed are deleted.

    Args:
        model: any module; `QuantizedTensor` weights are stored as they are, everything else in its own dtype. Tied
            weights are stored once.
        config: the model's configuration, kept in `config.json`. The default is `model.config.to_dict()` where the
            model has one, else the `config.json` that already lies in the directory.
        max_shard_bytes: size of one safetensors file at most, unless a single tensor is larger.

    Raises:
        CheckpointError: a weight is on the meta device, transposed, no tensor, or has a scale that is NaN, Inf or
            zero; or the directory holds weights that lowbit did not write. Nothing has been written then.
        OSError: a file cannot be written; the directory is as it was.
    """
    path = Path(directory)
    if max_shard_bytes < 1:
        raise CheckpointError(path, [f"max_shard_bytes must be at least 1, got {max_shard_bytes}"])
    if path.exists() and not path.is_dir():
        raise CheckpointError(path, ["is a file; a checkpoint is a directory"])
    planned = plan(model, path)
    replaced = replaceable(path)
    full = dict(_model_config(model, path) if config is None else copy.deepcopy(dict(config)))
    full.pop(SECTION, None)
    if planned.section is not None:
        full[SECTION] = planned.section
    try:
        config_json = json_bytes(full, sort_keys=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(path, [f"config cannot be written as JSON: {error}"]) from None
    path.mkdir(parents=True, exist_ok=True)
    parts = shards(planned.tensors, max_shard_bytes)
    info = {name: pending.info for name, pending in planned.tensors.items()}
    checks: dict[str, int] = {}
    with Staging(path) as staging:
        for file, part in parts.items():
            staging.write(file, safetensors_bytes(part, checks))
        if len(parts) > 1:
            head = {"total_size": sum(i.nbytes for i in info.values()), MARK: METADATA[MARK]}
            where = {name: file for file, part in parts.items() for name in part}
            staging.write(INDEX, [json_bytes({"metadata": head, "weight_map": where})])
        staging.write(CONFIG, [config_json])
        manifest = Manifest(_tool(), dict(staging.digests), info, planned.weights, planned.tied, checks)
        staging.write(MANIFEST, [manifest.to_bytes()])
        staging.commit(replaced)


def _tool() -> str:
    from lowbit import __version__  # not at the top: lowbit imports this module

    return f"lowbit {__version__}"


def _model_config(model: nn.Module, path: Path) -> dict[str, Any]:
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is not None:
        return dict(to_dict())
    return read_json(path / CONFIG) if (path / CONFIG).exists() else {}


# Reading --------------------------------------------------------------------------------------------------------------


def load(
    model: nn.Module,
    directory: str | Path,
    *,
    device: torch.device | str | None = None,
    strict: bool = True,
    verify: bool = True,
) -> nn.Module:
    """Fill `model` with a checkpoint and return it; quantized layers get their planes directly, never a float copy.

    Everything is compared before anything changes: files with the manifest's checksums, tensors with their formats,
    shapes with the model's. Weights are assigned, not copied, so a model on the meta device is best.

    Args:
        model: the float model, or one on the meta device; `Linear(bias=False)` and so on as in the checkpoint.
        directory: what `save` wrote, or a directory of another tool: compressed-tensors, GPTQ, AWQ, bitsandbytes, FP8.
        device: where the weights go; by default where those of the model were, and to the CPU from the meta device.
        strict: whether tensors that only the model or only the checkpoint has are errors.
        verify: compare SHA-256 checksums, which reads every file once more.

    Raises:
        CheckpointError: listing every problem found; the model is unchanged.
        torch.OutOfMemoryError: from PyTorch. A model that was on the meta device is unchanged; one with values of its
            own keeps those that were not replaced yet.
    """
    path = checked_directory(directory)
    checkpoint = Checkpoint(path, verify)
    targets = dict(model.state_dict(keep_vars=True))
    problems = list(checkpoint.problems)
    more = {} if problems else to_be_beside(checkpoint, model, problems)
    targets |= {f"{layer}.{name}": t for layer, tensors in more.items() for name, t in tensors.items()}
    if checkpoint.understood:
        problems += misfits(checkpoint, model, targets, strict)
    if problems:
        raise CheckpointError(path, problems)
    with unharmed(model, keep=all(t.is_meta for t in targets.values())):
        for layer, tensors in more.items():
            put_beside_(model.get_submodule(layer), tensors)
        _fill(model, checkpoint, targets, device)
    return model


def _fill(model: nn.Module, checkpoint: Checkpoint, targets: dict[str, Any], device: torch.device | str | None) -> None:
    """Assign every tensor that both have; names of one parameter stay one, and the checkpoint's ties are added."""
    groups: dict[int, list[str]] = {}
    for name, value in targets.items():
        groups.setdefault(id(value), []).append(name)
    done: dict[str, Tensor] = {}
    for name in checkpoint.names:
        if name in targets:
            place = device or (None if targets[name].is_meta else targets[name].device)
            done[name] = _assign(model, name, checkpoint.tensor(name, place))
    for name, target in targets.items():
        source = checkpoint.tied.get(name) or next((n for n in groups[id(target)] if n in done), None)
        if name not in done and source in done:
            _assign(model, name, done[source])
    if device is not None:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)


def read(directory: str | Path, *, device: torch.device | str | None = None, verify: bool = True) -> dict[str, Tensor]:
    """The state dict of a checkpoint, quantized weights as `QuantizedTensor`; `load_state_dict(..., assign=True)`
    takes it. Tied names share one tensor.

    Raises:
        CheckpointError: listing every problem found.
    """
    path = checked_directory(directory)
    checkpoint = Checkpoint(path, verify)
    if checkpoint.problems:
        raise CheckpointError(path, checkpoint.problems)
    state = {name: checkpoint.tensor(name, device) for name in checkpoint.names}
    return state | {name: state[other] for name, other in checkpoint.tied.items() if other in state}


def verify(directory: str | Path) -> Verification:
    """Compare every file with the manifest's SHA-256 and every tensor with its dtype and shape, without a model.

    Raises:
        CheckpointError: `directory` is no directory. What is wrong inside it is in the result.
    """
    path = checked_directory(directory)
    checkpoint = Checkpoint(path, True)
    manifest = checkpoint.manifest
    return Verification(
        path, len(manifest.files) if manifest else 0, len(checkpoint.files.info), manifest is not None,
        tuple(checkpoint.problems),
    )  # fmt: skip


def _assign(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Put a tensor in the place of a parameter or buffer, and return what the module then holds."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return tensor
    old = module._parameters[leaf]
    grad = (
        old is not None and old.requires_grad and tensor.is_floating_point() and not isinstance(tensor, QuantizedTensor)
    )
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=grad)
    module._parameters[leaf] = parameter
    return parameter
