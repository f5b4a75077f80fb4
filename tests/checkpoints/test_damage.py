"""Damaged, incomplete and hostile checkpoints: every one is a `CheckpointError` that names what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit import QuantizedTensor, quantize_
from lowbit.checkpoint import CheckpointError, load, read, save, verify
from lowbit.checkpoints.files import json_bytes

INDEX, CONFIG, MANIFEST = "model.safetensors.index.json", "config.json", "lowbit_manifest.json"
SECTION = "quantization_config"
Header = dict[str, Any]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(64, 24), "b": nn.Linear(32, 40, bias=False), "norm": nn.LayerNorm(40)})


def empty() -> nn.Module:
    with torch.device("meta"):
        return net()


@pytest.fixture(params=["compressed-tensors", "lowbit"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint in either convention, in two files."""
    model = net()
    rules = (
        {"a": "int4wo-32", "b": "nvfp4wo"}
        if request.param == "compressed-tensors"
        else {"a": "int3wo-64", "b": "nf4wo-64"}
    )
    quantize_(model, rules, measure=False)
    path = tmp_path / "checkpoint"
    save(model, path, max_shard_bytes=1200)
    assert json.loads((path / CONFIG).read_text())[SECTION]["quant_method"] == request.param
    assert len(list(path.glob("*.safetensors"))) == 2
    return path


def problems(directory: Path, check: bool = True) -> str:
    """What `load` says, which leaves the model alone and agrees with `verify` and `read`."""
    model = empty()
    with pytest.raises(CheckpointError) as error:
        load(model, directory, verify=check)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(CheckpointError):
        read(directory, verify=check)
    assert not verify(directory).ok
    return "\n".join(error.value.problems)


def holder(directory: Path, tensor: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][tensor]


def rewrite(path: Path, change: Callable[[Header], None], data: Callable[[bytes], bytes] = bytes) -> None:
    """Change the header of a safetensors file, and its data."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data(raw[end:]))


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def part(directory: Path, of: str) -> str:
    """One tensor of layer `of`, besides its scale and its shape."""
    names = json.loads((directory / INDEX).read_text())["weight_map"]
    shapes = {n for n in names if any(other.startswith(f"{n}.") for other in names)}
    return sorted(n for n in names if n.startswith(of) and "scale" not in n and "bias" not in n and n not in shapes)[0]


# Bits -----------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(directory: Path) -> None:
    assert verify(directory).ok
    generator = torch.Generator().manual_seed(0)
    names = sorted(p.name for p in directory.iterdir())
    assert len(names) == 5
    for name in names:
        raw = (directory / name).read_bytes()
        for _ in range(40):
            flipped = bytearray(raw)
            at = int(torch.randint(len(raw), (1,), generator=generator))
            flipped[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
            (directory / name).write_bytes(flipped)
            found = verify(directory)
            assert not found.ok
            assert name in str(found), (name, at)
            with pytest.raises(CheckpointError):
                read(directory)
        (directory / name).write_bytes(raw)
    assert verify(directory).ok


def test_a_manifest_with_a_key_given_twice(directory: Path) -> None:
    """The last of equal keys wins, so that the content is the same; the bytes are not."""
    text = (directory / MANIFEST).read_text()
    (directory / MANIFEST).write_text(text.replace('"files": {', '"files": {"model.safetensors": {}}, "files": {', 1))
    assert "checksum" in problems(directory)


@pytest.mark.parametrize("left", [0, 7, 8, 100, -1000, -1])
def test_truncated_files(directory: Path, left: int) -> None:
    for path in sorted(directory.glob("*.safetensors")):
        raw = path.read_bytes()
        path.write_bytes(raw[:left])
        assert f"{path.name} was changed" in problems(directory)
        assert f"{path.name} is damaged" in problems(directory, check=False)
        path.write_bytes(raw)


def test_missing_files(directory: Path) -> None:
    for path in sorted(directory.iterdir()):
        if path.name == MANIFEST:
            continue  # other tools write none: below
        kept = path.read_bytes()
        path.unlink()
        assert path.name in problems(directory) or path.name == INDEX
        assert "missing" in problems(directory, check=False)
        path.write_bytes(kept)


def test_no_manifest_is_not_complete(directory: Path) -> None:
    (directory / MANIFEST).unlink()
    assert "lowbit_manifest.json is missing" in problems(directory)
    method = json.loads((directory / CONFIG).read_text())[SECTION]["quant_method"]
    if method == "lowbit":
        assert "lowbit_manifest.json is missing" in problems(directory, check=False)
    else:  # a reader may insist: the files say everything but the checksums
        assert isinstance(read(directory, verify=False)["a.weight"], QuantizedTensor)


# Tensors --------------------------------------------------------------------------------------------------------------


def test_another_dtype_of_the_same_size(directory: Path) -> None:
    """Nothing in a safetensors file tells that its header was changed; every tensor's dtype is known here."""
    swap = {"I32": "F32", "F32": "I32", "U8": "I8", "I8": "U8", "BF16": "F16", "F8_E4M3": "F8_E5M2", "I64": "F64"}
    for tensor, file in json.loads((directory / INDEX).read_text())["weight_map"].items():
        raw = (directory / file).read_bytes()
        rewrite(directory / file, lambda h, t=tensor: h[t].update(dtype=swap[h[t]["dtype"]]))  # type: ignore[misc]
        found = problems(directory, check=False)
        assert f"{file}: {tensor}" in found
        assert "expected" in found
        (directory / file).write_bytes(raw)


