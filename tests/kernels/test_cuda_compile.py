"""CUDA C++ kernels compile for every format and architecture they claim, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import each_format

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


def test_cache_holds_whole_files_and_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    fmt = registered()[0]
    code = compile_for(fmt, (9, 0))
    (file,) = (tmp_path / "cuda").iterdir()
    assert file.read_bytes() == code
    file.write_bytes(b"changed")
    assert compile_for(fmt, (9, 0)) == b"changed"
    assert compile_for(fmt, (8, 0)) != b"changed"


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
