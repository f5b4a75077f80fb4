"""Opens a checkpoint: finds out what is stored and how, and compares everything with everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoints import awq, bitsandbytes, finegrained_fp8, gptq, mxfp4
from lowbit.checkpoints import compressed_tensors as ct
from lowbit.checkpoints import leaves as own
from lowbit.checkpoints.config_groups import Section, agrees
from lowbit.checkpoints.files import (
    CONFIG,
    DESCRIPTION,
    DTYPES,
    MANIFEST,
    SECTION,
    CheckpointError,
    Files,
    TensorInfo,
    read_json,
    sha256,
)
from lowbit.checkpoints.foreign import Reader
from lowbit.checkpoints.leaves import ACT_SCALE, Leaf
from lowbit.checkpoints.manifest import Manifest, Record, StoredWeight, parse_spec
from lowbit.linear import beside, misfit_beside, why_nothing_beside
from lowbit.tensor import QuantizedTensor

#: `quant_method` -> what makes a reader of the config.
FOREIGN: dict[str, Callable[[Mapping[str, Any]], Reader]] = {
    module.METHOD: module.Reader for module in (gptq, awq, bitsandbytes, finegrained_fp8, mxfp4)
}
READABLE = (ct.METHOD, own.METHOD, *FOREIGN)


@dataclass
class Checkpoint:
    """A directory opened and compared with itself.

    Attributes:
        hashes: whether files are compared with the manifest's checksums.
        problems: everything that is wrong; nothing may be loaded unless it is empty.
        record: what lowbit wrote down of the weights, in the manifest or, where another program wrote the files for it,
            in their metadata.
        weights: the quantized parameters; `leaves` says which tensors each consists of.
        plain: all other parameters and buffers.
        understood: whether it is known which weights are quantized, so that a comparison with a model makes sense.
    """

    path: Path
    hashes: bool
    problems: list[str] = field(default_factory=list)
    manifest: Manifest | None = None
    record: Manifest | Record | None = None
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    leaves: dict[str, list[Leaf]] = field(default_factory=dict)
    plain: dict[str, TensorInfo] = field(default_factory=dict)
    #: What lies beside the weights of layers: tensors of `plain` by their names in a `QuantizedLinear`.
    beside: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self.manifest = Manifest.read(self.path)
            damaged = False
        except CheckpointError as error:
            damaged = True
            self.problems.extend(error.problems)
        self.files = Files(self.path)
        if self.manifest is not None and self.hashes:
            self._compare_checksums(self.manifest)
        self.problems.extend(p for p in self.files.problems if p not in self.problems)
        self.record = self.manifest
        if self.record is None and self.files.description is not None:
            try:
                self.record = Record.parse(self.files.description)
            except ValueError as error:
                damaged = True
                self.problems.append(f"the metadata {DESCRIPTION!r} of the files cannot be read: {error}")
        try:
            section = read_json(self.path / CONFIG).get(SECTION)
        except CheckpointError as error:
            self.problems.extend(error.problems)
            section = None
        before = len(self.problems)
        if not damaged:
            self._understand(section)
        self.understood = not damaged and len(self.problems) == before
        if not damaged:
            self._compare_tensors()

    @property
    def tied(self) -> Mapping[str, str]:
        return self.record.tied if self.record else {}

    @property
    def names(self) -> list[str]:
        """Parameters and buffers that are stored, quantized or not."""
        return [*self.weights, *self.plain]

    def info(self, name: str) -> TensorInfo:
        """What the model sees of a parameter."""
        w = self.weights.get(name)
        return TensorInfo(w.dtype, w.shape) if w else self.plain[name]

    def tensor(self, name: str, device: torch.device | str | None) -> Tensor:
        """One parameter: a plain tensor, or a `QuantizedTensor` made of its planes."""
        if name not in self.weights:
            return self.files.get(name, device)
        return self.assemble(name, lambda leaf: self.files.get(leaf.name, device))

    def assemble(self, name: str, get: Callable[[Leaf], Tensor]) -> QuantizedTensor:
        """A quantized weight of its stored tensors, which `get` brings."""
        w = self.weights[name]
        planes = {}
        for leaf in self.leaves[name]:
            if leaf.plane is None:
                continue
            stored = get(leaf)
            if stored.dtype != leaf.info.dtype:
                stored = stored.to(leaf.info.dtype)  # fp32 scales that another tool keeps in 16 bits
            planes[leaf.plane] = leaf.from_disk(stored)
            if leaf.plane in w.exact:
                planes[leaf.plane].fill_(w.exact[leaf.plane])
        act_scale = planes.pop(ACT_SCALE, None)
        return QuantizedTensor(planes, w.format, w.shape, w.dtype, w.act, act_scale)

    def _compare_checksums(self, manifest: Manifest) -> None:
        for name, expected in manifest.files.items():
            file = self.path / name
            if not file.is_file():
                self.problems.append(f"{name} is missing")
            elif (found := sha256(file)) != expected:
                size = f"{found.size} bytes, expected {expected.size}" if found.size != expected.size else "same size"
                self.problems.append(
                    f"{name} was changed since it was saved ({size}; sha256 {found.sha256[:12]}, expected "
                    f"{expected.sha256[:12]}){self._where(manifest, name)}; verify=False accepts it"
                )
        for file in sorted(self.path.glob("*.safetensors")):
            if file.name not in manifest.files:
                self.problems.append(f"{file.name} is not part of this checkpoint")

    def _where(self, manifest: Manifest, name: str) -> str:
        """Which tensors of a changed file are not what they were."""
        inside = [t for t in manifest.checks if self.files.file.get(t) == name]
        damaged = [t for t in inside if self.files.crc32(t) != manifest.checks[t]]
        if not damaged:
            return ": not its tensors" if inside else ""
        return ": damaged are " + ", ".join(damaged[:6]) + (f" and {len(damaged) - 6} more" if damaged[6:] else "")

    def _understand(self, section: Any) -> None:
        """Which weights are quantized, and how, from the manifest or from another tool's config; both must agree."""
        method = section.get("quant_method") if isinstance(section, Mapping) else None
        if section is not None and method not in READABLE:
            self.problems.append(f"{CONFIG}: unknown quant_method {method!r}; lowbit reads {', '.join(READABLE)}")
        elif self.record is None and (method == own.METHOD or (self.files.ours and self.hashes)):
            hint = "; verify=False reads it as another tool's" if method == ct.METHOD else ""
            self.problems.append(f"{MANIFEST} is missing: the checkpoint is not complete{hint}")
        else:
            try:
                if method in FOREIGN:
                    self._of_another_tool(FOREIGN[method](section))
                elif method == ct.METHOD:
                    self._standard(Section(section))
                else:
                    self._canonical(section)
            except (ValueError, TypeError, RecursionError) as error:
                self.problems.append(f"{CONFIG}: {SECTION}: {error}")

    def _canonical(self, section: Mapping[str, Any] | None) -> None:
        weights = self.record.weights if self.record else {}
        found = {} if section is None else section
        expected = own.canonical_section(weights, self.files.info) if weights else {}
        for key in sorted(set(found) | set(expected)):
            if key == "weights" and isinstance(found.get(key), Mapping):
                for name in sorted(set(found[key]) | set(weights)):
                    theirs, mine = found[key].get(name), weights[name].spec if name in weights else None
                    if theirs != mine:
                        self.problems.append(f"{CONFIG}: {name} is {_described(theirs)}, the manifest says {mine}")
            elif found.get(key) != expected.get(key):
                raise ValueError(f"{key} is {found.get(key)!r}, expected {expected.get(key)!r}")
        for name, w in weights.items():
            self._add(name, w, own.canonical_leaves(name, w))

    def _standard(self, section: Section) -> None:
        if self.record is None:
            self._of_another_tool(section)
            return
        for name, w in self.record.weights.items():
            group = section.group_of(name.removesuffix(".weight"))
            if agrees(group, w):
                self._add(name, w, ct.leaves(name, w))
            else:
                says = ct.describe(group.weight, group.act) if group else "not quantized"
                self.problems.append(f"{CONFIG}: {name} is {says}, the manifest says {w.spec}")

    def _of_another_tool(self, reader: Reader) -> None:
        config = read_json(self.path / CONFIG)
        dtype = DTYPES.get(_DTYPE_WORDS.get(str(config.get("dtype") or config.get("torch_dtype")), ""), torch.bfloat16)
        layers: dict[str, dict[str, TensorInfo]] = {}
        names: dict[str, set[str]] = {}
        for name, info in self.files.info.items():
            layer, leaf = reader.split(name)
            if layer:
                layers.setdefault(layer, {})[leaf] = info
                names.setdefault(layer, set()).add(name)
        for layer, within in sorted(layers.items()):
            if not within.keys() & reader.marks:
                continue
            try:
                w, leaves = reader.weight(layer, within, self.files, dtype)
            except ValueError as error:
                self.problems.append(str(error))
                continue
            self._add(reader.parameter(layer), w, leaves)
            for name in sorted(names[layer] - {leaf.name for leaf in leaves} - {f"{layer}.bias"}):
                self.problems.append(f"{self.files.file[name]}: {name} does not belong to {w.spec}")

    def _add(self, name: str, w: StoredWeight, leaves: list[Leaf]) -> None:
        self.weights[name] = w
        self.leaves[name] = leaves

    def _compare_tensors(self) -> None:
        found, file = self.files.info, self.files.file
        parts = {leaf.name: (name, leaf) for name, leaves in self.leaves.items() for leaf in leaves}
        expected = dict(self.manifest.tensors) if self.manifest else {}
        expected |= {name: leaf.info for name, (_, leaf) in parts.items()}
        for name, info in expected.items():
            of = f" of {parts[name][0]} ({self.weights[parts[name][0]].spec})" if name in parts else ""
            if name not in found:
                self.problems.append(f"tensor {name}{of} is missing, expected {info}")
            elif found[name] != info and not (self.record is None and _widens(found[name], info)):
                self.problems.append(f"{file[name]}: {name}{of} is {found[name]}, expected {info}")
            elif name in parts:
                self._compare_values(*parts[name])
        for name, info in found.items():
            if name not in parts:
                self.plain[name] = info
                if self.manifest and name not in expected:
                    self.problems.append(f"{file[name]}: tensor {name} is not part of this checkpoint")
        for layer, ends in own.beside_in(self.plain, self.weights).items():
            self.beside[layer] = {end: self.plain[f"{layer}.{end}"] for end in ends}
            w, infos = self.weights[f"{layer}.weight"], {e: (i.dtype, i.shape) for e, i in self.beside[layer].items()}
            if (problem := misfit_beside(w.n, w.k, infos)) is not None:
                self.problems.append(f"{layer}: {problem}")

    def _compare_values(self, parameter: str, leaf: Leaf) -> None:
        """Tensors that say again what is known."""
        w, where = self.weights[parameter], self.files.file[leaf.name]
        if leaf.plane is None:
            stored, expected = self.files.get(leaf.name), leaf.to_disk(torch.empty(0))
            if not torch.equal(stored, expected):
                self.problems.append(f"{where}: {leaf.name} holds {_few(stored)}, expected {_few(expected)}")
        elif leaf.plane in w.exact:
            found, exact = float(leaf.from_disk(self.files.get(leaf.name))), w.exact[leaf.plane]
            if not abs(found - exact) <= 2**-22 * abs(exact):  # the last bits of fp32; a NaN is no match either
                self.problems.append(f"{where}: {leaf.name} stands for {found}, the manifest says {exact}")


