"""CUDA C++ kernels compile for every format and architecture they claim, without a GPU."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import each_format

import lowbit
from lowbit import QuantizedTensor
from lowbit.formats import Format, parse_format, registered
from lowbit.formats.activation import parse_activation
from lowbit.kernels.cuda import act_quant, decode, dequant, loader, scaled_mm, small_m, wgmma
from lowbit.kernels.cuda.tiles import Tiling
from lowbit.kernels.cuda.wgmma import Config
from lowbit.kernels.problem import Problem
from lowbit.kernels.select import compile_ahead, select

pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed: pip install cuda-bindings nvidia-cuda-nvrtc")
HOPPER = (9, 0)
# One instance for each kind of tile: two blocks per multiprocessor, two rows of tiles per warpgroup, most tokens, three
# warpgroups.
TILES = [Config(32, blocks=2), Config(64, split=4), Config(128, 2), Config(256), Config(128, warpgroups=3, split=4)]


def tiles(fmt: Format) -> list[Config]:
    """Those that may be chosen: where decoding in their own order costs little, activations of many tokens have it."""
    cost = decode.cost(fmt, own_order=True)
    if cost is None:
        return TILES
    own = [replace(c, own_order=True) for c in TILES]
    return [*TILES[:2], *own] if cost < 1.2 else [*TILES, own[0], own[3]]


def small_m_code(fmt: Format, arch: tuple[int, int], **changes: int) -> bytes:
    defines = decode.constants(fmt)
    assert not isinstance(defines, str), defines
    few_registers = len(fmt.element.code_planes) == 1 and not decode.has_table(fmt)
    more = {"TOKEN_TILES": 1, "CLUSTER": 1, "WHOLE": 1, "BUFFERS": 2, "RESIDENT": 3 if few_registers else 2, "GATED": 0}
    more |= changes
    source = loader.read_source("small_m.cu")
    return loader.compile_source(source, "small_m", tuple(sorted((dict(defines) | more).items())), arch)


def wgmma_code(fmt: Format, config: Config, dtype: torch.dtype = torch.bfloat16, n: int = 4096) -> bytes:
    return wgmma.source(fmt, config, n, dtype).machine_code(HOPPER)


def dequant_code(fmt: Format, arch: tuple[int, int]) -> bytes:
    defines = dequant.constants(fmt)
    assert not isinstance(defines, str), defines
    return loader.compile_source(loader.read_source("dequant.cu"), "dequant", defines, arch)


def instructions(code: bytes, kernel: str) -> list[str]:
    """The machine code of a kernel, disassembled."""
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="Triton brings the disassembler")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        tool = Path(next(iter(nvidia.__path__))) / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    (function,) = (part for part in text.split("Function : ")[1:] if part.startswith(kernel))
    return re.findall(r"/\*[0-9a-f]{4,5}\*/ +(.*?);", function)


def assert_in_registers(code: list[str], inside: str) -> None:
    """Nothing is spilled to local memory where the code runs most, from the first `inside` to the last."""
    places = [i for i, line in enumerate(code) if inside in line]
    spilled = [line for line in code[places[0] : places[-1]] if "LDL" in line or "STL" in line]
    assert not spilled


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path_factory.getbasetemp() / "cuda-cache"))


@each_format
def test_few_tokens(fmt: Format) -> None:
    code = instructions(small_m_code(fmt, HOPPER), "small_m")
    assert_in_registers(code, "HMMA")
    # Weights come 16 bytes at a time, past the first cache.
    assert any("LDGSTS.E.BYPASS" in line and ".128" in line for line in code)


@pytest.mark.parametrize("spec", ["int4:g128", "int8:row", "int3:g64", "nf4:g64", "nvfp4", "int4:g64:asym"])
@pytest.mark.parametrize(
    "changes", [{"TOKEN_TILES": 2, "COPIES": 8}, {"CLUSTER": 4}, {"WHOLE": 0}, {"FP16": 1}, {"GATED": 1}], ids=str
)
def test_other_instances_for_few_tokens(spec: str, changes: dict[str, int]) -> None:
    assert_in_registers(instructions(small_m_code(parse_format(spec), HOPPER, **changes), "small_m"), "HMMA")


@each_format
def test_matrix_units(fmt: Format) -> None:
    for config in tiles(fmt):
        if isinstance(wgmma.constants(fmt, config), str):
            continue
        code = instructions(wgmma_code(fmt, config), "wgmma_kernel")
        products = [line for line in code if "HGMMA" in line]
        assert all(f"64x{config.columns}x16.F32.BF16" in line for line in products)
        # The compiler can give up overlapping products with decoding, and says so nowhere: it waits for each of them.
        waits = [line for line in code if "WARPGROUP.DEPBAR" in line]
        assert sum("0x1" in line for line in waits) == len(products) // (2 * config.row_tiles)
        assert sum("0x0" in line for line in waits) <= 2
        assert any("UTMALDG.2D" in line if config.own_order else "UBLKCP" in line for line in code)
        assert_in_registers(code, "HGMMA")


@pytest.mark.parametrize("spec", ["int4:g128", "int4:g32", "int8:row", "nf4:g64", "mxfp4"])
def test_matrix_units_in_fp16(spec: str) -> None:
    for config in (Config(64), Config(256), Config(128, split=4, own_order=True)):
        if isinstance(wgmma.constants(parse_format(spec), config), str):
            continue
        code = instructions(wgmma_code(parse_format(spec), config, torch.float16), "wgmma_kernel")
        assert all(".F32" in line and "BF16" not in line for line in code if "HGMMA" in line)
        assert_in_registers(code, "HGMMA")


CODES = [
    ("int8:row", "int8:row", (8, 64, 256)), ("float8_e4m3:row", "float8_e4m3:row", (8, 64, 128)),
    ("float8_e5m2:row", "float8_e5m2:row", (64,)), ("int4:g128", "float8_e4m3:row", (16, 128)),
    ("int4:g128", "int8:row", (16, 128)), ("int4:g32:asym", "float8_e4m3:row", (64,)),
    ("int4:g64:asym", "int8:row", (64,)), ("int4:row", "int8:row", (64,)), ("int4:g256", "float8_e4m3:g128", (64,)),
    ("float8_e4m3:b128x128", "float8_e4m3:g128", (16, 128)), ("int8:g128", "int8:row", (64,)),
    ("int8:row", "int8:g128", (64,)),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "act", "sizes"), CODES)
@pytest.mark.parametrize(
    "tile", [Tiling(8), Tiling(8, cut=True, blocks=2, warpgroups=1), Tiling(8, 2, turned=True)], ids=str
)
def test_codes_times_codes(spec: str, act: str, sizes: tuple[int, ...], tile: Tiling) -> None:
    fmt, act_fmt = parse_format(spec), parse_format(act)
    product = "IGMMA" if act.startswith("int8") else "QGMMA"
    for tokens in sizes:
        c = replace(tile, columns=tokens, split=4 if tokens == 64 and tile == Tiling(8) else 1)
        if isinstance(scaled_mm.constants(fmt, act_fmt, c), str):
            continue
        code = instructions(scaled_mm.source(fmt, act_fmt, c, 4096, torch.bfloat16).machine_code(HOPPER), "scaled_mm")
        products = [line for line in code if product in line]
        assert len(products) >= 4
        assert all(f"64x{tokens}x32" in line for line in products)
        assert sum("UTMALDG.2D" in line for line in code) >= 2
        assert_in_registers(code, product)


ACTIVATIONS = ("float8_e4m3:row", "float8_e5m2:row", "int8:row", "int8:row:asym", "int4:row", "float8_e4m3:g128",
               "int8:g32", "int6:g64:fp16", "float8_e4m3:tensor@static", "int8:tensor@static")  # fmt: skip


def assert_holds_what_it_loads(spec: str, arch: tuple[int, int], operand: torch.dtype, m: int, k: int) -> None:
    """What a thread holds comes in as many loads of 16 bytes, and stays in registers."""
    act = parse_activation(spec)
    assert act is not None
    how = act, act.static, operand, m, k, torch.float16 if k == 1000 else torch.bfloat16
    assert act_quant.why_not(*how, arch) is None
    source, c = act_quant._instance(*how, 132)
    code = instructions(source.machine_code(arch), "act_quant")
    assert sum("LDG.E.128" in line for line in code) == c.chunks
    assert not [line for line in code if "LDL" in line or "STL" in line]
    width = ".128" if operand == torch.bfloat16 else ".64"
    assert any("STG.E" in line and width in line for line in code)


@pytest.mark.parametrize("spec", ACTIVATIONS)
def test_activations(spec: str) -> None:
    act = parse_activation(spec)
    assert act is not None
    assert_holds_what_it_loads(spec, HOPPER, torch.bfloat16, 1, 4096)
    if act.format.element.bits == 8 and not act.format.has("zero_point"):
        for m, k in ((4096, 14336), (1, 65536), (300, 1000)):
            assert_holds_what_it_loads(spec, HOPPER, act.format.planes[0].dtype, m, k)


@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (10, 0), (12, 0)], ids=str)
def test_activations_on_other_architectures(arch: tuple[int, int]) -> None:
    assert_holds_what_it_loads("int8:row", arch, torch.int8, 4096, 14336)
    assert_holds_what_it_loads("int8:row:asym", arch, torch.bfloat16, 1, 4096)
    if arch >= (8, 9):
        assert_holds_what_it_loads("float8_e4m3:row", arch, torch.bfloat16, 1, 4096)
        assert_holds_what_it_loads("float8_e4m3:g128", arch, torch.float8_e4m3fn, 4096, 14336)


def test_every_number_of_an_activation_is_converted_once() -> None:
    for m in (1, 17, 33, 34, 128, 5000):
        for k in (8, 128, 264, 1000, 4096, 14336, 28672, 33000, 65536):
            c = act_quant.config_for(None, m, k, 132)
            assert c.threads % 32 == 0
            assert c.threads <= act_quant.MOST_THREADS
            assert (c.threads - 32) * c.chunks < k // 8 <= c.threads * c.chunks
            assert c.blocks == m * c.parts
            assert c.chunks % c.parts == 0
            for group in (8, 32, 128, 256):
                c = act_quant.config_for(group, m, k, 132)
                pieces = m * -(-k // group) * group // 8
                assert 0 <= c.blocks * c.chunks * c.threads - pieces < c.chunks * c.threads
                # Lanes of a group find a scale each.
                assert c.chunks <= group // 8 or group == 8
    assert act_quant.config_for(None, 1, 4096, 132).parts == 4
    assert act_quant.config_for(None, 128, 4096, 132).parts == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "written for bf16 and fp16"),
        ({"arch": (8, 6)}, "compute capability 8.9"),
        ({"arch": None}, "needs an NVIDIA GPU"),
        ({"spec": "int8:row", "operand": torch.int8, "arch": (7, 5)}, "compute capability 8.0"),
        ({"k": 1001}, "no multiple of the 8 numbers"),
        ({"k": 65544}, "too long for registers"),
        ({"m": 1 << 22}, "counted in 32 bits"),
        ({"operand": torch.float32}, "has no codes in torch.float32"),
        ({"spec": "int8:row:asym", "operand": torch.uint8}, "has no codes in torch.uint8"),
        ({"spec": "int4:row", "operand": torch.uint8}, "has no codes in torch.uint8"),
        ({"spec": "float8_e4m3:tensor"}, "found by other kernels"),
        ({"spec": "float8_e4m3:b128x128"}, "found by other kernels"),
        ({"spec": "float8_e4m3:g48"}, "groups of 48"),
        ({"spec": "int8:g32:asym", "operand": torch.bfloat16}, "groups of 32 with zero points"),
        ({"spec": "int1:g128", "operand": torch.bfloat16}, "one bit"),
        ({"spec": "mxfp8_e4m3"}, "in another way"),
        ({"spec": "nvfp4@static", "given": True, "operand": torch.bfloat16}, "in another way"),
    ],
)
def test_conditions_of_activations(changes: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "missing", lambda: None)
    base = {"spec": "float8_e4m3:row", "given": False, "operand": torch.float8_e4m3fn, "m": 4096, "k": 4096}
    base |= {"dtype": torch.bfloat16, "arch": (9, 0)}

    def why_not(spec: str, **others: object) -> str | None:
        act = parse_activation(spec)
        assert act is not None
        return act_quant.why_not(act, **others)  # type: ignore[arg-type]

    assert why_not(**base) is None  # type: ignore[arg-type]
    assert why_not(**base | {"spec": "float8_e4m3:tensor", "given": True}) is None  # type: ignore[arg-type]
    assert reason in (why_not(**base | changes) or "")  # type: ignore[arg-type]


def test_blocks_finish_whole_runs_of_tokens() -> None:
    """Outputs are written for 8, 16 or 32 tokens at a time, and nothing is left over."""
    for spec, act, _ in CODES:
        for m in (1, 16, 40, 100, 300):
            for c in scaled_mm.candidates(parse_format(spec), parse_format(act), m, 14336):
                finished = c.columns // c.split
                assert c.columns % c.split == 0
                assert finished in (8, 16) or finished % 32 == 0, c


def test_every_number_of_tokens_has_an_instance_for_codes() -> None:
    for spec, act, _ in CODES:
        fmt, act_fmt = parse_format(spec), parse_format(act)
        for m in (1, 9, 17, 33, 65, 129, 5000):
            for n, k in ((5, 32), (4096, 4096), (28672, 4096), (4096, 14336)):
                c = scaled_mm.config_for(fmt, act_fmt, m, n, k, 132)
                used = scaled_mm.stages(fmt, act_fmt, c) * scaled_mm.stage_bytes(fmt, act_fmt, c)
                assert (used + c.output_bytes + 1024) * c.blocks <= 227 << 10
                assert c.split * scaled_mm.DEPTH <= max(k, scaled_mm.DEPTH)
                d = dict(scaled_mm.constants(fmt, act_fmt, c))
                beside = [d["PRODUCER_REGS"], *([d["WIDENER_REGS"]] if spec.startswith("int4") else [])]
                groups = c.warpgroups + len(beside)
                at_launch = 65536 // c.blocks // (128 * groups) // 8 * 8
                assert sum(beside) + c.warpgroups * d["CONSUMER_REGS"] <= at_launch * groups
                assert max(beside) <= at_launch  # they only give
    int8 = parse_format("int8:row")
    assert scaled_mm.config_for(int8, int8, 100, 4096, 14336, 132).split > 1  # few tiles


@each_format
def test_dequantization(fmt: Format) -> None:
    code = instructions(dequant_code(fmt, HOPPER), "dequant")
    assert any("STG.E.128" in line for line in code)


@pytest.mark.parametrize("spec", ["int4:g128", "int8:row", "mxfp4", "nf4:g64"])
@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (10, 0), (12, 0)], ids=str)
def test_other_architectures(spec: str, arch: tuple[int, int]) -> None:
    fmt = parse_format(spec)
    assert small_m_code(fmt, arch, TOKEN_TILES=2, COPIES=8)[:4] == b"\x7fELF"
    assert dequant_code(fmt, arch)[:4] == b"\x7fELF"


@each_format
def test_a_block_never_asks_for_more_than_there_is(fmt: Format) -> None:
    for config in (*tiles(fmt), Config(16, 2, cut=True), Config(16, warpgroups=4)):
        defines = wgmma.constants(fmt, config)
        if isinstance(defines, str):
            continue
        d = dict(defines)
        at_launch = 65536 // config.blocks // config.threads() // 8 * 8
        # Registers that warpgroups give to each other: more than there are would be waited for without end.
        used = d["PRODUCER_REGS"] + config.warpgroups * d["CONSUMER_REGS"]
        assert used <= at_launch * (1 + config.warpgroups)
        assert wgmma.stages(fmt, config).shared * config.blocks <= 227 << 10


@pytest.mark.parametrize("spec", ["int4:g128", "int8:row", "int1:g128", "nf4:g64"])
def test_blocks_share_k_only_where_that_pays(spec: str) -> None:
    fmt = parse_format(spec)
    for m, n, k in ((1, 28672, 4096), (1, 4096, 4096), (8, 4096, 14336), (16, 6144, 4096)):
        cluster = small_m.cluster_for(fmt, m, n, k, 132, HOPPER)
        assert small_m.shared_bytes(fmt, m, k, cluster) <= small_m.room(HOPPER)
        assert small_m.cluster_for(fmt, m, n, k, 108, (8, 0)) == 1
    assert small_m.cluster_for(fmt, 1, 28672, 4096, 132, HOPPER) == 1
    assert small_m.cluster_for(fmt, 8, 4096, 14336, 132, HOPPER) > 1


def test_tiles_are_cut_where_they_do_not_fill_the_blocks() -> None:
    fmt = parse_format("int4:g128")
    assert wgmma.config_for(fmt, 64, 4096, 4096, 132).split == 4  # 32 tiles for 132 multiprocessors
    assert wgmma.config_for(fmt, 256, 28672, 4096, 132).cut  # 224 tiles
    assert not wgmma.config_for(fmt, 4096, 132 * 128, 4096, 132).cut
    assert wgmma.config_for(fmt, 20, 4096, 4096, 132).tokens == 32
    assert wgmma.config_for(fmt, 4096, 28672, 4096, 132).tokens == 256


def test_clusters_are_whole_and_for_many_tokens() -> None:
    fmt = parse_format("int4:g128")
    assert Tiling(256, cluster=2).tiles(512, 388) == 2 * 4  # two pairs of blocks cover 388 rows, the last has none
    assert Tiling(256, cluster=2).resident(133) == 132
    assert wgmma.config_for(fmt, 2048, 28672, 4096, 132).cluster == 2
    assert all(c.cluster == 1 for c in wgmma.candidates(fmt, 256, 4096))


def test_the_copy_engine_writes_what_it_can() -> None:
    tilings = Tiling(256), Tiling(16), Tiling(160), Tiling(128, turned=True)
    assert [c.output_box(392) for c in tilings] == [64, 16, 32, 64]
    assert not any(c.output_box(388) for c in tilings)  # rows of y begin at multiples of 8 bytes
    assert Tiling(256, split=2).output_box(392) == 0
    assert Tiling(160, turned=True).output_box(392) == 0  # no whole runs of 64


@pytest.mark.parametrize("own_order", [False, True])
def test_activations_go_to_all_blocks_of_a_cluster(own_order: bool) -> None:
    code = instructions(
        wgmma_code(parse_format("int4:g128"), Config(256, cluster=2, own_order=own_order)), "wgmma_kernel"
    )
    assert any(("UTMALDG.2D.MULTICAST" if own_order else "UBLKCP.S.G.MULTICAST") in line for line in code)
    assert any("UTMASTG.2D" in line for line in code)
    assert_in_registers(code, "HGMMA")


@each_format
def test_the_smallest_layer_has_an_instance_and_needs_no_copy(fmt: Format) -> None:
    """Rows of one chunk: those of the narrower planes are 4 or 8 bytes apart."""
    k = decode.chunk(fmt)
    w = QuantizedTensor.from_float(torch.randn(5, k), fmt)
    assert decode._of_weight(fmt.spec, decode._layout(list(w.planes.values()))) is not None
    for m in (1, 16, 100, 1000):
        assert wgmma.config_for(fmt, m, 5, k, 132).split == 1


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
    code = small_m_code(fmt, (9, 0))
    (file,) = folder.iterdir()
    assert file.read_bytes() == code + hashlib.sha256(code).digest()
    other = b"other code"
    file.write_bytes(other + hashlib.sha256(other).digest())
    assert small_m_code(fmt, (9, 0)) == other
    assert small_m_code(fmt, (8, 0)) != other


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
        return loader.load(loader.Source("small_m.cu", (("BITS", 4),)), "small_m", 0)

    with ThreadPoolExecutor(16) as pool:
        kernels = list(pool.map(ask, range(16)))
    assert len(made) == 1
    assert len(set(map(id, kernels))) == 1


def test_what_a_warmup_needs_is_compiled_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every instance of the kernels that will run, each once, so that their runs find them in the cache."""
    problems = [
        Problem(m, 256, 512, "int4:g128", "", torch.bfloat16, "cuda", HOPPER) for m in (1, 2, 8, 16, 64, 100, 128)
    ]
    monkeypatch.setattr("lowbit.kernels.select.multiprocessors", lambda _: 132)
    compile_ahead((torch.device("cuda"), p) for p in problems)
    # For 1 to 8 tokens there is one instance, and one for each other size of a tile.
    assert len(list(folder.iterdir())) == 4
    monkeypatch.setattr(loader, "_compile", lambda *_: pytest.fail("compiled again"))
    for p in problems:
        sources = select(p).kernel.sources
        assert sources is not None
        assert all(source.machine_code(HOPPER)[:4] == b"\x7fELF" for source in sources(p, 132))


