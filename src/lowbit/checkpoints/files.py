"""Safetensors files in a directory: written under temporary names until all are complete, read with every size checked.

Files are written here byte by byte rather than by the safetensors package, which orders the metadata at random: the
same model gives the same bytes, nothing is copied, and the checksum costs no second pass. Reading is the package's,
whose parser is fuzzed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.errors import see

CONFIG = "config.json"
MANIFEST = "lowbit_manifest.json"
SECTION = "quantization_config"  # of config.json
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MARK = "lowbit.format"
METADATA = {"format": "pt", MARK: "1"}
DESCRIPTION = (
    "lowbit.weights"  # in the metadata of files that another program wrote for lowbit: what the manifest knows
)
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read as asked. `problems` has every reason, one line each."""

    def __init__(self, where: str | Path, problems: Iterable[str]) -> None:
        self.where = str(where)
        self.problems = tuple(problems)
        head = f"{self.where}: {len(self.problems)} problems\n  " if len(self.problems) > 1 else f"{self.where}: "
        super().__init__(head + "\n  ".join(self.problems) + see("checkpoint-refused"))


class TensorInfo(NamedTuple):
    """dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{DTYPE_NAMES.get(self.dtype, str(self.dtype))} {list(self.shape)}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Pending(NamedTuple):
    """A tensor that is made when its turn to be written comes."""

    info: TensorInfo
    make: Callable[[], Tensor]


class Digest(NamedTuple):
    """What the manifest keeps of a file."""

    sha256: str
    size: int


# Writing --------------------------------------------------------------------------------------------------------------


class Staging:
    """New files of a directory, under temporary names until `commit`. Left without it, they are deleted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.digests: dict[str, Digest] = {}

    def __enter__(self) -> Staging:
        for leftover in self.directory.iterdir():
            if (found := _TEMPORARY.fullmatch(leftover.name)) and not _runs(int(found[1])):
                leftover.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for name in self.digests:
            self._temporary(name).unlink(missing_ok=True)

    def _temporary(self, name: str, kind: str = "tmp") -> Path:
        return self.directory / f".{name}.{os.getpid()}.{kind}"

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> Digest:
        """Write and flush one file, and remember its checksum.

        Raises:
            OSError: naming the file.
        """
        sha, size = hashlib.sha256(), 0
        self.digests[name] = Digest("", 0)  # so that a file that fails half way is deleted
        try:
            with self._temporary(name).open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    sha.update(chunk)
                    size += len(chunk)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.filename is None:  # a full disk does not say of which file
                error.filename = str(self.directory / name)
            raise
        self.digests[name] = Digest(sha.hexdigest(), size)
        return self.digests[name]

    def commit(self, replaced: Iterable[str]) -> None:
        """Give every file its name: weights first, `config.json`, without which nothing loads, at the very end.

        `replaced` are files of an older checkpoint here; they step aside first, its config before its weights, and come
        back if anything fails before the new ones are complete.
        """
        old, new = list[str](), list[str]()
        try:
            for name in sorted(replaced, key=lambda n: n != CONFIG):
                if (self.directory / name).exists():
                    old.append(name)
                    os.replace(self.directory / name, self._temporary(name, "old"))
            _sync_directory(self.directory)
            for name in sorted(self.digests, key=lambda n: (n == CONFIG, n == MANIFEST, n)):
                if name == CONFIG:
                    _sync_directory(self.directory)
                new.append(name)
                os.replace(self._temporary(name), self.directory / name)
        except BaseException:
            self._take_back(old, new)
            raise
        _sync_directory(self.directory)
        for name in old:
            self._temporary(name, "old").unlink(missing_ok=True)

    def _take_back(self, old: list[str], new: list[str]) -> None:
        """Undo a commit that failed. The last name of each list may or may not have been reached."""
        with contextlib.suppress(OSError):  # what failed first is what the caller has to hear of
            for name in new:
                if not self._temporary(name).exists():
                    (self.directory / name).unlink(missing_ok=True)
            for name in reversed(old):
                if (aside := self._temporary(name, "old")).exists():
                    os.replace(aside, self.directory / name)


# Files of saves that were killed. Two processes that save to one directory at once are at fault; across machines that
# share it, the one that began first fails.
_TEMPORARY = re.compile(r"\..+\.(\d+)\.(?:tmp|old)")


def _runs(process: int) -> bool:
    """Whether another process of this number lives here."""
    if process == os.getpid() or os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened to be flushed
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def shards(tensors: Mapping[str, Pending], max_bytes: int) -> dict[str, dict[str, Pending]]:
    """File names to their tensors, in the order given; a file has at most `max_bytes`, unless one tensor is larger."""
    parts: list[dict[str, Pending]] = [{}]
    size = 0
    for name, pending in tensors.items():
        if parts[-1] and size + pending.info.nbytes > max_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = pending
        size += pending.info.nbytes
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


def safetensors_bytes(
    tensors: Mapping[str, Pending], checks: dict[str, int] | None = None, metadata: Mapping[str, str] = METADATA
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time; `checks` gets the CRC-32 of each.

    Tensors with larger elements come first, then by name, which leaves each one aligned (the format has no padding).
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].info.dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        info = tensors[name].info
        start, end = end, end + info.nbytes
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        info, tensor = tensors[name].info, tensors[name].make()
        assert TensorInfo(tensor.dtype, tuple(tensor.shape)) == info, (name, tensor.dtype, tensor.shape, info)
        data = raw_bytes(tensor.detach().cpu())
        if checks is not None:
            checks[name] = zlib.crc32(data)
        yield data


def raw_bytes(t: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in memory of the tensor's where that is contiguous."""
    if not t.numel():
        return memoryview(b"")
    data: memoryview = t.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def json_bytes(data: Any, sort_keys: bool = True) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=sort_keys) + "\n").encode()