def test_another_shape_of_the_same_size(directory: Path) -> None:
    tensor = part(directory, "a.")
    path = holder(directory, tensor)
    rewrite(path, lambda h: h[tensor].update(shape=h[tensor]["shape"][::-1]))
    found = problems(directory, check=False)
    assert f"{path.name}: {tensor} of a.weight" in found
    assert "expected" in found


def test_missing_and_additional_tensors(directory: Path) -> None:
    tensor = part(directory, "b.")
    path = holder(directory, tensor)
    rewrite(path, lambda h: h.update({"stranger": h.pop(tensor)}))
    found = problems(directory, check=False)
    assert f"tensor {tensor} of b.weight" in found
    assert f"{path.name}: tensor stranger is not part of this checkpoint" in found


def test_a_wrong_weight_shape_tensor(tmp_path: Path) -> None:
    model = net()
    quantize_(model, {"a": "int8wo"}, measure=False)
    save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    rewrite(path, lambda h: None, lambda data: data.replace((64).to_bytes(8, "little"), (63).to_bytes(8, "little")))
    assert "a.weight_shape holds [24, 63], expected [24, 64]" in problems(tmp_path, check=False)


def test_a_global_scale_that_the_manifest_contradicts(tmp_path: Path) -> None:
    model = nn.ModuleDict({"b": nn.Linear(32, 40, bias=False)})
    quantize_(model, {"b": "nvfp4wo"}, measure=False)
    x = torch.linspace(1, 2, 1000) * 1e-4
    model["b"].weight.outer_scale.fill_(x[x.reciprocal().reciprocal() != x][0])  # type: ignore[index,operator,union-attr]
    save(model, tmp_path)
    assert read(tmp_path)["b.weight"].outer_scale == model["b"].weight.outer_scale  # type: ignore[attr-defined,union-attr]
    rewrite(tmp_path / "model.safetensors", lambda h: None, lambda data: b"\0\0\x80\x3f" + data[4:])
    with pytest.raises(CheckpointError, match=r"stands for 1\.0, the manifest says"):
        read(tmp_path, verify=False)