@pytest.mark.parametrize(
    ("act", "operand"),
    [("float8_e4m3:row", "codes"), ("float8_e4m3:tensor", "codes"), ("float8_e4m3:g128", "codes"),
     ("int8:row", "levels"), ("int8:tensor@static", "levels")],
)  # fmt: skip
def test_a_warmup_compiles_what_quantizes_activations(folder: Path, act: str, operand: str) -> None:
    weight = act.partition("@")[0].replace("g128", "b128x128")
    for m in (1, 8, 1000):
        problem = Problem(m, 256, 512, weight, act, torch.bfloat16, "cuda", HOPPER)
        found = act_quant.sources(problem, operand, 132)
        assert [source.file for source in found] == ["act_quant.cu"]
        assert found == act_quant.sources(replace(problem, n=64), operand, 132)
    assert not act_quant.sources(problem, "", 132)
    assert not act_quant.sources(replace(problem, act=""), operand, 132)
    assert not act_quant.sources(replace(problem, dtype=torch.float32), operand, 132)


def test_a_warmup_of_quantized_activations_compiles_them_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.kernels.select.multiprocessors", lambda _: 132)
    spec = "float8_e4m3:row"
    problems = [Problem(m, 256, 512, spec, spec, torch.bfloat16, "cuda", HOPPER) for m in (4, 64, 1000)]
    assert [select(p).kernel.operand for p in problems] == ["levels", "codes", "codes"]
    compile_ahead((torch.device("cuda"), p) for p in problems)
    assert len([file for file in folder.iterdir() if file.name.startswith("act_quant-")]) == 3