# Reading --------------------------------------------------------------------------------------------------------------


def checked_directory(directory: str | Path) -> Path:
    """The directory, if it is one; a pickle is refused by its name, unopened.

    Raises:
        CheckpointError: `directory` is a file, or does not exist.
    """
    path = Path(directory)
    if path.suffix in PICKLED and not path.is_dir():
        raise CheckpointError(path, [_way_out(path.name)])
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(path, [f"{what}; a checkpoint is a directory with {CONFIG} and safetensors files"])
    return path


def _way_out(name: str) -> str:
    return (
        f"{name} is a pickle, which can run any code when it is opened, so lowbit never opens one; ask its publisher "
        "for safetensors, or convert it yourself where you trust it: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(path.parent, [f"{path.name} is missing: the checkpoint is not complete"]) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path.parent, [f"{path.name} is not JSON: {error}"]) from None
    if not isinstance(data, dict):
        raise CheckpointError(path.parent, [f"{path.name} must hold a JSON object, found {type(data).__name__}"])
    return data


def sha256(path: Path) -> Digest:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _sha256_of(file)
    return Digest(digest.hexdigest(), path.stat().st_size)


def _sha256_of(file: Any) -> Any:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest


def is_ours(path: Path) -> bool:
    """Whether lowbit wrote a safetensors file or an index, by what the file says of itself."""
    try:
        if path.name == INDEX:
            return MARK in read_json(path).get("metadata", {})
        with safe_open(path, framework="pt") as file:
            return MARK in (file.metadata() or {})
    except (CheckpointError, SafetensorError, OSError, ValueError, TypeError):
        return False


def is_plain_name(name: object) -> bool:
    """Whether `name` is a file directly in the directory: nothing a checkpoint lists may lead elsewhere. Names that no
    file system holds are none."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        return False
    return len(name.encode(errors="surrogatepass")) <= 255


class Files:
    """The tensors of a directory's safetensors files: what is there, and each one on demand.

    Attributes:
        info: dtype and shape by tensor name.
        file: file name by tensor name.
        ours: whether any file was written by lowbit.
        description: what a file's metadata says of the quantized weights, where lowbit described them but did not write
            the files itself.
        problems: files and tensors that cannot be read; the rest can.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.info: dict[str, TensorInfo] = {}
        self.file: dict[str, str] = {}
        self.ours = False
        self.description: str | None = None
        self.problems: list[str] = []
        self._open: dict[str, Any] = {}
        index = self._index()
        for name in sorted(set(index.values())) if index is not None else [WEIGHTS]:
            self._read_header(name)
        if index is not None:
            for tensor in sorted(set(index) - set(self.info)):
                self.problems.append(f"{index[tensor]}: tensor {tensor} is missing, {INDEX} promises it there")
            for tensor, name in self.file.items():
                if index.get(tensor) != name:
                    self.problems.append(f"{name}: tensor {tensor} is there, but {INDEX} says {index.get(tensor)}")

    def _index(self) -> dict[str, str] | None:
        if not (self.directory / INDEX).exists():
            return None
        try:
            index = read_json(self.directory / INDEX).get("weight_map")
        except CheckpointError as error:
            self.problems.extend(error.problems)
            return {}
        if not isinstance(index, dict) or not all(is_plain_name(f) for f in index.values()):
            self.problems.append(f"{INDEX}: weight_map must map tensors to files in the same directory")
            return {}
        return index

    def _read_header(self, name: str) -> None:
        path = self.directory / name
        if not path.is_file():
            pickles = sorted(p.name for p in self.directory.iterdir() if p.suffix in PICKLED)
            self.problems.append(f"{name} is missing" + (f"; {_way_out(pickles[0])}" if pickles else ""))
            return
        if path.suffix != ".safetensors":
            self.problems.append(f"{name} is not a safetensors file: only *.safetensors is read")
            return
        try:
            file = safe_open(path, framework="pt")
            slices = {t: file.get_slice(t) for t in file.keys()}  # noqa: SIM118 (not a dict)
            header = {t: (s.get_dtype(), tuple(s.get_shape())) for t, s in slices.items()}
            metadata = file.metadata() or {}
            self.ours |= MARK in metadata
            self.description = metadata.get(DESCRIPTION, self.description)
        except (SafetensorError, OSError, ValueError) as error:
            self.problems.append(f"{name} is damaged: {error}")
            return
        self._open[name] = file
        for tensor, (dtype, shape) in header.items():
            if dtype not in DTYPES:
                self.problems.append(f"{name}: {tensor} has dtype {dtype}; known are {', '.join(DTYPES)}")
            elif tensor in self.file:
                self.problems.append(f"{tensor} is in both {self.file[tensor]} and {name}")
            else:
                self.info[tensor] = TensorInfo(DTYPES[dtype], shape)
                self.file[tensor] = name

    def get(self, name: str, device: torch.device | str | None = None) -> Tensor:
        """One tensor in memory of its own (the package maps the file, which may change later)."""
        try:
            tensor = self._open[self.file[name]].get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(self.directory, [f"{self.file[name]}: cannot read {name}: {error}"]) from None
        if device is not None and torch.device(device).type != "cpu":
            return tensor.to(device)  # type: ignore[no-any-return]
        return tensor.clone()  # type: ignore[no-any-return]

    def crc32(self, name: str) -> int | None:
        """The CRC-32 of one tensor's bytes; None if it cannot be read."""
        try:
            return zlib.crc32(raw_bytes(self._open[self.file[name]].get_tensor(name)))
        except (SafetensorError, OSError, ValueError, RuntimeError):
            return None
