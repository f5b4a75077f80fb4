"""lowbit as a quantizer of transformers: `import lowbit.integrations.transformers` registers it, by public functions.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=LowbitConfig("int4wo-128"))
    model.save_pretrained(out)

quantizes each weight when it is loaded, so that the float model exists at no time, and writes the directory that
lowbit writes: compressed-tensors where that has words for every layer, lowbit's own convention otherwise.

The name `lowbit` is all that is taken over. Directories of compressed-tensors belong to the quantizer of transformers
that has their name, which dequantizes them at the first forward; whoever wants them packed says so, per call:

    model = AutoModelForCausalLM.from_pretrained(path, config=packed_config(path))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.checkpoints import leaves as own
from lowbit.checkpoints import mxfp4
from lowbit.checkpoints.files import DESCRIPTION, MANIFEST, CheckpointError
from lowbit.checkpoints.manifest import Record
from lowbit.checkpoints.reading import READABLE, Checkpoint
from lowbit.checkpoints.writing import plan as plan_files
from lowbit.configs import Config
from lowbit.errors import see
from lowbit.integrations.transformers_conversions import Assemble, Quantize, ends_with, is_ours, rename, renamed
from lowbit.linear import put_beside_, why_nothing_beside
from lowbit.quantize_layer import quantize_layer_, skipped
from lowbit.report import LayerReport, Report
from lowbit.rules import QUANTIZABLE, FqnToConfig, Rule, is_linear, plan_of, why_not
from lowbit.specs import parse_config
from lowbit.tensor import QuantizedTensor

__all__ = ["LowbitConfig", "LowbitQuantizer", "packed_config"]


@register_quantization_config(own.METHOD)
class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained(..., quantization_config=...)` takes.

    Args:
        config: a config or its short name (`"int4wo-128"`), or rules by name as `quantize_` takes them.
        modules_to_not_convert: with one config, names (or ends or patterns of names) of layers that stay as they are.
            The default is that of transformers: the output projection, and what the model keeps in fp32. `[]` leaves
            nothing out. Rules say that themselves.
        on_unsupported: `"error"`, or `"skip"` to leave layers that cannot be quantized alone; the report lists them.

    Raises:
        ValueError: rules and `modules_to_not_convert` were both given, or a name is unknown.
    """

    def __init__(
        self,
        config: Config | str | FqnToConfig | Mapping[str, Rule],
        modules_to_not_convert: list[str] | None = None,
        *,
        on_unsupported: Literal["error", "skip"] = "error",
    ) -> None:
        self.quant_method = own.METHOD
        rules = config.rules if isinstance(config, FqnToConfig) else config
        if isinstance(rules, Mapping) and modules_to_not_convert is not None:
            raise ValueError(
                "LowbitConfig: give rules by name or modules_to_not_convert, not both; a rule of None leaves a layer "
                "as it is" + see("conflicting-rules")
            )
        if isinstance(rules, Mapping):
            self.config: Config | dict[str, Config | None] = {
                name: parse_config(rule) if isinstance(rule, str) else rule for name, rule in rules.items()
            }
        else:
            self.config = parse_config(rules) if isinstance(rules, str) else rules
        self.modules_to_not_convert = modules_to_not_convert
        self.on_unsupported = on_unsupported
        self.verify = True
        #: `quantization_config` of the directory that was read or is being written.
        self.section: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a directory that is quantized already."""
        out = cls({})
        section = dict(config_dict)
        out.verify = section.pop("verify", True)
        out.section = section
        if section.get("quant_method") != own.METHOD or not {"weights", "packed"} & set(section):
            raise CheckpointError(
                "quantization_config", [f"expected what lowbit writes, with the format of each weight, found {section}"]
            )
        return (out, kwargs) if return_unused_kwargs else out

    def to_dict(self) -> dict[str, Any]:
        """For `config.json`: how the weights are stored. Before they are, what was asked for."""
        if self.section is not None:
            return dict(self.section)
        if isinstance(self.config, dict):
            asked: Any = {name: None if rule is None else rule.spec for name, rule in self.config.items()}
        else:
            asked = self.config.spec
        return {"quant_method": self.quant_method, "config": asked}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def packed_config(path: str | Path, *, verify: bool = True, **kwargs: Any) -> PretrainedConfig:
    """The model configuration of a quantized directory with lowbit as its reader, for `from_pretrained(config=...)`.

    Args:
        path: a directory, or a repository of the hub, in any convention that lowbit reads.
        verify: compare the files with the manifest's SHA-256, where there is a manifest.
        kwargs: what `AutoConfig.from_pretrained` takes.

    Raises:
        CheckpointError: it is not quantized, or in a way that lowbit does not read.
    """
    config = AutoConfig.from_pretrained(path, **kwargs)
    section = getattr(config, "quantization_config", None) or {}
    packed = [method for method in READABLE if method != mxfp4.METHOD]  # experts, which no layer runs packed
    if section.get("quant_method") not in packed:
        raise CheckpointError(
            path, [f"quant_method is {section.get('quant_method')!r}; lowbit keeps {', '.join(packed)} packed"]
        )
    config.quantization_config = {"quant_method": own.METHOD, "packed": section["quant_method"], "verify": verify}
    return config  # type: ignore[no-any-return]


@register_quantizer(own.METHOD)
class LowbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads and saves. `model.hf_quantizer.report` says what was quantized.

    Attributes:
        report: one row per layer, as `quantize_` returns it; empty for directories that were quantized already.
    """

    quantization_config: LowbitConfig
    requires_calibration = False

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report = Report()
        self.configs: dict[str, Config] = {}  # by layer; while weights are quantized as they come
        self.weight_only = True
        self.checkpoint: Checkpoint | None = None  # open while a directory is read
        self.stored: dict[str, str] = {}  # the model's name of a quantized parameter -> the checkpoint's

    # What it is ------------------------------------------------------------------------------------------------------

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top; gradients pass through weights whose activations are not quantized."""
        return self.weight_only

    @property
    def is_compileable(self) -> bool:
        return True

    # Before loading --------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self._open(model, checkpoint_files)
        else:
            self._plan(model)

    def _plan(self, model: PreTrainedModel) -> None:
        asked = self.quantization_config
        left: list[str] = []
        if isinstance(asked.config, Config):
            left = self.get_modules_to_not_convert(model, asked.modules_to_not_convert, model._keep_in_fp32_modules)
        for name, module, config in plan_of(model, asked.config, None if isinstance(asked.config, dict) else is_linear):
            if config is None:
                reason: str | None = "left as it is by a rule"
            elif not should_convert_module(name, left):
                reason = "left as it is: modules_to_not_convert"
            else:
                reason = why_not(module, config.scheme, loaded=False)
                if reason is not None and asked.on_unsupported == "error":
                    raise ValueError(
                        f"LowbitConfig: {name} cannot be quantized to {config.spec}: {reason}. Name it in "
                        "modules_to_not_convert or give it a rule of None, or pass on_unsupported='skip'"
                        + see("layer-not-quantizable")
                    )
                if reason is None and config.scheme.act and config.scheme.act.static and not _given_scale(config):
                    raise ValueError(
                        f"LowbitConfig: {name} needs a calibrated activation scale for {config.spec}, which loading "
                        "cannot find; load the model in float and use lowbit.calibrate and lowbit.quantize_"
                        + see("missing-calibration")
                    )
            if reason is None:
                assert config is not None
                self.configs[name] = config
                self.weight_only &= config.scheme.act is None
            else:
                self.report.layers.append(skipped(name, module, reason))
        for name, other in model.all_tied_weights_keys.items():
            pair = [self.configs.get(n.removesuffix(".weight")) for n in (name, other)]
            if None not in pair and pair[0] != pair[1]:
                raise ValueError(
                    f"LowbitConfig: {name} is tied to {other}, and rules give them {pair[0].spec} and {pair[1].spec}; "  # type: ignore[union-attr]
                    "give both the same config" + see("layer-not-quantizable")
                )
        self._list_the_rest(model)

    def _list_the_rest(self, model: PreTrainedModel) -> None:
        """Large weights that no rule speaks of: experts in one tensor, 1-D convolutions."""
        kinds = ", ".join(c.__name__ for c in QUANTIZABLE)
        for name, w in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            if w.dim() >= 3 and not isinstance(owner, QUANTIZABLE):
                kind, size = type(owner).__name__, w.numel() * w.element_size()
                dtype, reason = str(w.dtype).removeprefix("torch."), f"{kind} is none of {kinds}"
                row = LayerReport(name, kind, tuple(w.shape), dtype, None, size, size, None, skipped=reason)
                self.report.layers.append(row)

    def _open(self, model: PreTrainedModel, files: list[str] | None) -> None:
        if not files:
            raise CheckpointError("from_pretrained", ["there are no files to read"])
        directory = Path(files[0]).parent
        if not (directory / MANIFEST).exists():
            self._fetch_manifest(model.config.name_or_path)
        with torch.device("cpu"):  # the model is being built on the meta device, where nothing has values
            self.checkpoint = Checkpoint(directory, self.quantization_config.verify)
        if self.checkpoint.problems:
            raise CheckpointError(directory, self.checkpoint.problems)
        self.weight_only = all(w.act is None for w in self.checkpoint.weights.values())
        parameters = dict(model.named_parameters(remove_duplicate=False))
        renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
        prefix = f"{model.base_model_prefix}."
        for name in self.checkpoint.weights:
            # Files may have older names than the model's classes, or a head that the model lacks.
            current = rename(name, renamings)
            known = next((n for n in _candidates(current, name, prefix) if n in parameters), None)
            if known is None:
                continue
            self.stored[known] = name
            module = model.get_submodule(known.removesuffix(".weight"))
            if (more := self.checkpoint.beside.get(name.removesuffix(".weight"))) is not None:
                if (reason := why_nothing_beside(module)) is not None:
                    raise CheckpointError(directory, [f"{name} has {', '.join(more)} beside it: {reason}"])
                put_beside_(module, {n: torch.empty(i.shape, dtype=i.dtype, device="meta") for n, i in more.items()})
            if self.checkpoint.weights[name].act is not None and not isinstance(module, nn.Linear):
                kind = type(module).__name__
                raise CheckpointError(
                    directory, [f"{name} quantizes activations, which needs a Linear; the model has a {kind}"]
                )

    @staticmethod
    def _fetch_manifest(name_or_path: str) -> None:
        """transformers brings from the hub only what it knows of; what lies beside it in the cache is found there."""
        from transformers.utils import cached_file

        if not Path(name_or_path).is_dir():
            cached_file(name_or_path, MANIFEST, _raise_exceptions_for_missing_entries=False)

    # While loading ---------------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        layer, _, leaf = param_name.rpartition(".")
        # A tied weight is stored under another name; it comes when the model is tied.
        return leaf == "weight" and layer in self.configs and param_name not in model.all_tied_weights_keys

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per weight, by which `device_map="auto"` plans."""
        if self.checkpoint is not None and param_name in self.stored:
            return self.checkpoint.weights[self.stored[param_name]].format.bits_per_weight / 8
        if self.param_needs_quantization(model, param_name):
            return self.configs[param_name.rpartition(".")[0]].scheme.weight.bits_per_weight / 8
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The tensors of a directory that make up a `weight`, by the ends of their names."""
        if self.checkpoint is None:
            return []
        ends = {
            leaf.name.removeprefix(name.removesuffix("weight"))
            for name in self.stored.values() for leaf in self.checkpoint.leaves[name]
        }  # fmt: skip
        return [WeightConverter([ends_with(end) for end in sorted(ends)], "weight", [Assemble(self)])] if ends else []

    # After loading ---------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.checkpoint is not None:
            self._tie(model, self.checkpoint)
            self.checkpoint = None
            # Kept for saving in the names of the files, which these do not change: a model saves what lowbit plans.
            model._weight_conversions = [c for c in model._weight_conversions if not is_ours(c)]
        for name, config in self.configs.items():
            module, weight = model.get_submodule(name), f"{name}.weight"
            if not isinstance(module.weight, QuantizedTensor):
                self.report.layers.append(quantize_layer_(name, module, config))
                if model.all_tied_weights_keys.pop(weight, None) is not None:
                    # Quantizing one of two tied weights unties them, as in `quantize_`.
                    model.config.get_text_config(decoder=True).tie_word_embeddings = False
            elif weight in model.all_tied_weights_keys:
                first = model.all_tied_weights_keys[weight].removesuffix(".weight")
                row = next(r for r in self.report.layers if r.name == first)
                kind, note = type(module).__name__, f"shares {first}"
                shared = replace(row, name=name, kind=kind, bytes_before=0, bytes_after=0, sqnr_db=None, note=note)
                self.report.layers.append(shared)
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        self.report.layers.sort(key=lambda row: order.get(row.name, order.get(row.name.rpartition(".")[0], 0)))
        return model

    @staticmethod
    def _tie(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        """Weights that shared one tensor when they were saved, whatever transformers knows of them."""
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, other in checkpoint.tied.items():
            if {name, other} <= names and model.get_parameter(name) is not model.get_parameter(other):
                layer, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(layer), leaf, model.get_parameter(other))

    # Saving ----------------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of lowbit's directories, for transformers to write; `config.json` is told what they mean."""
        planned = plan_files(model, Path("save_pretrained"))
        state = {name: pending.make().contiguous() for name, pending in planned.tensors.items()}

        # transformers writes the names that the model was loaded from, which may be older ones.
        back = [c.reverse_transform() for c in model._weight_conversions[::-1] if isinstance(c, WeightRenaming)]

        def file_name(name: str) -> str:
            return rename(name, back)

        record = Record(
            {file_name(name): w for name, w in planned.weights.items()},
            {file_name(name): file_name(other) for name, other in planned.tied.items()},
        )
        self.quantization_config.section = planned.section and renamed(planned.section, file_name)
        model.config.quantization_config = self.quantization_config
        return state, {DESCRIPTION: record.to_text()}


def _candidates(current: str, name: str, prefix: str) -> tuple[str, ...]:
    """Names that a parameter of a file may have in a model with or without a head."""
    return current, name, current.removeprefix(prefix), prefix + current


def _given_scale(config: Config) -> bool:
    return getattr(config, "scale", None) is not None