def test_errors_carry_the_compilers_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"broken\.cu did not compile for sm_90a(.|\n)*undefined_name"):
        loader.compile_source("int x = undefined_name;", "broken", (), (9, 0))
    assert not list((tmp_path / "cuda").iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"m": 9}, "above 8"),
        ({"m": 9, "arch": (8, 0)}, "above 8"),
        ({"m": 17, "format": "int3:g64", "arch": (8, 0)}, "above 16"),
        ({"m": 8, "k": 1 << 17}, "KiB of shared memory"),
        ({"m": 8, "k": 4096, "arch": (8, 9)}, "KiB of shared memory"),
        ({"dtype": torch.float32}, "written for bf16 and fp16"),
        ({"dtype": torch.float16, "act": "int8:row"}, "multiplied in bf16"),
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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": (8, 0)}, "needs Hopper's matrix units"),
        ({"arch": (10, 0)}, "needs Hopper's matrix units"),
        ({"dtype": torch.float32}, "written for bf16 and fp16"),
        ({"dtype": torch.float16, "act": "int8:row"}, "multiplied in bf16"),
        ({"k": 4096 + 16}, "no multiple of the 32 weights"),
        ({"act": "float8_e4m3:g128"}, "change along K"),
        ({"m": 32, "format": "int8:row"}, "below 33, where another kernel is faster"),
        ({"m": 4097, "format": "nf4:g64"}, "above 4096, where dequantizing in chunks is faster"),
    ],
)
def test_conditions_for_matrix_units(changes: dict[str, object], reason: str) -> None:
    base = {"m": 128, "n": 4096, "k": 4096, "format": "int4:g128", "act": "", "dtype": torch.bfloat16, "device": "cuda"}
    for m in (128, 100_000):
        assert wgmma.why_not(Problem(**(base | {"m": m}), arch=HOPPER)) is None  # type: ignore[arg-type]
    assert reason in (wgmma.why_not(Problem(**(base | {"arch": HOPPER} | changes))) or "")  # type: ignore[arg-type]


def test_batch_invariance_has_one_kernel() -> None:
    for m in (1, 8, 64, 4096):
        problem = Problem(m, 4096, 4096, "int4:g128", "", torch.bfloat16, "cuda", HOPPER)
        with lowbit.batch_invariant():
            choice = select(problem)
        assert choice.kernel.name == "cuda_wgmma"
        assert choice.config == str(wgmma.INVARIANT)
    assert select(Problem(1, 4096, 4096, "int4:g128", "", torch.bfloat16, "cuda", HOPPER)).kernel.name == "cuda_small_m"
    x, w = torch.ones(1, 64), lowbit.QuantizedTensor.from_float(torch.ones(64, 64), parse_format("int8:row"))
    with lowbit.batch_invariant(), pytest.raises(lowbit.UnsupportedError, match=r"batch_invariant\(\) is in force"):
        torch.nn.functional.linear(x, w)
