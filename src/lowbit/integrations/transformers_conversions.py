"""What becomes of a weight while transformers loads it, and of its name while transformers saves it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightRenaming

from lowbit.checkpoints import leaves as own
from lowbit.checkpoints.reading import Checkpoint
from lowbit.configs import Config
from lowbit.quantize_layer import quantize_layer_
from lowbit.report import Report


class Quantizing(Protocol):
    """What `Quantize` needs to know: what each layer becomes, and where to report it."""

    configs: dict[str, Config]
    report: Report


class Reading(Protocol):
    """What `Assemble` needs to know: the open directory, and its names of the model's quantized parameters."""

    checkpoint: Checkpoint | None
    stored: dict[str, str]


def ends_with(name: str) -> str:
    """The pattern of names that end like this."""
    return re.escape(name) + "$"


def is_ours(conversion: Any) -> bool:
    return any(isinstance(op, Assemble) for op in getattr(conversion, "operations", ()))


class Quantize(ConversionOps):  # type: ignore[misc]
    """One float weight, just read, becomes a quantized one."""

    def __init__(self, quantizer: Quantizing) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Tensor]:
        [value] = input_dict.values()
        name = full_layer_name.removesuffix(".weight")
        module: nn.Module = model.get_submodule(name)
        module.weight = nn.Parameter(value[0] if isinstance(value, list) else value, requires_grad=False)
        row = quantize_layer_(name, module, self.quantizer.configs[name])
        self.quantizer.report.layers.append(row)
        return {full_layer_name: module.weight}


class Assemble(ConversionOps):  # type: ignore[misc]
    """The stored tensors of one `weight`: planes of a quantized one, or a plain one that is only called the same."""

    def __init__(self, hf_quantizer: Reading) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Assemble:
        return self  # transformers copies it for every weight; it has no state of its own

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = {end: t[0] if isinstance(t, list) else t for end, t in input_dict.items()}  # by their patterns
        dtype = model.get_parameter(full_layer_name).dtype
        name, checkpoint = self.hf_quantizer.stored.get(full_layer_name), self.hf_quantizer.checkpoint
        if name is None:
            [plain] = tensors.values()
            return {full_layer_name: plain.to(dtype)}
        assert checkpoint is not None
        layer = name.removesuffix("weight")
        weight: Tensor = checkpoint.assemble(name, lambda leaf: tensors[ends_with(leaf.name.removeprefix(layer))])
        if weight.dtype != dtype:
            weight = weight.to(dtype)
        return {full_layer_name: nn.Parameter(weight, requires_grad=False)}


def rename(name: str, renamings: Iterable[WeightRenaming]) -> str:
    """A name after all renamings of transformers that apply to it."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def renamed(section: Mapping[str, Any], file_name: Callable[[str], str]) -> dict[str, Any]:
    """A `quantization_config` in the names of the files. Readers of compressed-tensors go by these or by the names of
    modules, so there both are given."""

    def both(names: list[str]) -> list[str]:
        layers = (file_name(f"{name}.weight").removesuffix(".weight") for name in names)
        return list(dict.fromkeys([*names, *layers]))

    if section["quant_method"] == own.METHOD:
        section = {**section, "weights": {file_name(name): spec for name, spec in section["weights"].items()}}
        if "beside" in section:
            ends = {file_name(f"{n}.weight").removesuffix(".weight"): e for n, e in section["beside"].items()}
            section["beside"] = dict(sorted(ends.items()))
        return section
    groups = {
        key: {**group, "targets": group["targets"] if group["targets"] == ["Linear"] else both(group["targets"])}
        for key, group in section["config_groups"].items()
    }
    return {**section, "ignore": both(section["ignore"]), "config_groups": groups}