@pytest.mark.parametrize("number", ["0x1p99999", "nan", "one", 1])
def test_numbers_of_a_manifest_that_are_none(number: object, tmp_path: Path) -> None:
    model = nn.ModuleDict({"b": nn.Linear(32, 40, bias=False)})
    quantize_(model, {"b": "nvfp4wo"}, measure=False)
    save(model, tmp_path)
    data = json.loads((tmp_path / MANIFEST).read_text())
    data["weights"]["b.weight"]["exact"] = {"outer_scale": number}
    del data["sha256"]
    data["sha256"] = hashlib.sha256(json_bytes(data)).hexdigest()
    (tmp_path / MANIFEST).write_bytes(json_bytes(data))
    with pytest.raises(CheckpointError, match=r"lowbit_manifest\.json is damaged|the manifest says nan"):
        read(tmp_path)


def test_everything_is_listed_at_once(directory: Path) -> None:
    a, b = part(directory, "a."), part(directory, "b.")
    rewrite(holder(directory, a), lambda h: h[a].update(shape=h[a]["shape"][::-1]))
    rewrite(holder(directory, b), lambda h: h.update({"stranger": h.pop(b)}))
    model = empty()
    model["norm"] = nn.LayerNorm(41)
    with pytest.raises(CheckpointError) as error:
        load(model, directory)
    for part_of in ("was changed since it was saved", a, b, "stranger", "norm.weight has shape [40]", "norm.bias"):
        assert part_of in str(error.value)


# Configs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": NaN', "[" * 100_000, "\udcff", "null", "1e999999"])
@pytest.mark.parametrize("name", [CONFIG, MANIFEST, INDEX])
def test_json_that_is_none(directory: Path, name: str, content: str) -> None:
    (directory / name).write_bytes(content.encode(errors="surrogateescape"))
    assert name in problems(directory)
    assert name in problems(directory, check=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.update(quant_method="quip"), "unknown quant_method 'quip'"),
        (lambda s: s.pop("quant_method"), "unknown quant_method None"),
        (lambda s: s.update(desc_act=True), "desc_act"),
    ],
)
def test_other_methods(directory: Path, change: Callable[[Any], None], expected: str) -> None:
    edit_json(directory / CONFIG, lambda c: change(c[SECTION]))
    assert expected in problems(directory, check=False)


def test_a_config_without_its_section(directory: Path) -> None:
    edit_json(directory / CONFIG, lambda c: c.pop(SECTION))
    assert CONFIG in problems(directory, check=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.update(format_version=2), "format_version"),
        (lambda s: s["weights"].update({"a.weight": "int9:g64"}), "int9"),
        (lambda s: s["weights"].update({"a.weight": "int4:g64"}), "a.weight is int4:g64, the manifest says int3:g64"),
        (lambda s: s["weights"].update({"a.weight": "os.system"}), "os.system"),
        (lambda s: s["weights"].update({"a.weight": 3}), "a format is a string"),
        (lambda s: s["weights"].pop("a.weight"), "a.weight"),
        (lambda s: s.update(weights=[]), "weights"),
    ],
)
def test_unknown_words_of_our_own(tmp_path: Path, change: Callable[[Any], None], expected: str) -> None:
    model = net()
    quantize_(model, {"a": "int3wo-64"}, measure=False)
    save(model, tmp_path)
    edit_json(tmp_path / CONFIG, lambda c: change(c[SECTION]))
    assert expected in problems(tmp_path, check=False)


def test_a_newer_format_version(directory: Path) -> None:
    edit_json(directory / MANIFEST, lambda m: m.update(format_version=2))
    assert "format version 2, this lowbit reads 1" in problems(directory)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", 3, None])
def test_an_index_leads_nowhere_else(directory: Path, name: object) -> None:
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory.parent / "model.safetensors")

    def redirect(index: Any) -> None:
        for tensor, file in index["weight_map"].items():
            if file == "model-00001-of-00002.safetensors":
                index["weight_map"][tensor] = name

    edit_json(directory / INDEX, redirect)
    assert "in the same directory" in problems(directory, check=False)


