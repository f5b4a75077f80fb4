"""A journal: a directory that keeps the finished blocks of a quantization, so that a killed run can go on behind them.

`run.json` says which run it is of; another run is refused. Each block is one safetensors file whose name holds its
SHA-256 and whose metadata holds that of the file before it (for the first one, of `run.json`). So a file counts only if
it is complete, unchanged, and was made behind exactly the blocks that come before it.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

from lowbit.checkpoints.files import (
    DTYPE_NAMES,
    Pending,
    Staging,
    TensorInfo,
    json_bytes,
    raw_bytes,
    safetensors_bytes,
    sha256,
)
from lowbit.errors import see
from lowbit.tensor import QuantizedTensor

VERSION = 1
RUN = "run.json"
MARK = "lowbit.journal"  # in the metadata of an entry
_NAME = re.compile(r"block-(\d{5})-([0-9a-f]{64})\.safetensors")


class Entry(NamedTuple):
    """What is kept of one block: tensors by name, on the CPU when read, and anything that JSON can say."""

    tensors: dict[str, Tensor]
    notes: Any


class Journal:
    """Entries in the order of the blocks: `begin`, then `read` until it gives None, then `append`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._count = 0
        self._last = ""  # SHA-256 of the file that the next one follows

    def begin(self, run: Mapping[str, Any]) -> None:
        """Start a journal in a directory that is empty or not there yet, or open the one of the same run.

        Args:
            run: all that decides the run's result, as JSON knows it.

        Raises:
            ValueError: the journal there is of another run, or its `run.json` is damaged, or the directory holds
                something else. Nothing has been changed then.
            OSError: it cannot be written.
        """
        body = {"format_version": VERSION, **run}
        raw = json_bytes(body | {"sha256": _sha256([json_bytes(body)])})
        if self.directory.exists() and not self.directory.is_dir():
            raise self._refused("is a file; a journal is a directory")
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / RUN
        if file.exists():
            if (found := file.read_bytes()) != raw:
                raise self._refused(_difference(found, raw))
        else:
            with Staging(self.directory) as staging:
                if others := sorted(p.name for p in self.directory.iterdir() if not p.name.startswith(".")):
                    raise self._refused(f"holds {', '.join(others[:3])} and no {RUN}, so it is no journal")
                staging.write(RUN, [raw])
                staging.commit([])
        self._count, self._last = 0, _sha256([raw])

    def read(self) -> Entry | None:
        """The next entry, or None if there is none. A damaged one is warned of and deleted with all behind it: they
        were made for its bits, which a second run may not give again on every device."""
        left = [(p, found) for p in self.directory.iterdir() if (found := _NAME.fullmatch(p.name))]
        for path, found in left:
            if int(found[1]) == self._count:
                entry = _entry(path, self._last) if sha256(path).sha256 == found[2] else None
                if entry is not None:
                    self._count, self._last = self._count + 1, found[2]
                    return entry
        lost = sorted(p for p, found in left if int(found[1]) >= self._count)
        if lost:
            warnings.warn(
                f"journal {self.directory}: block {self._count} is damaged or missing; it and the blocks behind it are "
                "done again",
                stacklevel=2,
            )
        for path in lost:
            path.unlink(missing_ok=True)
        return None

    def append(self, entry: Entry) -> None:
        """Write the next entry, flush it, and give it its name.

        Raises:
            OSError: it cannot be written; the journal ends behind the entry before it.
        """
        tensors = {
            name: Pending(TensorInfo(t.dtype, tuple(t.shape)), lambda t=t: t)  # type: ignore[misc]
            for name, t in entry.tensors.items()
        }
        mark = json.dumps({"after": self._last, "notes": entry.notes}, sort_keys=True)
        chunks = list(safetensors_bytes(tensors, metadata={"format": "pt", MARK: mark}))
        digest = _sha256(chunks)
        with Staging(self.directory) as staging:
            staging.write(f"block-{self._count:05}-{digest}.safetensors", chunks)
            staging.commit([])
        self._count, self._last = self._count + 1, digest

    def _refused(self, why: str) -> ValueError:
        return ValueError(
            f"journal {self.directory} {why}. Give this run a directory of its own, delete this one to begin anew, or "
            "repeat the run that wrote it, from the original model" + see("journal-refused")
        )


def _entry(path: Path, after: str) -> Entry | None:
    """An entry whose checksum is right, if it was made behind the file with the SHA-256 `after`."""
    with safe_open(path, framework="pt") as file:
        mark = json.loads(file.metadata()[MARK])
        if mark["after"] != after:
            return None
        # Copied: the package maps the file, which may be deleted or change later.
        return Entry({name: file.get_tensor(name).clone() for name in file.keys()}, mark["notes"])  # noqa: SIM118


def _difference(found: bytes, raw: bytes) -> str:
    """Why a `run.json` is not the expected one."""
    here = json.loads(raw)
    try:
        there = json.loads(found)
        own = there.pop("sha256")
        if _sha256([json_bytes(there)]) != own or json_bytes(there | {"sha256": own}) != found:
            raise ValueError("its checksum does not match")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"has a damaged {RUN} ({type(error).__name__}: {error})"
    parts = []
    for key in sorted((here.keys() | there.keys()) - {"sha256"}):
        a, b = there.get(key), here.get(key)
        if a != b and isinstance(a, dict) and isinstance(b, dict):
            names = [n for n in sorted(a.keys() | b.keys()) if a.get(n) != b.get(n)]
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{key} {names[0]}: {a.get(names[0])} there, {b.get(names[0])} here{more}")
        elif a != b:
            parts.append(f"{key}: {a} there, {b} here")
    return f"is of another run ({'; '.join(parts)})"


# Fingerprints ---------------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and values of all parameters and buffers."""
    return _sha256(_content([*model.named_parameters(), *model.named_buffers()]))


def fingerprint_of(value: Any) -> str:
    """SHA-256 of tensors, numbers and strings in any lists, tuples and dicts; of other things, their type."""
    return _sha256(_content(value))


def _content(value: Any) -> Iterable[bytes | memoryview]:
    if isinstance(value, QuantizedTensor):
        yield from _content([value.format.spec, value.act_spec, *value.planes.values(), value.act_scale])
    elif isinstance(value, Tensor):
        yield f"{DTYPE_NAMES.get(value.dtype, value.dtype)} {list(value.shape)}\n".encode()
        yield raw_bytes(value.detach().cpu())
    elif isinstance(value, Mapping):
        yield from _content(list(value.items()))
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} of\n".encode()
        for part in value:
            yield from _content(part)
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        yield f"{value!r}\n".encode()
    else:
        yield f"{type(value).__module__}.{type(value).__qualname__}\n".encode()


def _sha256(chunks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
