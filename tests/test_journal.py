"""Journals: what is read is what was written, in this order, or it is not read at all."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lowbit import quantize_
from lowbit.checkpoints.files import DTYPES
from lowbit.journal import RUN, Entry, Journal, fingerprint, fingerprint_of

THIS = {"algorithm": "gptq", "layers": {"a": "int4:g32", "b": "int8:row", "c": "int8:row"}}


def entry(i: int) -> Entry:
    """Every dtype, an empty tensor and one without dimensions."""
    bits = torch.randint(0, 256, (3, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
    tensors = {f"{name}/x": (bits > 99 if name == "BOOL" else bits.view(dtype)) for name, dtype in DTYPES.items()}
    tensors |= {"empty": torch.empty(0, 4), "number": torch.tensor(float(i))}
    return Entry(tensors, {"rows": [i, "text", None, math.inf]})


def written(directory: Path, entries: int = 3, run: dict[str, Any] = THIS) -> Path:
    journal = opened(directory, run)
    for i in range(entries):
        assert journal.read() is None
        journal.append(entry(i))
    return directory


def opened(directory: Path, run: dict[str, Any] = THIS) -> Journal:
    journal = Journal(directory)
    journal.begin(run)
    return journal


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


def same(a: Entry | None, b: Entry) -> bool:
    return a is not None and a.notes == b.notes and a.tensors.keys() == b.tensors.keys() and all(
        (t.dtype, t.shape) == (b.tensors[n].dtype, b.tensors[n].shape) and torch.equal(bits(t), bits(b.tensors[n]))
        for n, t in a.tensors.items()
    )  # fmt: skip


def blocks(directory: Path) -> list[Path]:
    return sorted(directory.glob("block-*"))


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_entries_come_back_in_their_order(tmp_path: Path) -> None:
    journal = opened(written(tmp_path / "new" / "journal"))
    for i in range(3):
        assert same(journal.read(), entry(i))
    assert journal.read() is None
    journal.append(entry(3))
    again = opened(journal.directory)
    assert all(same(again.read(), entry(i)) for i in range(4))


def test_what_was_read_does_not_depend_on_the_file(tmp_path: Path) -> None:
    read = opened(written(tmp_path)).read()
    for path in blocks(tmp_path):
        path.write_bytes(bytes(path.stat().st_size))
    assert same(read, entry(0))


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    assert contents(written(tmp_path / "a")) == contents(written(tmp_path / "b"))


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (THIS | {"algorithm": "awq+mse"}, r"algorithm: gptq there, awq\+mse here\)"),
        (THIS | {"layers": THIS["layers"] | {"b": "int8:g32"}}, r"layers b: int8:row there, int8:g32 here\)"),
        (THIS | {"layers": {"a": "int4:g32"}}, "layers b: int8:row there, None here, and 1 more"),
        (THIS | {"torch": "9"}, r"\(torch: None there, 9 here\)"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, run: dict[str, Any], says: str) -> None:
    before = contents(written(tmp_path))
    with pytest.raises(ValueError, match=f"is of another run .*{says}.*delete this one.*journal-refused"):
        opened(tmp_path, run)
    assert contents(tmp_path) == before


def test_any_change_of_the_head_is_refused(tmp_path: Path) -> None:
    raw = (written(tmp_path) / RUN).read_bytes()
    rng = random.Random(0)
    for damaged in [raw[:-1], raw[: len(raw) // 2], b"", b"[]", raw + b"\n", *(flipped(raw, rng) for _ in range(200))]:
        (tmp_path / RUN).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"has a damaged run\.json.*journal-refused"):
            opened(tmp_path)
    assert len(blocks(tmp_path)) == 3


def flipped(raw: bytes, rng: random.Random) -> bytes:
    at, out = rng.randrange(len(raw)), bytearray(raw)
    out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "empty", "missing"])
def test_a_damaged_entry_and_those_behind_it_are_not_used(tmp_path: Path, number: int, how: str) -> None:
    path = blocks(written(tmp_path))[number]
    raw = path.read_bytes()
    damaged = {"flipped": flipped(raw, random.Random(number)), "cut": raw[:-1], "longer": raw + b"\0", "empty": b""}
    path.unlink() if how == "missing" else path.write_bytes(damaged[how])
    journal = opened(tmp_path)
    for i in range(number):
        assert same(journal.read(), entry(i))
    if how == "missing" and number == 2:
        assert journal.read() is None
    else:
        with pytest.warns(UserWarning, match=f"block {number} is damaged or missing"):
            assert journal.read() is None
    assert len(blocks(tmp_path)) == number
    for i in range(number, 3):
        assert journal.read() is None
        journal.append(entry(i))
    again = opened(tmp_path)
    assert all(same(again.read(), entry(i)) for i in range(3))


def test_every_bit_counts(tmp_path: Path) -> None:
    """In the lengths, the metadata, the header and the values."""
    path = blocks(written(tmp_path, 1))[0]
    raw, rng = path.read_bytes(), random.Random(1)
    for _ in range(200):
        path.write_bytes(flipped(raw, rng))
        with pytest.warns(UserWarning, match="block 0 is damaged"):
            assert opened(tmp_path).read() is None
        assert not path.exists()


def test_an_entry_of_another_journal_or_place_is_not_used(tmp_path: Path) -> None:
    """Its own checksum is right; what it was made behind is another."""
    mine, other = written(tmp_path / "mine", 0), written(tmp_path / "other", 2, THIS | {"algorithm": "awq+mse"})
    shutil.copy(blocks(other)[0], mine)
    with pytest.warns(UserWarning, match="block 0 is damaged or missing"):
        assert opened(mine).read() is None
    second, third = blocks(written(tmp_path / "long"))[1:]
    second.unlink()
    third.rename(third.with_name(third.name.replace("00002", "00001")))
    journal = opened(tmp_path / "long")
    assert same(journal.read(), entry(0))
    with pytest.warns(UserWarning, match="block 1 is damaged or missing"):
        assert journal.read() is None


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"holds model\.safetensors and no run\.json.*journal-refused"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"is a file.*journal-refused"):
        opened(tmp_path / "model.safetensors")
    assert contents(tmp_path) == {"model.safetensors": b"weights"}


def test_temporary_files_of_a_killed_run_are_no_entries_and_go(tmp_path: Path) -> None:
    name = blocks(written(tmp_path, 2))[1].name
    dead = 2**22 + 1  # above the largest process number of Linux
    (tmp_path / name).rename(tmp_path / f".{name}.{dead}.tmp")
    journal = opened(tmp_path)
    assert same(journal.read(), entry(0))
    assert journal.read() is None
    journal.append(entry(1))
    assert sorted(contents(tmp_path)) == sorted([RUN, *(p.name for p in blocks(tmp_path))])
    assert len(blocks(tmp_path)) == 2


def test_an_entry_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    journal = opened(written(tmp_path, 1))
    assert same(journal.read(), entry(0))
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")), pytest.raises(OSError, match="28"):
        journal.append(entry(1))
    assert len(contents(tmp_path)) == 2
    journal.append(entry(1))
    again = opened(tmp_path)
    assert all(same(again.read(), entry(i)) for i in range(2))


# Fingerprints ------------------------------------------------------------------------------------


def test_a_models_fingerprint_is_that_of_all_its_bits() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8))

    marks = [fingerprint(model())]
    assert fingerprint(model()) == marks[0]
    for change in (
        lambda m: bits(m[0].weight.data)[77:78].bitwise_xor_(1),
        lambda m: m[1].running_mean.add_(1e-6),
        lambda m: m.half(),
        lambda m: quantize_(m, "int8wo"),
        lambda m: quantize_(m, "int8dq"),
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().view(16, 16))),
        lambda m: m.register_buffer("more", torch.zeros(0)),
    ):
        changed = model()
        change(changed)
        marks.append(fingerprint(changed))
    assert len(set(marks)) == len(marks)


def test_fingerprints_of_calls() -> None:
    x = torch.arange(6.0)
    values = [
        [((x,), {})], [((x.view(2, 3),), {})], [((x.half(),), {})], [((x,), {"mask": None})], [((x,), {"mask": x})],
        [((x,), {}), ((x,), {})], [((x, True), {})], [((x, 1), {})], [((x, "1"), {})], [((x, nn.ReLU()), {})],
        [((x, [1, 2]), {})], [((x, [12]), {})], [((x + 1,), {})],
    ]  # fmt: skip
    assert len({fingerprint_of(v) for v in values}) == len(values)
    assert fingerprint_of(x.view(2, 3).t()) == fingerprint_of(x.view(2, 3).t().contiguous())
    assert fingerprint_of(nn.ReLU()) == fingerprint_of(nn.ReLU())