def _few(t: Tensor) -> str:
    """The numbers of a small tensor, the first ones of a larger."""
    numbers = t.flatten()[:6].tolist()
    return str(numbers) if t.numel() <= len(numbers) else str(numbers)[:-1] + ", ...]"


_FLOATS = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
_DTYPE_WORDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _described(spec: object) -> str:
    """A format spec of a config for an error message, which says so if there is no such format."""
    try:
        parse_spec(spec)
    except ValueError as error:
        return f"{spec!r} ({error})"
    return str(spec)


def _widens(found: TensorInfo, expected: TensorInfo) -> bool:
    """Whether fp32 numbers are only stored in 16 bits."""
    return (
        found.shape == expected.shape
        and expected.dtype == torch.float32
        and found.dtype in (torch.bfloat16, torch.float16)
    )


def to_be_beside(checkpoint: Checkpoint, model: nn.Module, problems: list[str]) -> dict[str, dict[str, Tensor]]:
    """Empty tensors for what lies beside weights in the checkpoint and not in the model, by layer; `problems` gets
    layers that cannot have that. Without it a layer would compute something else, strict or not."""
    found, layers = dict[str, dict[str, Tensor]](), dict(model.named_modules())
    for layer, infos in checkpoint.beside.items():
        module = layers.get(layer)
        if module is None or beside(module):
            continue
        if (reason := why_nothing_beside(module)) is not None:
            problems.append(f"{layer} has {', '.join(infos)} in the checkpoint: {reason}")
            continue
        device = module.weight.device
        found[layer] = {n: torch.empty(i.shape, dtype=i.dtype, device=device) for n, i in infos.items()}  # type: ignore[arg-type]
    return found


