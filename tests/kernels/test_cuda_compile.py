"""CUDA C++ kernels compile for every format and architecture they claim, without a GPU."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import each_format

import lowbit
from lowbit.formats import Format, registered
from lowbit.kernels.cuda import loader, small_m
from lowbit.kernels.problem import Problem

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed: pip install cuda-bindings nvidia-cuda-nvrtc")
SOURCE = loader.read_source("small_m.cu")


def compile_for(fmt: Format, arch: tuple[int, int], token_tiles: int = 1, row_tiles: int = 1) -> bytes:
    defines = small_m.constants(fmt)
    assert not isinstance(defines, str), defines
    more = (("TOKEN_TILES", token_tiles), ("ROW_TILES", row_tiles), ("MIN_BLOCKS", 2))
    return loader.compile_source(SOURCE, "small_m", defines + more, arch)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path_factory.getbasetemp() / "cuda-cache"))


@each_format
def test_every_format_compiles_for_hopper(fmt: Format) -> None:
    assert compile_for(fmt, (9, 0))[:4] == b"\x7fELF"


@pytest.mark.parametrize("spec", ["int4:g128", "int8:row", "mxfp4", "nf4:g64"])
@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (10, 0), (12, 0)], ids=str)
def test_other_architectures(spec: str, arch: tuple[int, int]) -> None:
    fmt = next(f for f in registered() if f.spec == spec)
    assert compile_for(fmt, arch, 2, 2)[:4] == b"\x7fELF"


# The cache ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an empty cache will hold its files."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cuda"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were compiled, oldest first, in place of NVRTC; machine code is the source and a number."""
    sources: list[str] = []

    def compile_(source: str, name: str, target: str, options: list[str]) -> bytes:
        sources.append(source)
        return f"{source} {len(sources)}".encode()

    monkeypatch.setattr(loader, "_compile", compile_)
    return sources


def kernel(source: str = "a", arch: tuple[int, int] = (9, 0), **defines: int) -> bytes:
    return loader.compile_source(source, "name", tuple(defines.items()), arch)


def test_cache_holds_whole_files_and_is_used(folder: Path) -> None:
    fmt = registered()[0]
    code = compile_for(fmt, (9, 0))
    (file,) = folder.iterdir()
    assert file.read_bytes() == code + hashlib.sha256(code).digest()
    other = b"other code"
    file.write_bytes(other + hashlib.sha256(other).digest())
    assert compile_for(fmt, (9, 0)) == other
    assert compile_for(fmt, (8, 0)) != other


def test_cache_is_its_users_own(folder: Path) -> None:
    kernel("")
    assert folder.stat().st_mode & 0o777 == 0o700
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["emptied", "truncated", "lengthened", "changed", "checksum changed", "no file"])
def test_a_damaged_file_is_made_again(folder: Path, compiled: list[str], damage: str) -> None:
    assert kernel() == b"a 1"
    (file,) = folder.iterdir()
    data = file.read_bytes()
    file.unlink()
    if damage == "no file":
        file.mkdir()
    else:
        cut = {"emptied": b"", "truncated": data[:-1], "lengthened": data + b"x", "changed": b"A" + data[1:]}
        file.write_bytes(cut.get(damage, data[:-1] + bytes([data[-1] ^ 1])))
    assert kernel() == b"a 2"
    assert kernel() == (b"a 3" if damage == "no file" else b"a 2"), "a directory stays in the way"
    assert list(folder.iterdir()) == [file], "nothing is left lying about"


@pytest.mark.parametrize("obstacle", ["a file", "a full disk", "a folder that is not ours", "no home"])
def test_without_a_cache_kernels_are_compiled(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    if obstacle == "a file":
        folder.parent.write_text("not a folder")
    elif obstacle == "a full disk":
        monkeypatch.setattr(os, "fsync", refuse)
    elif obstacle == "a folder that is not ours":
        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    else:
        monkeypatch.delenv("LOWBIT_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    assert [kernel(), kernel()] == [b"a 1", b"a 2"]
    assert not folder.is_dir() or not list(folder.iterdir())


def test_everything_that_decides_the_code_is_in_the_key(compiled: list[str], folder: Path) -> None:
    from cuda.bindings import nvrtc

    def kinds() -> list[bytes]:
        return [kernel(), kernel("b"), kernel(A=1), kernel(A=2), kernel(B=1), kernel(arch=(8, 0)), kernel(arch=(12, 0))]

    first = kinds()
    assert len(set(first)) == len(first)
    assert kinds() == first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "nvrtcVersion", lambda: (0, 99, 0))
        assert not set(kinds()) & set(first)
    assert kinds() == first


def test_threads_that_ask_for_one_kernel_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Kernel:
        def __init__(self, *arguments: object) -> None:
            time.sleep(0.05)
            made.append(arguments)

    monkeypatch.setattr(loader, "_load", functools.cache(Kernel))
    together = threading.Barrier(16)

    def ask(_: int) -> object:
        together.wait()
        return loader.load("small_m.cu", "small_m", (("BITS", 4),), 0)

    with ThreadPoolExecutor(16) as pool:
        kernels = list(pool.map(ask, range(16)))
    assert len(made) == 1
    assert len(set(map(id, kernels))) == 1


def test_writers_that_are_killed_leave_whole_files() -> None:
    """See cuda_cache_writers.py."""
    program = Path(__file__).with_name("cuda_cache_writers.py")
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"LOWBIT_CACHE": cache, "PYTHONPATH": str(Path(lowbit.__file__).parents[1])}
        done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, killed = map(int, done.stdout.split())
    assert kept > 100
    assert killed > 16


def test_errors_carry_the_compilers_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"broken\.cu did not compile for sm_90a(.|\n)*undefined_name"):
        loader.compile_source("int x = undefined_name;", "broken", (), (9, 0))
    assert not list((tmp_path / "cuda").iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"m": 9}, "above 8"),
        ({"m": 17, "format": "int3:g64"}, "above 16"),
        ({"dtype": torch.float16}, "written for bf16"),
        ({"arch": (7, 5)}, "needs compute capability 8.0"),
        ({"k": 100}, "no multiple of the 32 weights"),
        ({"format": "int4:g24"}, "groups of 24"),
        ({"act": "float8_e4m3:g128"}, "change along K"),
    ],
)
def test_conditions(changes: dict[str, object], reason: str) -> None:
    base = {"m": 1, "n": 64, "k": 256, "format": "int4:g128", "act": "", "dtype": torch.bfloat16, "device": "cuda"}
    assert small_m.why_not(Problem(**base, arch=(9, 0))) is None  # type: ignore[arg-type]
    assert reason in (small_m.why_not(Problem(**(base | {"arch": (9, 0)} | changes))) or "")  # type: ignore[arg-type]
