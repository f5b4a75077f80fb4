"""Between a quantization block by block and its journal: what is kept of a block, and how it is put back.

Kept are the quantized weights with their rows of the report, and the scales that AWQ or SmoothQuant folded into the
float weights, from which these follow bit by bit: with alignment the original model runs on, scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibrate import Call, Keeper
from lowbit.fold import Scales, rescale_
from lowbit.formats.base import Planes
from lowbit.graph import DecoderGraph
from lowbit.journal import Entry, Journal, fingerprint, fingerprint_of
from lowbit.linear import BESIDE, beside
from lowbit.report import LayerReport, Report
from lowbit.tensor import QuantizedTensor

#: Called with a layer's row of the report, its planes, the scale of its static activation, and what lies beside it.
Put = Callable[[LayerReport, Planes, Tensor | None, dict[str, Tensor]], None]
ACT_SCALE = "act_scale"


class JournalKeeper(Keeper):
    """Keeps blocks in a journal.

    Args:
        model: gone through block by block; its float weights are those that are quantized, a rotation done.
        graph: where scales are folded, None where none are.
        run: what decides the result besides model and inputs, as JSON knows it.
        report: gets a row for each layer as it is quantized.
        put: gives a layer its quantized weight.
        scales: what has been folded into the block at hand.
    """

    def __init__(
        self, journal: Journal, model: nn.Module, graph: DecoderGraph | None, run: Mapping[str, Any], report: Report,
        put: Put, scales: Scales,
    ) -> None:  # fmt: skip
        self._scales = scales
        self._journal, self._model, self._run, self._report, self._put = journal, model, run, report, put
        self._layers = {layer.name: layer for layer in graph.layers} if graph is not None else {}
        self._entry: Entry | None = None

    def begin(self, calls: list[Call]) -> None:
        """Raises what `Journal.begin` does."""
        seen = {"batches": len(calls), "sha256": fingerprint_of(calls)}
        weights = {"sha256": fingerprint(self._model)}
        self._journal.begin({**self._run, **_surroundings(self._model), "weights": weights, "inputs": seen})

    def fold(self, block: str) -> bool:
        self._entry = self._journal.read()
        if self._entry is not None and block in self._layers:
            scales = {n: self._entry.tensors[f"{n}/scale"].to(self._device(n)) for n in self._entry.notes["scales"]}
            rescale_(self._model, self._layers[block], scales)
        return self._entry is not None

    def fill(self, block: str) -> None:
        assert self._entry is not None
        for row in self._entry.notes["layers"]:
            start, device = f"{row['name']}.weight/", self._device(row["name"])
            found = {k: t.to(device) for k, t in self._entry.tensors.items() if k.startswith(start)}
            planes = {k.removeprefix(start): t for k, t in found.items()}
            act_scale = planes.pop(ACT_SCALE, None)
            names = {end: f"{row['name']}/{end}" for end in BESIDE}
            more = {end: self._entry.tensors[n].to(device) for end, n in names.items() if n in self._entry.tensors}
            self._put(LayerReport(**row | {"shape": tuple(row["shape"])}), planes, act_scale, more)
            self._report.from_journal += 1

    def keep(self, block: str) -> None:
        rows = [r for r in self._report.quantized if r.name == block or r.name.startswith(f"{block}.")]
        tensors = {f"{source}/scale": s for source, s in self._scales.items()}
        for row in rows:
            module = self._model.get_submodule(row.name)
            weight = module.weight
            assert isinstance(weight, QuantizedTensor), row.name
            of = weight.planes if weight.act_scale is None else weight.planes | {ACT_SCALE: weight.act_scale}
            tensors |= {f"{row.name}.weight/{plane}": t.detach() for plane, t in of.items()}
            tensors |= {f"{row.name}/{name}": t.detach() for name, t in beside(module).items()}
        self._journal.append(Entry(tensors, {"layers": [asdict(r) for r in rows], "scales": sorted(self._scales)}))

    def _device(self, layer: str) -> torch.device:
        weight: Tensor = self._model.get_submodule(layer).weight  # type: ignore[assignment]
        return weight.device


def _surroundings(model: nn.Module) -> dict[str, Any]:
    """On what the last bit of a sum depends, besides the numbers."""
    from lowbit import __version__  # not at the top: lowbit imports this module

    device = next(model.parameters()).device
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{device.type} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {"lowbit": __version__, "torch": torch.__version__, "device": kind}
