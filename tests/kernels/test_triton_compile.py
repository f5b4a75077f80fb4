"""Every Triton kernel compiles for Ampere and Hopper, for every registered format, without a GPU."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
import torch
from cases import FORMATS

pytest.importorskip("triton", reason="triton is not installed: the GPU kernels are not compiled by these tests")

from triton_compile import Launch, launches_of

from lowbit.formats import Format, parse_format
from lowbit.formats.activation import parse_activation
from lowbit.kernels.triton import (
    act_quant,
    between,
    decode_attention,
    decode_packed,
    dequant,
    gemv,
    greedy,
    hadamard,
    row_quant,
    scaled_mm,
    weight_only,
)
from lowbit.kernels.triton.launch import OPTIONS
from lowbit.tools import read_kernel

MODULES = [act_quant, dequant, row_quant, scaled_mm, weight_only]
# Shared memory that one block can have: A100, and H100.
SHARED = {80: 163 << 10, 90: 227 << 10}
ACTIVATIONS = (
    "float8_e4m3:row", "float8_e4m3:tensor", "float8_e5m2:row", "int8:row", "int8:row:asym", "int8:tensor@static",
    "float8_e4m3:g128", "int8:g32", "mxfp8_e4m3", "mxfp4:rceil", "nvfp4", "nvfp4@static",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Configurations as on the GPU: splits along K, inline assembly, float8 conversions where it has them."""
    arch = request.node.callspec.params["arch"]
    monkeypatch.setattr(weight_only, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(row_quant, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(row_quant, "uses_ptx", lambda device: True)
    monkeypatch.setattr(row_quant, "has_native_float8", lambda device: arch >= 89)
    monkeypatch.setattr(weight_only, "has_native_float8", lambda device: arch >= 89)
    monkeypatch.setattr(decode_packed, "uses_ptx", lambda device: True)


def empty_planes(fmt: Format, n: int, k: int) -> dict[str, torch.Tensor]:
    return {p.name: torch.empty(p.shape_for(n, k), dtype=p.dtype) for p in fmt.planes}


def compile_all(launches: list[Launch], arch: int) -> list[Any]:
    """Compiles each different launch; every one must fit the shared memory of a block."""
    compiled = [launch.compile(arch) for launch in {launch.key: launch for launch in launches}.values()]
    for c in compiled:
        assert c.metadata.shared <= SHARED[arch], f"{c.metadata.name} takes {c.metadata.shared} bytes of shared memory"
    return compiled


def different(fmts: tuple[Format, ...]) -> list[Format]:
    """One format for each set of compile-time constants."""
    seen: dict[Any, Format] = {}
    for fmt in fmts:
        seen.setdefault((weight_only.constants(fmt, 64)["L"], tuple(p.dtype for p in fmt.planes)), fmt)
    return list(seen.values())


FIRST = {"int4:g128", "int3:g64", "nf4:g64:dq", "mxfp4", "codebook4v2:g64", "float8_e4m3:b128x128", "int2:g32:asym"}
each = pytest.mark.parametrize(
    "fmt", [pytest.param(f, id=str(f), marks=() if f.spec in FIRST else pytest.mark.slow) for f in different(FORMATS)]
)
each_arch = pytest.mark.parametrize("arch", [80, 90])


@each_arch
@each
def test_weight_only_compiles(fmt: Format, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n = k = 4096
    launches = []
    for m in (1, 128):
        x = torch.empty(m, k, dtype=torch.bfloat16)
        launches += launches_of(
            monkeypatch, MODULES, lambda x=x: weight_only.matmul(x, empty_planes(fmt, n, k), fmt, n, None, x.dtype)
        )
    compiled = compile_all(launches, arch)
    assert any(("wgmma" if arch == 90 else "mma.sync") in c.asm["ptx"] for c in compiled), "no matrix instruction"


@each_arch
@each
def test_dequantize_compiles(fmt: Format, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 256, 4096
    out = torch.empty(n, k, dtype=torch.bfloat16)
    planes = empty_planes(fmt, n, k)
    compile_all(
        launches_of(monkeypatch, MODULES, lambda: dequant.dequantize_into(out, planes, fmt, k, (0, n), (0, k))), arch
    )


@each_arch
def test_odd_shapes_and_other_dtypes_compile(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing divisible by anything, bias, row scales and grouped activations, fp32 and fp16."""
    fmt, launches = parse_format("int5:g128"), []
    n, k = 127, 1001
    planes = empty_planes(fmt, n, k)
    for dtype in (torch.float32, torch.float16):
        x, bias = torch.empty(7, k, dtype=dtype), torch.empty(n, dtype=dtype)
        launches += launches_of(
            monkeypatch, MODULES, lambda x=x, b=bias: weight_only.matmul(x, planes, fmt, n, b, x.dtype)
        )
    x, scale = torch.empty(7, k, dtype=torch.bfloat16), torch.empty(7, 8)
    launches += launches_of(
        monkeypatch, MODULES, lambda: weight_only.matmul(x, planes, fmt, n, None, x.dtype, scale, 128)
    )
    launches += launches_of(
        monkeypatch, MODULES, lambda: weight_only.matmul(x, planes, fmt, n, None, x.dtype, scale[:, :1].contiguous())
    )
    compile_all(launches, arch)


@each_arch
def test_activation_quantization_compiles(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, static = torch.empty(33, 4096, dtype=torch.bfloat16), torch.ones(1, 1)
    launches = []
    for spec in ACTIVATIONS:
        act = parse_activation(spec)
        assert act is not None
        assert act_quant.rule_of(act.format) is not None, f"{spec}: no fused kernel"
        launches += launches_of(
            monkeypatch, MODULES, lambda a=act: act_quant.quantize(x, a, static if a.static else None, torch.bfloat16)
        )
    compile_all(launches, arch)


@each_arch
def test_kernels_that_measure_compile(arch: int) -> None:
    buffer = torch.empty(8, dtype=torch.int32)
    Launch(read_kernel.empty_kernel, {"nothing": buffer}, {"num_warps": 1, **OPTIONS}).compile(arch)
    given = {"source": buffer, "sums": buffer, "count": 8192, "BLOCK": 8192}
    Launch(read_kernel.read_kernel, given, {"num_warps": 8, **OPTIONS}).compile(arch)


@pytest.mark.slow
@each_arch
def test_quantization_after_something_compiles(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source and kind of scales, rows alone and shared; codes where the GPU has their dtype."""
    if arch >= 90:
        monkeypatch.setattr(row_quant, "early_options", lambda device: {"EARLY": True, "launch_pdl": True})
    launches = []
    for m, k in ((1, 4096), (1024, 1000)):
        x, w = torch.empty(m, k, dtype=torch.bfloat16), torch.empty(k, dtype=torch.bfloat16)
        given = {"plain": (x,), "relu": (x,), "silu_mul": (torch.cat((x, x), 1),), "rms_norm": (x, w, 1e-5),
                 "add_rms_norm": (x, x, w, 1e-5)}  # fmt: skip
        for spec in ("float8_e4m3:row", "int8:row", "int8:row:asym", "float8_e4m3:g128", "mxfp8_e4m3", "nvfp4@static"):
            act = parse_activation(spec)
            assert act is not None
            code = act.format.planes[0].dtype
            dtypes = {
                torch.bfloat16,
                code if spec in ("float8_e4m3:row", "int8:row") and arch >= 89 else torch.bfloat16,
            }
            for (name, args), dtype in product(given.items(), dtypes):
                launches += launches_of(
                    monkeypatch, MODULES,
                    lambda n=name, g=args, a=act, d=dtype: act_quant.after(n, g, a, torch.ones(1, 1), d),
                )  # fmt: skip
    compiled = compile_all(launches, arch)
    assert len(compiled) > 50
    ptx = "".join(c.asm["ptx"] for c in compiled)
    assert ("griddepcontrol.wait" in ptx) == (arch >= 90)
    # From fp32 at once: by way of fp16 it would be rounded twice.
    conversions = set(re.findall(r"cvt[.a-z0-9]*e4m3x2[.a-z0-9]*", ptx))
    assert conversions == ({"cvt.rn.satfinite.e4m3x2.f32"} if arch >= 90 else set())


@pytest.mark.parametrize(("spec", "arch"), [("int8:row", 80), ("int8:row", 90), ("float8_e4m3:row", 90)])
def test_8bit_matmul_compiles(spec: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    act = parse_activation(spec)
    assert act is not None
    fmt, n, k, launches = act.format, 4096, 4096, []
    planes = empty_planes(fmt, n, k)
    for m in (1, 128, 2048):
        x = torch.empty(m, k, dtype=torch.bfloat16)
        launches += launches_of(
            monkeypatch, MODULES,
            lambda x=x: scaled_mm.matmul(
                *act_quant.codes(x, act, None), planes["qdata"], planes["scale"], None, x.dtype
            ),
        )  # fmt: skip
    compile_all(launches, arch)


# Between the linear layers -----------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True])
@each_arch
def test_kernels_of_a_decoder_compile(arch: int, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the shapes of known models in bf16, and fp16 with odd ones; started early where the GPU can do that."""
    if early and arch < 90:
        pytest.skip("kernels start early from compute capability 9.0 on")
    modules = [between, decode_attention, gemv, greedy, hadamard]
    for module in modules:
        options = {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
        monkeypatch.setattr(module, "early_options", lambda device, options=options: options)
    launches = []
    for heads, groups, d, hidden, normed, dtype in (
        (32, 8, 128, 4096, False, torch.bfloat16), (32, 8, 64, 2048, False, torch.bfloat16),
        (16, 8, 128, 1024, True, torch.bfloat16), (12, 2, 96, 1000, True, torch.float16),
        (4, 1, 64, 512, False, torch.bfloat16), (8, 2, 64, 512, False, torch.float32),
        (8, 8, 128, 1024, False, torch.float32),
    ):  # fmt: skip
        x, w = torch.empty(1, hidden, dtype=dtype), torch.empty(512, hidden, dtype=dtype)
        qkv = torch.empty(1, (heads + 2 * groups) * d, dtype=dtype)
        norm = torch.empty(d, dtype=dtype) if normed else None
        for capacity in (512, 8192):
            cache = torch.empty(1, groups, capacity, d, dtype=dtype)
            angles, counters = torch.empty(capacity, d // 2), torch.zeros(groups, dtype=torch.int32)
            where = (cache, cache, counters[:1], angles, angles, norm, norm, 1e-5, heads)

            # Several new tokens take long to compile, and the capacity changes little of it.
            several = (5, 16) if capacity == 512 else ()

            def run(x=x, w=w, qkv=qkv, where=where, counters=counters, several=several) -> None:
                between.rms_norm(x, w[0], 1e-5)
                between.add_rms_norm(x, x, w[0], 1e-5)
                between.silu_mul(w)
                between.rope_write(qkv[:, None], *where)
                for tokens in (1, *several):
                    decode_attention.decode_attention(qkv[:, None].expand(-1, tokens, -1), *where, counters)
                gemv.gemv(x, w, None)
                greedy.take_greedy(x, counters[:1].long(), counters[:1], counters[None].long(), counters, 1)

            launches += launches_of(monkeypatch, modules, run)
    for k, dtype in ((4096, torch.bfloat16), (14336, torch.bfloat16), (11008, torch.float16), (1536, torch.float32)):
        x, signs = torch.empty(5, k, dtype=dtype), torch.empty(k, dtype=torch.int8)

        def turn(x=x, signs=signs) -> None:
            hadamard.hadamard(x, signs, False)
            hadamard.hadamard(x, signs, True)

        launches += launches_of(monkeypatch, modules, turn)
    compiled = compile_all(launches, arch)
    assert len(compiled) >= 18
    for c in compiled:
        assert ("griddepcontrol.wait" in c.asm["ptx"]) == early