# Anything at all ------------------------------------------------------------------------------------------------------


def test_whatever_a_file_says_the_error_is_ours(directory: Path) -> None:
    """Random changes of every file, JSON values included, with and without a manifest that vouches for them."""
    rng = random.Random(0)
    original = {p.name: p.read_bytes() for p in directory.iterdir()}
    refused = 0
    for _ in range(200):
        name = rng.choice(sorted(original))
        content = mutated(rng, name, original[name])
        (directory / name).write_bytes(content)
        if without := rng.random() < 0.3:
            (directory / MANIFEST).unlink()
        for check in (True, False):
            try:
                load(empty(), directory, verify=check)
            except CheckpointError:
                refused += 1
        verify(directory)
        (directory / name).write_bytes(original[name])
        if without:
            (directory / MANIFEST).write_bytes(original[MANIFEST])
    assert refused > 200
    assert verify(directory).ok


VALUES = (None, -1, 0, 1.5, True, "x", [], {}, [1], {"a": 1}, "int4:g0", "re:(", 10**30, [-1, 3], "F32", "../x")
PIECES = (b"[", b"9" * 30, b'"a"', b"null", b"-1", b"{}", b"true", b"1e400", b"\xff")


def mutated(rng: random.Random, name: str, content: bytes) -> bytes:
    if name.endswith(".json") and rng.random() < 0.7:
        data = json.loads(content)
        node = data
        while True:
            key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            node[key] = rng.choice(VALUES)
            break
        if name != MANIFEST:
            return json.dumps(data).encode()
        data.pop("sha256", None)  # a manifest that agrees with itself
        return json_bytes(data | {"sha256": hashlib.sha256(json_bytes(data)).hexdigest()})
    out = bytearray(content)
    at = rng.randrange(min(len(out), 900))
    if rng.random() < 0.5:
        out[at : at + rng.randrange(20)] = b""
    else:
        out[at:at] = rng.choice(PIECES)
    return bytes(out)


# Pickles --------------------------------------------------------------------------------------------------------------


class Payload:
    """What a hostile pickle does when it is opened: here it makes a directory."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


WATCH: list[list[str]] = []


def _audit(event: str, args: Any) -> None:
    if WATCH and event in ("open", "pickle.find_class"):
        WATCH[-1].append(f"{event} {args[0]} {args[1]}" if event.startswith("pickle") else f"open {args[0]}")


sys.addaudithook(_audit)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every file opened, and every name that a pickle looks up, until the test ends."""
    WATCH.append([])
    yield WATCH[-1]
    WATCH.pop()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"])
def test_pickles_are_refused_unopened(suffix: str, tmp_path: Path, opened: list[str]) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(pickle.dumps({"a.weight": Payload(str(tmp_path / "harm"))}))
    (tmp_path / CONFIG).write_text("{}")
    opened.clear()
    for where in (path, tmp_path):
        for call in (lambda w: load(net(), w), read, checked):
            with pytest.raises(CheckpointError, match=r"pickle.*save_file"):
                call(where)
    assert not (tmp_path / "harm").exists()
    assert not [line for line in opened if line.endswith(suffix) or "find_class" in line]
    assert [line for line in opened if line.endswith(CONFIG)]  # the watch works


def checked(directory: Path) -> None:
    found = verify(directory)
    if not found.ok:
        raise CheckpointError(directory, found.problems)


def test_a_pickle_under_a_safe_name(tmp_path: Path, opened: list[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Payload(str(tmp_path / "harm"))))
    (tmp_path / CONFIG).write_text("{}")
    assert "model.safetensors is damaged" in problems(tmp_path)
    assert not (tmp_path / "harm").exists()
    assert not [line for line in opened if "find_class" in line]


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path / "absent.bin"):
        with pytest.raises(CheckpointError):
            verify(path)
    assert "config.json is missing" in problems(tmp_path)
    assert "model.safetensors is missing" in problems(tmp_path)
