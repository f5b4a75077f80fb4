"""Checks the metadata of a GGUF file before the package `gguf` reads it.

The package believes every count that a file gives: an array of 2**60 numbers in a file of a few bytes keeps it busy for
ever. Here a count has to fit into what is left of the file.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

#: Bytes of a value by its type's number; strings and arrays say their length themselves.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def check_header(path: Path) -> None:
    """Go through the metadata once.

    Raises:
        ValueError: saying what does not fit, and at which byte.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("it is too short for the header of a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(data)


def _check(data: mmap.mmap) -> None:
    if data[:4] != b"GGUF":
        raise ValueError(f"it does not begin with GGUF, but with {data[:4]!r}")
    at, (pairs,) = 24, struct.unpack_from("<Q", data, 16)
    for _ in range(pairs):
        at = _string(data, at)
        at = _value(data, at + 4, _number(data, at, "<I"))


def _number(data: mmap.mmap, at: int, kind: str) -> int:
    if at + struct.calcsize(kind) > len(data):
        raise ValueError(f"its metadata ends in the middle, at byte {len(data)}")
    number: int = struct.unpack_from(kind, data, at)[0]
    return number


def _string(data: mmap.mmap, at: int) -> int:
    return _after(data, at + 8, _number(data, at, "<Q"), 1)


def _value(data: mmap.mmap, at: int, kind: int) -> int:
    """Where the value of type `kind` at `at` ends."""
    if kind == _STRING:
        return _string(data, at)
    if kind != _ARRAY:
        return _after(data, at, 1, _size(kind, at))
    kind, count, at = _number(data, at, "<I"), _number(data, at + 4, "<Q"), at + 12
    if kind == _STRING:
        for _ in range(count):
            at = _string(data, at)
        return at
    return _after(data, at, count, _size(kind, at))


def _size(kind: int, at: int) -> int:
    if kind not in _SIZES:
        raise ValueError(f"its metadata has a value of type {kind} before byte {at}, which no reader knows")
    return _SIZES[kind]


def _after(data: mmap.mmap, at: int, count: int, size: int) -> int:
    if count * size > len(data) - at:
        raise ValueError(f"its metadata has {count} values of {size} bytes at byte {at} of {len(data)}")
    return at + count * size