def misfits(checkpoint: Checkpoint, model: nn.Module, targets: Mapping[str, Any], strict: bool) -> list[str]:
    """Where a checkpoint and a model differ."""
    problems = []
    layers = dict(model.named_modules())
    for name in checkpoint.names:
        if name not in targets:
            if strict:
                problems.append(f"{name} is in the checkpoint, but not in the model; strict=False leaves it out")
            continue
        found, target, w = checkpoint.info(name), targets[name], checkpoint.weights.get(name)
        if found.shape != tuple(target.shape):
            problems.append(
                f"{name} has shape {list(found.shape)} in the checkpoint, {list(target.shape)} in the model"
            )
        if w is not None and w.act is not None and not isinstance(layers[name.rpartition(".")[0]], nn.Linear):
            kind = type(layers[name.rpartition(".")[0]]).__name__
            problems.append(f"{name} quantizes activations ({w.spec}), which needs a Linear; the model has a {kind}")
        if w is None and found.dtype != target.dtype and not {found.dtype, target.dtype} <= _FLOATS:
            why = ": codes without their scales?" if target.dtype in _FLOATS and found.dtype.itemsize == 1 else ""
            problems.append(f"{name} is {found}, the model has {target.dtype}{why}")
    groups: dict[int, list[str]] = {}
    for name, target in targets.items():
        groups.setdefault(id(target), []).append(name)
    have = set(checkpoint.names)
    for name, target in targets.items():
        alike = {name, checkpoint.tied.get(name, name), *groups[id(target)]}
        if strict and not alike & have:
            problems.append(
                f"{name} {list(target.shape)} is in the model, but not in the checkpoint; strict=False keeps it"
            )
    for name, buffer in model.named_buffers():
        if strict and buffer.is_meta and name not in targets:
            problems.append(f"buffer {name} is never stored and on the meta device; build it with torch.device('cpu')")
    return problems
