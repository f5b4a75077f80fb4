"""The choice of a kernel is data: the first that accepts, with every reason before it, never the reference."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from cases import FORMATS, each_format

from lowbit.formats import Format, parse_format
from lowbit.kernels import select as module
from lowbit.kernels.problem import Problem, UnsupportedError
from lowbit.kernels.select import KERNELS, Kernel, select, use_kernel

ARCHS = (None, (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0))
ACTS = ("", "float8_e4m3:row", "float8_e4m3:g128", "int8:row", "int8:tensor@static", "mxfp8_e4m3", "nvfp4")
SIZES = (1, 2, 16, 17, 128, 129, 4096, 16384)


def problem(spec: str = "int4:g128", m: int = 1, n: int = 64, k: int = 128, act: str = "", **rest: object) -> Problem:
    fields = {"dtype": torch.bfloat16, "device": "cpu", "arch": None} | rest
    return Problem(m, n, k, spec, act, **fields)  # type: ignore[arg-type]


@each_format
def test_every_cpu_problem_has_a_kernel(fmt: Format) -> None:
    for act in ACTS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for m, n, k in ((1, 1, 1), (7, 33, 65), (33, 64, 128), (1025, 4097, 100)):
                choice = select(problem(fmt.spec, m, n, k, act, dtype=dtype))
                assert choice.kernel.device in (None, "cpu")
                assert not choice.kernel.by_name_only
                before = [k.name for k in KERNELS[: KERNELS.index(choice.kernel)]]
                assert [name for name, _ in choice.rejected] == before
                assert all(reason for _, reason in choice.rejected)


@each_format
def test_the_reference_is_never_chosen_on_a_gpu(fmt: Format) -> None:
    for act in ACTS:
        for arch in ARCHS[1:]:
            for m in SIZES:
                choice = select(problem(fmt.spec, m, 4096, 4096, act, device="cuda", arch=arch))
                assert choice.kernel.name != "reference"
                assert choice.kernel.device in (None, "cuda")


def test_the_choice_depends_on_nothing_but_the_problem() -> None:
    for fmt in FORMATS:
        a, b = (select(problem(fmt.spec, 7, 64, 96)) for _ in range(2))
        assert a == b


def test_names_are_unique_and_functions_exist() -> None:
    names = [k.name for k in KERNELS]
    assert len(set(names)) == len(names)
    for kernel in KERNELS:
        if kernel.device in (None, "cpu"):
            assert callable(kernel.function)


def test_the_last_resort_without_a_name_runs_everywhere() -> None:
    *_, portable, reference = KERNELS
    assert reference.by_name_only
    assert portable.device is None
    assert portable.why_not(problem(device="mps")) is None


def test_a_forced_kernel_runs_or_says_why_not() -> None:
    with use_kernel("reference"):
        assert select(problem()).kernel.name == "reference"
        with use_kernel("torch_blocked"):
            assert select(problem()).kernel.name == "torch_blocked"
        assert select(problem()).kernel.name == "reference"
    assert select(problem()).kernel.name != "reference"
    with use_kernel("triton_weight_only"), pytest.raises(UnsupportedError, match="runs on cuda, not cpu"):
        select(problem())
    with pytest.raises(ValueError, match="torch_blocked"), use_kernel("fast"):
        pass


def test_forcing_is_local_to_a_thread() -> None:
    seen = []
    with use_kernel("reference"):
        thread = threading.Thread(target=lambda: seen.append(select(problem()).kernel.name))
        thread.start()
        thread.join()
    assert seen != ["reference"]


def test_when_nothing_applies_every_reason_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(reason: str) -> Callable[[Problem], str]:
        return lambda p: reason

    table = (Kernel("a", None, "x:x", never("too warm")), Kernel("b", "cuda", "x:x", never("")), *KERNELS[-1:])
    monkeypatch.setattr(module, "KERNELS", table)
    with pytest.raises(UnsupportedError) as info:
        module._select.__wrapped__(problem(), None, False)
    for line in ("a: too warm", "b: runs on cuda, not cpu", "reference: dequantizes whole weights", "use_kernel"):
        assert line in str(info.value)


@pytest.mark.parametrize(("name", "spec", "changes", "reason"), [
    ("cublas_scaled_mm", "float8_e4m3:row", {"act": ""}, "not quantized"),
    ("cublas_scaled_mm", "int8:row", {"act": "int8:row"}, "only float8_e4m3"),
    ("cublas_scaled_mm", "float8_e4m3:row", {"act": "float8_e4m3:row", "arch": (8, 0)}, "8.9"),
    ("cublas_scaled_mm", "float8_e4m3:row", {"act": "float8_e4m3:row", "k": 100}, "divisible by 16"),
    ("cublas_scaled_mm", "float8_e4m3:row", {"act": "float8_e5m2:row"}, "different elements"),
    ("cublas_scaled_mm", "float8_e4m3:b128x128", {"act": "float8_e4m3:row"}, "scales are not per row"),
    ("cuda_scaled_mm", "int8:row", {"act": "int8:row", "arch": (8, 0)}, "Hopper's matrix units"),
    ("cuda_scaled_mm", "int8:row", {"act": "int8:row", "k": 100}, "multiples of 16 bytes"),
    ("cuda_scaled_mm", "int8:row", {"act": "int8:row", "k": 1 << 17}, "can overflow"),
    ("cuda_scaled_mm", "int8:row", {"act": "int8:row", "dtype": torch.float32}, "written for bf16 and fp16"),
    ("cuda_scaled_mm", "int8:row", {"act": "int8:row:asym"}, "zero points"),
    ("cuda_scaled_mm", "float8_e4m3:row", {"act": "float8_e4m3:row", "m": 129}, "above 128, where cuBLAS"),
    ("cuda_scaled_mm", "int4:g128", {"act": "int8:g64"}, "per group of 128"),
    ("cuda_scaled_mm", "int4:g128", {"act": "float8_e5m2:row"}, "not widened"),
    ("cuda_scaled_mm", "int4:g128", {"act": "int8:row", "k": 112}, "multiples of 16 bytes"),
    ("cuda_scaled_mm", "int4:g48", {"act": "int8:row", "k": 96}, "do not line up"),
    ("cuda_scaled_mm", "mxfp4", {"act": "float8_e4m3:row"}, "not widened"),
    ("cuda_scaled_mm", "nf4:g64", {"act": "int8:row"}, "integers of 4 bits"),
    ("cuda_scaled_mm", "int8:row:asym", {"act": "int8:row"}, "the weight has zero points"),
    ("cuda_scaled_mm", "float8_e4m3:row", {"act": "int8:row"}, "different elements"),
    ("cublas_scaled_mm", "nvfp4", {"act": "nvfp4"}, "no 8-bit codes"),
    ("cublas_scaled_mm", "int8:row", {"act": "int8:row:asym"}, "zero points"),
    ("aten_int_mm", "float8_e4m3:row", {"act": "float8_e4m3:row", "device": "cpu"}, "only int8 x int8"),
    ("aten_int_mm", "int8:row", {"act": "int8:row:asym", "device": "cpu"}, "zero points"),
    ("aten_int_mm", "int8:row", {"act": "int8:row", "k": 1 << 17, "device": "cpu"}, "can overflow"),
    ("aten_int8_packed", "int8:row", {"k": 100, "device": "cpu"}, "K % 32"),
    ("aten_int8_packed", "int8:row", {"m": 33, "device": "cpu"}, "above 32"),
    ("aten_int8_packed", "int8:row", {"dtype": torch.float32, "device": "cpu"}, "bf16"),
    ("aten_int8_packed", "int8:row:asym", {"device": "cpu"}, "symmetric"),
    ("aten_int8_packed", "int8:g128", {"device": "cpu"}, "per row"),
])  # fmt: skip
def test_reasons(name: str, spec: str, changes: dict[str, object], reason: str) -> None:
    kernel = next(k for k in KERNELS if k.name == name)
    assert reason in (kernel.why_not(problem(spec, **({"device": "cuda", "arch": (9, 0)} | changes))) or "")


def test_eight_bit_matmuls_are_chosen_on_hopper() -> None:
    def chosen(spec: str, m: int, arch: tuple[int, int] = (9, 0)) -> str:
        return select(problem(spec, m, 4096, 4096, spec, device="cuda", arch=arch)).kernel.name

    assert chosen("float8_e4m3:row", 128) == chosen("float8_e5m2:row", 128) == "cuda_scaled_mm"
    assert chosen("float8_e4m3:row", 129) == chosen("float8_e4m3:row", 128, (8, 9)) == "cublas_scaled_mm"
    assert chosen("int8:row", 16) == chosen("int8:row", 4096) == "cuda_scaled_mm"
    assert chosen("int8:row", 16, (8, 0)) == chosen("float8_e5m2:row", 129) == "triton_scaled_mm"


@pytest.mark.parametrize(("weight", "act"), [
    ("int4:g128", "float8_e4m3:row"), ("int4:g32:asym", "int8:row"), ("float8_e4m3:b128x128", "float8_e4m3:g128"),
    ("int8:g128", "int8:row"), ("int4:g128", "float8_e4m3:tensor@static"),
])  # fmt: skip
def test_codes_whose_scales_change_along_k_use_8_bit_products(weight: str, act: str) -> None:
    for m in (16, 4096):
        choice = select(problem(weight, m, 4096, 4096, act, device="cuda", arch=(9, 0)))
        assert choice.kernel.name == "cuda_scaled_mm"


def test_parsing_is_cached() -> None:
    assert parse_format("int4:g128") is parse_format("int4:g128")
