"""The native CPU kernel: every format decoded bit for bit, products right, and a reason where it cannot run."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import each_format, quantized, sqnr_db, weights

from lowbit import QuantizedTensor, use_kernel
from lowbit.formats import Format, parse_format
from lowbit.formats.activation import parse_activation
from lowbit.kernels.cpu import native, packed

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")


def decoded(fmt: Format, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    w = quantized(fmt, n, k)
    weight, keep = native._describe(fmt, w.planes, n, k)
    library = native._library()
    assert isinstance(library, ctypes.CDLL), library
    out, size = torch.full((n, k), float("nan")), k + 16 + 3 * w.planes["scale"].shape[1]
    scratch = torch.empty(2 * size)
    library.lowbit_dequantize(ctypes.byref(weight), 0, n, out.data_ptr(), 0, scratch.data_ptr(), size, 2)
    del keep
    return out, w.dequantize(torch.float32)


@needs_compiler
def test_compiles_here() -> None:
    assert native.missing() is None


@needs_compiler
@each_format
@pytest.mark.parametrize(("n", "k"), [(5, 1), (3, 31), (33, 64), (16, 129), (130, 257), (2, 4097)], ids=str)
def test_decodes_the_same_bits(fmt: Format, n: int, k: int) -> None:
    ours, reference = decoded(fmt, n, k)
    assert torch.equal(ours, reference)


@needs_compiler
@each_format
@pytest.mark.parametrize("m", [1, 2, 8, 9, 40])
def test_products(fmt: Format, m: int) -> None:
    w = quantized(fmt, 70, 200)
    x = torch.randn(m, 200, generator=torch.Generator().manual_seed(m))
    with use_kernel("reference"):
        expected = F.linear(x, w)
    with use_kernel("cpu_native"):
        y = F.linear(x, w)
    assert sqnr_db(expected, y) > 110


@needs_compiler
@each_format
@pytest.mark.parametrize("hardware", [True, False], ids=["bf16 units", "none"])
def test_many_bf16_tokens(fmt: Format, hardware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without bf16 instructions: the emulated product rounds the same."""
    monkeypatch.setattr(native, "_multiplies_bf16", lambda: hardware)
    w = quantized(fmt, 130, 200, torch.bfloat16)
    x = torch.randn(33, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    bias = torch.randn(130, generator=torch.Generator().manual_seed(1)).bfloat16()
    with use_kernel("reference"):
        expected = F.linear(x.double().float(), w, bias.float())
    with use_kernel("cpu_native"):
        y = F.linear(x, w, bias)
    assert y.dtype == torch.bfloat16
    assert sqnr_db(expected, y) > (50 if hardware else 54)


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


WHICH = """
import torch, lowbit
from lowbit.kernels.cpu import native
layer = torch.nn.Linear(64, 32); lowbit.quantize_(layer, "int4wo-32")
assert layer(torch.ones(1, 64)).isfinite().all()
print(native.missing(), "|", lowbit.explain(layer, tokens=(1,)).layers[0].ranges[0].kernel)
"""


def test_can_be_switched_off_and_says_so() -> None:
    assert run(WHICH, LOWBIT_NATIVE="0").strip() == "switched off by LOWBIT_NATIVE=0 | torch_blocked"


def test_a_compiler_that_fails_is_named(tmp_path: os.PathLike[str]) -> None:
    out = run(WHICH, CC="/bin/false", LOWBIT_CACHE=str(tmp_path))
    assert "/bin/false could not build native.c" in out
    assert out.strip().endswith("torch_blocked")


@needs_compiler
def test_is_compiled_once(tmp_path: os.PathLike[str]) -> None:
    for _ in range(2):
        assert run(WHICH, LOWBIT_CACHE=str(tmp_path)).strip() == "None | cpu_native"
    files = [f for _, _, names in os.walk(tmp_path) for f in names]
    assert len(files) == 1
    assert files[0].endswith(".so")


@needs_compiler
def test_a_damaged_library_is_made_again(tmp_path: Path) -> None:
    """Half a file is what a crash of the machine can leave of a finished one."""
    run(WHICH, LOWBIT_CACHE=str(tmp_path))
    [library] = tmp_path.rglob("*.so")
    half = library.read_bytes()[: library.stat().st_size // 2]
    library.write_bytes(half)
    assert run(WHICH, LOWBIT_CACHE=str(tmp_path)).strip() == "None | cpu_native"
    assert all(library.read_bytes() != half for library in tmp_path.rglob("*.so"))


SANITIZED = """
import torch, torch.nn.functional as F
import lowbit
from lowbit.formats import registered
from lowbit.kernels.cpu import native
native.FLAGS = ("-g", "-fsanitize=address,undefined", *native.FLAGS)
assert native.missing() is None, native.missing()
for fmt in registered():
    for n, k in [(5, 1), (3, 31), (7, 129), (2, 576)]:
        w = lowbit.QuantizedTensor.from_float(torch.randn(n, k), fmt)
        for m in (1, 2, 9):
            x = torch.randn(m, k)
            with lowbit.use_kernel("cpu_native"):
                F.linear(x, w)
print("clean")
"""


@needs_compiler
def test_stays_inside_its_buffers(tmp_path: os.PathLike[str]) -> None:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, sizes that end in the middle of vectors and bytes."""
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.run(["cc", f"-print-file-name={n}"], capture_output=True, text=True, check=True) for n in names]
    libraries = [f.stdout.strip() for f in found]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("the compiler has no sanitizer libraries")
    env = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "LOWBIT_CACHE": str(tmp_path)}
    assert run(SANITIZED, **env).strip() == "clean"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("act", ["int8:row", "float8_e4m3:row"])
def test_quantizes_rows_as_defined(act: str, dtype: torch.dtype) -> None:
    activation = parse_activation(act)
    assert activation is not None
    generator = torch.Generator().manual_seed(0)
    for m, k in ((1, 576), (5, 33), (130, 1000), (3, 1)):
        for size in (1.0, 1e-3, 1e3):
            x = (torch.randn(m, k, generator=generator) * size).to(dtype)
            x[m // 2] = 0
            x[0, 0] *= 100 if dtype != torch.float16 else 10
            levels, scale = activation.split(x)
            found = native.quantize_rows(x, act)
            assert found is not None
            assert torch.equal(found[0], levels.float())
            assert torch.equal(found[1], scale)
            if act == "int8:row":
                codes = native.quantize_rows(x, act, codes=True)
                assert codes is not None
                assert torch.equal(codes[0], activation.quantize(x)["qdata"])


@needs_compiler
def test_rounds_halves_and_everything_between() -> None:
    """Scales of one: what is rounded are the numbers themselves."""
    halves = torch.cat([torch.tensor([127.5]), torch.arange(-255, 256) / 2])[None]
    found = native.quantize_rows(halves, "int8:row")
    assert found is not None
    assert float(found[1]) == 1
    assert torch.equal(found[0], halves.round().clamp(-128, 127))
    every = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    every = torch.cat([torch.tensor([448.0]), every[every.abs() <= 448]])[None]
    between = torch.cat([every, every * (1 + 2**-20)], dim=1).clamp(-448, 448)
    found = native.quantize_rows(between, "float8_e4m3:row")
    assert found is not None
    assert float(found[1]) == 1
    assert torch.equal(found[0], between.to(torch.float8_e4m3fn).float())


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-38, 3e38])
def test_rows_that_are_not_ordinary_are_left_to_the_definition(value: float) -> None:
    x = torch.ones(3, 8)
    x[1] = value
    for act in ("int8:row", "float8_e4m3:row"):
        assert native.quantize_rows(x, act) is None
    assert native.quantize_rows(torch.ones(3, 8), "int8:g8") is None


@pytest.mark.skipif(not packed.multiplies_int8(), reason="this CPU has no exact products of bytes")
def test_bytes_times_bytes_are_exact() -> None:
    fmt, act = parse_format("int8:row"), parse_activation("int8:row")
    w = QuantizedTensor.from_float(torch.randn(33, 70, generator=torch.Generator().manual_seed(0)), fmt, act)
    for m in (1, 5, 40):
        x = torch.randn(m, 70, generator=torch.Generator().manual_seed(m))
        planes = act.quantize(x) if act else {}
        exact = planes["qdata"].double() @ w.planes["qdata"].double().T
        exact *= planes["scale"].double() * w.planes["scale"].double().T
        with use_kernel("aten_int_mm"):
            y = F.linear(x, w)
        torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=0)


@needs_compiler
@each_format
def test_torchs_default_dtype_changes_nothing(fmt: Format) -> None:
    """Engines load models while it is bf16: a buffer of half the size would be written past its end."""
    w, x = quantized(fmt, 70, 200), torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    with use_kernel("cpu_native"):
        expected = [F.linear(part, w) for part in (x, x[:1])]
        torch.set_default_dtype(torch.bfloat16)
        try:
            got = [F.linear(part, w) for part in (x, x[:1])]
            rows = native.quantize_rows(x, "int8:row")
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, expected))
    assert rows is not None
    assert rows[0].dtype == rows[1].dtype == torch.float32


@needs_compiler
def test_a_codebook_that_changes_is_read_again() -> None:
    fmt, n, k = parse_format("codebook4:g64"), 64, 128
    w = QuantizedTensor.from_float(weights("normal", n, k), fmt)
    x = torch.randn(1, k, generator=torch.Generator().manual_seed(0))
    with use_kernel("cpu_native"):
        first = F.linear(x, w)
        w.planes["codebook"].mul_(2)
        assert torch.equal(F.linear(x, w), 2 * first)
    with torch.inference_mode():
        unversioned = w.with_planes({name: t.clone() for name, t in w.planes.items()})
        with use_kernel("cpu_native"):
            assert torch.equal(F.linear(x, unversioned), 2 * first)
            unversioned.planes["codebook"].mul_(0.5)
            assert torch.equal(F.linear(x, unversioned), first)
