"""How files are damaged: bits, safetensors headers, JSON, bytes anywhere, and pickles that mean harm."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from typing import Any

from lowbit.checkpoints.files import json_bytes

Change = Callable[[random.Random, bytes], bytes]

#: What a JSON value is replaced by.
VALUES = (
    None, -1, 0, 1, 3, 1.5, True, False, "", "x", [], {}, [1], {"a": 1}, "int4:g0", "re:(", 10**30, 10**400, 2**63,
    "0x1p99999", [-1, 3],
    "F32", "../x", "gptq", [[]], 1e308, "a" * 1000,
)  # fmt: skip
#: What is put between bytes.
PIECES = (b"[", b"]", b"}", b"9" * 30, b'"a"', b'"a":1,', b"null", b"-1", b"{}", b"true", b"1e400", b"\xff", b"\0" * 8)


# Bytes ----------------------------------------------------------------------------------------------------------------


def flipped(content: bytes, at: int, bit: int) -> bytes:
    out = bytearray(content)
    out[at] ^= 1 << bit
    return bytes(out)


def any_bytes(rng: random.Random, content: bytes, within: int | None = None) -> bytes:
    """One to three changes among the first `within` bytes: a bit, a byte, something cut out, something put in, the end
    cut off."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(1, min(len(out), within or len(out))))
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            out[at : at + rng.randrange(1, 20)] = b""
        elif kind == 3:
            out[at:at] = rng.choice(PIECES)
        else:
            del out[at:]
    return bytes(out)


# JSON -----------------------------------------------------------------------------------------------------------------


def any_value(rng: random.Random, data: Any) -> None:
    """Replace, remove, add or repeat one value of a JSON object, in place and at any depth."""
    node = data
    while True:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        break
    kind = rng.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice(("a", "weight", "desc_act", "sparsity_config", "version", "\0"))] = rng.choice(VALUES)
    elif kind == 2 and isinstance(node, dict):
        node[rng.choice(sorted(node))] = node[key]
    else:
        node[key] = rng.choice(VALUES)


def any_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file with other values, or other bytes."""
    if rng.random() < 0.2:
        return any_bytes(rng, content)
    data = json.loads(content)
    for _ in range(rng.randint(1, 2)):
        any_value(rng, data)
    return json.dumps(data).encode()


def any_manifest(rng: random.Random, content: bytes) -> bytes:
    """A manifest with other values that agrees with itself, as only malice makes it."""
    data = json.loads(content)
    any_value(rng, data)
    data.pop("sha256", None)
    return json_bytes(data | {"sha256": hashlib.sha256(json_bytes(data)).hexdigest()})


# Safetensors headers --------------------------------------------------------------------------------------------------


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def with_header(content: bytes, header: bytes) -> bytes:
    """Another header before the same data."""
    return len(header).to_bytes(8, "little") + header + content[header_end(content) :]


def any_header(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file whose header lies: in its length, its JSON, a dtype, a shape, offsets, or a name."""
    end = header_end(content)
    kind = rng.randrange(7)
    if kind == 0:
        length = rng.choice(
            (0, 1, 7, end - 9, end - 7, len(content), 2**31, 2**32, 2**63, 2**64 - 1, rng.randrange(999))
        )
        return length.to_bytes(8, "little") + content[8:]
    if kind == 1:
        return any_bytes(rng, content, within=end)
    header = json.loads(content[8:end])
    names = sorted(set(header) - {"__metadata__"})
    entry = header[rng.choice(names)]
    if kind == 2:
        any_value(rng, header)
    elif kind == 3:
        entry["dtype"] = rng.choice(("F32", "I32", "U8", "I8", "BF16", "F16", "F64", "BOOL", "F8_E4M3", "F4", "Q4", ""))
    elif kind == 4:
        entry["shape"] = rng.choice((
            entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][:-1], [2**62, 4], [0], [-1], [2**64],
            [size + 1 for size in entry["shape"]],
        ))  # fmt: skip
    elif kind == 5:
        begin, stop = entry["data_offsets"]
        other = header[rng.choice(names)]["data_offsets"]
        entry["data_offsets"] = rng.choice((
            other, [stop, begin], [begin + 1, stop + 1], [begin, stop - 1], [begin, 2**63], [0, 0], [-1, 1], [begin],
        ))  # fmt: skip
    else:
        name = rng.choice(names)
        header[rng.choice((f"{name}x", name.upper(), "", "__metadata__", "a" * 5000))] = header.pop(name)
    text = json.dumps(header).encode()
    if rng.random() < 0.2:
        text = text.replace(b"{", b'{"twice":1,"twice":2,', 1)
    return with_header(content, text + b" " * (-len(text) % 8))


# Pickles --------------------------------------------------------------------------------------------------------------


class _Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = (function, arguments)

    def __reduce__(self) -> Any:
        return self.called


def _zipped(payload: bytes) -> bytes:
    """The form of `torch.save`: a zip archive with the pickle inside."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3")
    return out.getvalue()


def pickles(harm: str) -> dict[str, bytes]:
    """Twelve files, by name, each of which would make the directory `harm` if it was unpickled."""
    import os
    import subprocess

    code = f"import os; os.makedirs({harm!r}, exist_ok=True)"
    calls = {
        "mkdir": _Calls(os.mkdir, harm), "system": _Calls(os.system, f"mkdir -p {harm}"), "exec": _Calls(exec, code),
        "eval": _Calls(eval, f"__import__('os').mkdir({harm!r})"),
        "run": _Calls(subprocess.call, ["mkdir", "-p", harm]),
        "open": _Calls(open, f"{harm}.txt", "w"),
    }  # fmt: skip
    raw = {name: pickle.dumps({"a.weight": call}) for name, call in calls.items()}
    return {
        "pytorch_model.bin": raw["mkdir"],
        "model.pt": raw["system"],
        "model.pth": raw["exec"],
        "model.ckpt": raw["eval"],
        "model.pkl": raw["run"],
        "model.pickle": raw["open"],
        "pytorch_model-00001-of-00002.bin": _zipped(raw["mkdir"]),
        "zipped.pt": _zipped(raw["exec"]),
        "old.pth": pickle.dumps(_Calls(exec, code), protocol=0),
        # Under names that are opened, by a parser that knows no code.
        "model.safetensors": raw["mkdir"],
        "zipped/model.safetensors": _zipped(raw["system"]),
        "model.gguf": raw["eval"],
    }
