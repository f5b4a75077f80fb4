"""The CUDA C++ kernels beside the matmuls compile for what they claim, and their machine code is what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_cuda_compile import HOPPER, instructions

from lowbit.kernels.cuda import all_reduce, decode_attention, hadamard
from lowbit.kernels.cuda.decode_attention import Shape

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed: pip install cuda-bindings nvidia-cuda-nvrtc")
NEWER = [(10, 0), (12, 0)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(Path(tmp_path_factory.getbasetemp()) / "cuda-cache"))


def assert_nothing_is_spilled(code: list[str]) -> None:
    assert not [line for line in code if "LDL" in line or "STL" in line]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("world", "width"), [(2, 4096), (8, 5120), (4, 16384)])
def test_sums_over_gpus(world: int, width: int, dtype: torch.dtype) -> None:
    for mode in (all_reduce.SUM, all_reduce.NORM, all_reduce.GATHER):
        code = instructions(all_reduce.source(mode, world, width, dtype).machine_code(HOPPER), "all_reduce")
        assert_nothing_is_spilled(code)
        # Data and its number go together, past all caches.
        assert any("STG.E.128.STRONG.SYS" in line for line in code)
        assert any("LDG.E.128.STRONG.SYS" in line for line in code)


def test_a_row_has_a_thread_for_every_eight_numbers() -> None:
    for width in (8, 576, 4096, 5120, 8192, 14336, 16384):
        threads, items = all_reduce.geometry(width)
        assert threads % 32 == 0
        assert threads <= 1024
        assert 8 * threads * items >= width > 8 * (threads - 32) * items
        assert all_reduce.memory_bytes(width, 2) == all_reduce.BLOCKS * 2 * 2 * 32 * threads * items


@pytest.mark.parametrize("arch", [(8, 0), *NEWER], ids=str)
def test_sums_over_other_gpus(arch: tuple[int, int]) -> None:
    source = all_reduce.source(all_reduce.NORM, 2, 4096, torch.bfloat16)
    assert source.machine_code(arch)[:4] == b"\x7fELF"


@pytest.mark.parametrize(("d", "shared", "tokens"), [(128, 4, 1), (64, 8, 1), (96, 6, 2), (32, 1, 16), (128, 4, 8)])
@pytest.mark.parametrize("norm", [False, True])
def test_attention_of_new_tokens(d: int, shared: int, tokens: int, norm: bool) -> None:
    many = Shape(8, 8 if shared * tokens <= 16 else 4, 2)
    for shape, dtype in ((many, torch.bfloat16), (Shape(1, 4, 2), torch.float16)):
        source = decode_attention.source(d, shared, tokens, shape, norm, dtype)
        code = instructions(source.machine_code(HOPPER), "decode_attention")
        assert_nothing_is_spilled(code)
        kind = "F32.BF16" if dtype == torch.bfloat16 else "F32"
        assert any(f"HMMA.16816.{kind}" in line for line in code)
        assert any("LDGSTS.E.BYPASS" in line and ".128" in line for line in code)
        assert any("LDSM.16.MT88.4" in line for line in code), "values are turned on their way out of shared memory"


@pytest.mark.parametrize("arch", NEWER, ids=str)
def test_attention_on_other_gpus(arch: tuple[int, int]) -> None:
    shape = decode_attention.shape_for(8, 4096, 4, 128, 170, arch)
    needed = decode_attention.shared_bytes(128, 4, shape.warps, shape.stages)
    assert needed <= (227 << 10 if arch[0] == 10 else 99 << 10)
    code = decode_attention.source(128, 4, 1, shape, False, torch.bfloat16).machine_code(arch)
    assert code[:4] == b"\x7fELF"


def test_blocks_of_an_attention() -> None:
    """As many as there are multiprocessors, and none without a chunk; what two need fits one."""
    expected = {(8, 256): Shape(4, 4, 2), (8, 100): Shape(2, 4, 2), (8, 512): Shape(8, 4, 2), (64, 512): Shape(2, 4, 4),
                (64, 1024): Shape(2, 8, 2), (8, 100_000): Shape(8, 8, 2), (1024, 8192): Shape(1, 4, 2)}  # fmt: skip
    for (sequences, capacity), shape in expected.items():
        assert decode_attention.shape_for(sequences, capacity, 4, 128, 132, HOPPER) == shape
    for rows in (1, 16, 32):
        for capacity in (1, 64, 300, 2048, 1 << 17):
            for sequences in (1, 8, 33, 132, 133, 5000):
                cluster, warps, stages = decode_attention.shape_for(sequences, capacity, rows, 128, 132, HOPPER)
                shared = decode_attention.shared_bytes(128, rows, warps, stages) + 3072
                assert shared * (1 if sequences * cluster <= 132 else 2) <= 227 << 10


# Every kind of size: a power of two, small and large odd factors, one to three passes.
SIZES = (4, 64, 576, 1536, 4096, 11008, 14336, 16384, 12032, 49152)


@pytest.mark.parametrize("k", SIZES)
def test_hadamard(k: int) -> None:
    for dtype, signed, inverse in ((torch.bfloat16, True, False), (torch.float32, True, True)):
        source, threads = hadamard.source(k, dtype, signed, inverse)
        code = instructions(source.machine_code(HOPPER), "hadamard")
        assert_nothing_is_spilled(code)
        assert threads <= 512
        assert len(code) < 8000


def test_passes_of_the_hadamard_transform() -> None:
    assert hadamard.radices(4) == [1]
    assert hadamard.radices(14336) == [4, 3, 3]
    assert hadamard.radices(49152) == [5, 4, 4]
    for k in SIZES:
        steps = hadamard.radices(k)
        assert sum(steps) == (k & -k).bit_length() - 2
        assert len(steps) <= 3
        assert max(steps) <= 5
        assert hadamard.shared_bytes(k) <= hadamard.HOPPERS_SHARED


@pytest.mark.parametrize("arch", [(8, 0), *NEWER], ids=str)
def test_hadamard_on_other_gpus(arch: tuple[int, int]) -> None:
    assert hadamard.source(14336, torch.bfloat16, True, False)[0].machine_code(arch)[:4] == b"\x7fELF"
