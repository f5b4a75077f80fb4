"""Files of every scheme, written once and kept, have to be read as on the day they were written.

    python tests/faults/golden.py        writes those that are not there yet

`tests/golden/<version>/<name>/` is a checkpoint as that version of lowbit wrote it; `expected.json` beside them has the
scheme, the decoded weights' SHA-256 and the scale of a static activation. A directory is never written again: a change
of how values are chosen makes other files, which must not hide that the old ones are no longer read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit import QuantizedTensor, __version__, load, parse_config, quantize_, save, verify
from lowbit.formats import registered
from lowbit.specs import EXAMPLES

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
N, K, LARGEST = 24, 256, 64 << 10


def run(cases: int, directory: Path) -> Any:
    from faults.outcome import Outcome

    outcome = Outcome()
    for version in sorted(p for p in GOLDEN.iterdir() if p.is_dir()):
        for name, expected in list(json.loads((version / "expected.json").read_text()).items())[:cases]:
            outcome.add(_other(version / name, expected))
            outcome.counts[f"written by {version.name}"] += 1
    return outcome


def schemes() -> dict[str, Any]:
    """Every config, and every registered format that no config has, by the name of a directory."""
    found: dict[str, Any] = {spec: parse_config(spec) for spec in EXAMPLES}
    by_config = {config.scheme.weight for config in found.values()}
    return found | {fmt.spec.replace(":", "_"): parse_config(fmt.spec) for fmt in registered() if fmt not in by_config}


def _model() -> nn.Module:
    return nn.ModuleDict({"layer": nn.Linear(K, N, dtype=torch.bfloat16)})


def _described(weight: QuantizedTensor) -> dict[str, Any]:
    decoded = weight.dequantize(torch.float32).contiguous()
    return {
        "scheme": weight.format.spec if weight.act is None else f"{weight.act.spec}->{weight.format.spec}",
        "sha256": hashlib.sha256(decoded.numpy().tobytes()).hexdigest(),
        "first": decoded[0, :4].tolist(),
        "act_scale": None if weight.act_scale is None else float(weight.act_scale),
    }


def _other(directory: Path, expected: dict[str, Any]) -> str | None:
    if not (found := verify(directory)).ok:
        return str(found)
    model = _model()
    load(model, directory)
    got = _described(model["layer"].weight)  # type: ignore[index]
    if (size := sum(p.stat().st_size for p in directory.iterdir())) > LARGEST:
        return f"{directory.name}: {size} bytes"
    return None if got == expected else f"{directory.name}: {got}, expected {expected}"


def make() -> None:
    """The directories of this version that are missing."""
    folder = GOLDEN / __version__
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "expected.json"
    expected = json.loads(file.read_text()) if file.exists() else {}
    for name, config in schemes().items():
        if name in expected:
            continue
        model = _model()
        g = torch.Generator().manual_seed(len(name))
        for parameter in model.parameters():
            parameter.data = (torch.randn(parameter.shape, generator=g) * 0.02).bfloat16()
        model["layer"].weight.data[3] = 0  # type: ignore[index]
        model["layer"].weight.data[5, ::17] *= 40  # type: ignore[index]
        act = config.scheme.act
        calibration = None
        if act is not None and act.static:
            from lowbit import calibrate

            calibration = calibrate(model["layer"], [torch.randn(8, K, generator=g).bfloat16()])  # type: ignore[index]
            calibration = {"layer": next(iter(calibration.values()))}
        quantize_(model, config, calibration=calibration, measure=False)
        save(model, folder / name, config={"model_type": "golden"})
        expected[name] = _described(model["layer"].weight)  # type: ignore[index]
        print(name)
    file.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    make()
