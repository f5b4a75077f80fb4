"""Configs that say something else than the tensors, by hand, and at random for every reader."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.mutations import any_bytes, any_header, any_json, any_manifest
from faults.outcome import Outcome
from faults.subjects import KINDS, OWN, foreign, foreign_net, gguf_file, huggingface, net, on_meta, own, untouched
from lowbit import load
from lowbit.checkpoint import CheckpointError
from lowbit.models import load_model

SECTION = "quantization_config"
Edit = Callable[[dict[str, Any]], object]


def group(section: dict[str, Any]) -> dict[str, Any]:
    return section["config_groups"]["group_0"]  # type: ignore[no-any-return]


#: Which checkpoint, what is changed in its quantization_config, and what the error has to say.
BY_HAND: tuple[tuple[str, Edit, str], ...] = (
    ("lowbit", lambda s: s.update(quant_method="quip"), "unknown quant_method 'quip'"),
    ("lowbit", lambda s: s.pop("quant_method"), "unknown quant_method None"),
    ("lowbit", lambda s: s.update(format_version=2), "format_version"),
    ("lowbit", lambda s: s.pop("weights"), "weights"),
    ("lowbit", lambda s: s.update(weights=[]), "weights"),
    ("lowbit", lambda s: s.update(code="os.system"), "code"),
    ("lowbit", lambda s: s["weights"].update({"a.weight": "int4:g64"}), "a.weight is int4:g64, the manifest says int3"),
    ("lowbit", lambda s: s["weights"].update({"a.weight": "int9:g64"}), "int9"),
    ("lowbit", lambda s: s["weights"].update({"a.weight": 3}), "a format is a string"),
    ("lowbit", lambda s: s["weights"].pop("b.weight"), "b.weight"),
    ("lowbit", lambda s: s["weights"].update({"c.weight": "int4:g64"}), "c.weight"),
    ("own-ct", lambda s: s.pop("config_groups"), "config_groups"),
    ("own-ct", lambda s: group(s)["weights"].update(num_bits=8), "manifest"),
    ("own-ct", lambda s: group(s)["weights"].update(group_size=64), "manifest"),
    ("own-ct", lambda s: group(s)["weights"].update(symmetric=True), "manifest"),
    ("own-ct", lambda s: group(s).update(targets=["b"]), "manifest"),
    ("own-ct", lambda s: s["ignore"].append("a"), "a.weight is not quantized"),
    ("compressed-tensors", lambda s: s.update(quantization_status="frozen"), "quantization_status"),
    ("compressed-tensors", lambda s: s.update(sparsity_config={"format": "sparse-24"}), "sparsity_config"),
    ("compressed-tensors", lambda s: group(s)["weights"].update(actorder="group"), "actorder"),
    ("compressed-tensors", lambda s: group(s)["weights"].update(num_bits=3), "num_bits"),
    ("compressed-tensors", lambda s: group(s)["weights"].update(secret=1), "unknown arguments ['secret']"),
    ("compressed-tensors", lambda s: group(s).update(targets=["re:("]), "is not a pattern"),
    ("compressed-tensors", lambda s: group(s)["weights"].update(group_size=64), "a.weight"),
    ("gptq", lambda s: s.update(bits=3), "bits is 3, lowbit reads 2, 4, 8"),
    ("gptq", lambda s: s.update(bits=8), "a.qzeros of a.weight"),
    ("gptq", lambda s: s.update(group_size=32), "a.qzeros of a.weight"),
    ("gptq", lambda s: s.update(group_size=0), "group_size"),
    ("gptq", lambda s: s.update(sym=True), "a.qzeros holds"),
    ("gptq", lambda s: s.update(dynamic={"+:.*": {"bits": 8}}), "dynamic"),
    ("gptq-symmetric", lambda s: s.update(checkpoint_format="gptq"), "a.qzeros holds"),
    ("awq", lambda s: s.update(version="gemv"), "version is 'gemv'"),
    ("awq", lambda s: s.update(zero_point=False), "zero_point is False"),
    ("awq", lambda s: s.update(group_size=32), "a.qzeros"),
    ("bitsandbytes-nf4", lambda s: s.update(new=1), "unknown keys ['new']"),
    ("bitsandbytes-nf4", lambda s: s.update(bnb_4bit_quant_type="int4"), "bnb_4bit_quant_type"),
    ("bitsandbytes-int8", lambda s: s.update(load_in_8bit="yes"), "load_in_8bit is 'yes'"),
    ("fp8", lambda s: s.update(weight_block_size=[64, 64]), "weight_block_size is [64, 64]"),
    ("fp8", lambda s: s.update(activation_scheme="static"), "one scale per tensor"),
    ("fp8", lambda s: s.update(fmt="e5m2"), "fmt is 'e5m2'"),
)


def run_by_hand(cases: int, directory: Path) -> Outcome:
    """Each is refused for its own reason, and without looking at checksums."""
    outcome = Outcome()
    for i, (kind, edit, expected) in enumerate(BY_HAND[:cases]):
        place = directory / str(i)
        mine = {"lowbit": "lowbit", "own-ct": "compressed-tensors"}.get(kind)
        place = own(place, mine) if mine else foreign(place, kind)
        config = json.loads((place / "config.json").read_text())
        edit(config[SECTION])
        (place / "config.json").write_text(json.dumps(config))
        model = on_meta(net if mine else foreign_net)
        try:
            load(model, place, verify=False)
            outcome.add(f"{kind}: loaded in spite of {expected!r}")
        except CheckpointError as error:
            good = expected in str(error) and str(place) in str(error) and untouched(model)
            outcome.add(None if good else f"{kind}: expected {expected!r}, got {error}")
    return outcome


def run_at_random(cases: int, directory: Path) -> Outcome:
    """Any change of a JSON file, or of another tool's tensors: an error of lowbit's own that names the place, and a
    model that is as it was; or a model."""
    rng, outcome = random.Random(0), Outcome()
    places = {f"own {c}": own(directory / f"own-{c}", c) for c in OWN}
    places |= {kind: foreign(directory / kind, kind) for kind in KINDS}
    for i in range(cases):
        kind, place = list(places.items())[i % len(places)]
        # Headers of lowbit's own files have a run for themselves; those of others hold settings in their tensors, too.
        files = [f for f in sorted(place.iterdir()) if f.suffix == ".json" or not kind.startswith("own")]
        file = rng.choice(files)
        content = file.read_bytes()
        change = any_manifest if "manifest" in file.name and rng.random() < 0.8 else any_json
        if file.suffix == ".safetensors":
            change = rng.choice([any_header, any_bytes])
        file.write_bytes(change(rng, content))
        model = on_meta(net if kind.startswith("own") else foreign_net)
        try:
            load(model, place, verify=rng.random() < 0.5)
            outcome.counts[f"{kind}: read"] += 1
            outcome.add(None)
        except CheckpointError as error:
            outcome.counts[f"{kind}: refused"] += 1
            good = str(place) in str(error) and untouched(model)
            outcome.add(None if good else f"{kind}: {error}")
        except Exception as error:
            outcome.add(f"{kind}, {file.name}: {type(error).__name__}: {error}: {file.read_bytes()!r:.300}")
        file.write_bytes(content)
    return outcome


def run_language_models(cases: int, directory: Path) -> Outcome:
    """Damaged GGUF files and Hugging Face configs: a ValueError that names the file, or a model."""
    rng, outcome = random.Random(0), Outcome()
    config = huggingface(directory / "hf") / "config.json"
    file = gguf_file(directory / "model.gguf")
    json_content, gguf_content = config.read_bytes(), file.read_bytes()
    header = gguf_content.index(b"output_norm")
    for i in range(cases):
        if i % 2:
            config.write_bytes(any_json(rng, json_content))
            kind, path = "config.json", config.parent
        else:
            whole = rng.random() < 0.2
            file.write_bytes(any_bytes(rng, gguf_content, within=None if whole else header + 400))
            kind, path = "GGUF", file
        try:
            load_model(path)
            outcome.counts[f"{kind}: read"] += 1
            outcome.add(None)
        except ValueError as error:
            outcome.counts[f"{kind}: refused"] += 1
            good = str(path) in str(error) and "[lowbit: " in str(error)
            outcome.add(None if good else f"{kind} is not named: {error}")
        except Exception as error:
            outcome.add(f"{kind}: {type(error).__name__}: {error}")
    return outcome
