"""What calls of a CUDA C++ kernel have in common is found once: it follows the tensors, keeps none of them, and knows
which kernel is asked for. Launches are noted instead of made, and tensors are on the CPU."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import quantized
from torch import Tensor

import lowbit
from lowbit import QuantizedTensor
from lowbit.formats import parse_format
from lowbit.formats.activation import Activation
from lowbit.kernels import select
from lowbit.kernels.cuda import act_quant, decode, loader, scaled_mm, small_m, wgmma
from lowbit.kernels.select import KERNELS, planned, use_kernel

N, K = 256, 512
GPU = torch.device("cuda", 0)
#: Numbers of tokens for `cuda_small_m` and for `cuda_wgmma`.
TOKENS = (1, 64)
MEMORIES = (select._select, select._planned, small_m._plan, wgmma._plan, scaled_mm._plan, act_quant._plan)


class Noting:
    """In place of a compiled kernel: what its launches were given."""

    def __init__(self, source: loader.Source, name: str) -> None:
        self.source, self.name = source, name
        self.launches: list[SimpleNamespace] = []

    def resident(self, threads: int, shared: int, cluster: int = 1) -> int:
        return 264

    def launch(self, frame: loader.Frame, early: bool = False) -> None:
        a = frame.arguments[0]
        time.sleep(0)  # let other threads at the frame, if they can reach it
        known = isinstance(a, (decode.Arguments, act_quant.Arguments))
        fields = {name: getattr(a, name) for name, _ in a._fields_} if known else {}
        self.launches.append(SimpleNamespace(**fields, frame=frame, thread=threading.get_ident()))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Noting]]:
    """By source file, as they are loaded for a GPU like an H100."""
    found: dict[str, Noting] = {}

    def load(source: loader.Source, name: str, device: int) -> Noting:
        return found.setdefault("pack_x" if name == "pack_x" else source.file, Noting(source, name))

    for memory in MEMORIES:
        memory.cache_clear()
    monkeypatch.setattr(loader, "load", load)
    monkeypatch.setattr(loader, "missing", lambda: None)
    monkeypatch.setattr(loader, "tensor_map", lambda *args: loader.TensorMap())
    for module in (select, act_quant):
        monkeypatch.setattr(module, "arch_of", lambda device: (9, 0))
    monkeypatch.setattr(small_m, "capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for module in (small_m, wgmma, scaled_mm, act_quant):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    yield found
    for memory in MEMORIES:
        memory.cache_clear()


@pytest.fixture
def w() -> QuantizedTensor:
    return quantized(parse_format("int4:g128"), N, K, torch.bfloat16)


def call(w: QuantizedTensor, m: int, x: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Launch as `ops.linear` does; gives input and output."""
    launch = planned(m, N, K, w.format.spec, "", torch.bfloat16, GPU)
    assert launch is not None
    x = torch.randn(m, K).bfloat16() if x is None else x
    y = torch.empty(m, N, dtype=torch.bfloat16)
    launch(x, y, list(w.planes.values()), bias, None)
    return x, y


def last(kernels: dict[str, Noting], m: int) -> SimpleNamespace:
    return kernels["small_m.cu" if m <= 8 else "wgmma.cu"].launches[-1]


def test_plans_of_the_table_exist() -> None:
    named = [kernel for kernel in KERNELS if kernel.plan is not None]
    assert [kernel.name for kernel in named] == ["cuda_small_m", "cuda_scaled_mm", "cuda_wgmma"]
    for kernel in named:
        assert callable(select._import_function(kernel.plan))


@pytest.mark.parametrize("m", TOKENS)
def test_arguments_are_those_of_the_tensors(kernels: dict[str, Noting], w: QuantizedTensor, m: int) -> None:
    for _ in range(3):
        x, y = call(w, m)
        a = last(kernels, m)
        assert (a.codes, a.scale, a.y) == (w.qdata.data_ptr(), w.scale.data_ptr(), y.data_ptr())
        assert a.x == x.data_ptr() or m > 8  # where they are laid out first
        assert (a.m, a.n, a.k, a.scale_rows, a.scale_columns) == (m, N, K, N, K // 128)
        assert (a.stride, a.zero, a.bias, a.row_scale) == (K // 2, None, None, None)


CHANGES: dict[str, Callable[[QuantizedTensor], None]] = {
    "replaced": lambda w: setattr(w, "scale", w.scale.clone()),
    "data": lambda w: setattr(w.scale, "data", w.scale.clone()),
    "set_": lambda w: w.scale.set_(w.scale.clone()),
    "swapped": lambda w: torch.utils.swap_tensors(w.scale, w.scale.clone()),
    "all replaced": lambda w: w.__dict__.update({name: t.clone() for name, t in w.planes.items()}),
}


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("change", CHANGES)
def test_arguments_follow_planes_that_move(kernels: dict[str, Noting], w: QuantizedTensor, m: int, change: str) -> None:
    call(w, m)
    before = last(kernels, m)
    old = list(w.planes.values()), w.scale.untyped_storage()  # alive: their memory is not used again
    CHANGES[change](w)
    call(w, m)
    after = last(kernels, m)
    assert (after.codes, after.scale) == (w.qdata.data_ptr(), w.scale.data_ptr())
    assert after.scale != before.scale
    del old


@pytest.mark.parametrize("m", TOKENS)
def test_arguments_follow_planes_that_are_resized(kernels: dict[str, Noting], w: QuantizedTensor, m: int) -> None:
    """The same address, another shape or another distance of rows."""
    call(w, m)
    rows = w.qdata.as_strided((N // 2, K // 2), (K, 1))
    w.qdata, w.scale = rows, w.scale[: N // 2]
    launch = planned(m, N // 2, K, w.format.spec, "", torch.bfloat16, GPU)
    assert launch is not None
    launch(torch.zeros(m, K).bfloat16(), torch.empty(m, N // 2).bfloat16(), [w.qdata, w.scale], None, None)
    a = last(kernels, m)
    assert (a.n, a.stride, a.scale_rows) == (N // 2, K, N // 2)
    w.scale.resize_(N // 4, K // 128)
    launch(torch.zeros(m, K).bfloat16(), torch.empty(m, N // 2).bfloat16(), [w.qdata, w.scale], None, None)
    assert last(kernels, m).scale_rows == N // 4


@pytest.mark.parametrize("m", TOKENS)
def test_values_that_change_in_place_need_nothing(kernels: dict[str, Noting], w: QuantizedTensor, m: int) -> None:
    call(w, m)
    before = last(kernels, m)
    w.copy_(quantized(w.format, N, K, torch.bfloat16, seed=1))
    call(w, m)
    after = last(kernels, m)
    assert (after.codes, after.scale) == (before.codes, before.scale)
    assert decode._of_weight.cache_info().hits


def test_what_lies_badly_is_copied(kernels: dict[str, Noting], w: QuantizedTensor) -> None:
    def moved(t: Tensor) -> Tensor:
        memory = torch.empty(t.numel() + 1, dtype=t.dtype)
        found = memory[1:].view(t.shape)
        return found.copy_(t)

    w.qdata, w.scale, x = moved(w.qdata), moved(w.scale), moved(torch.randn(1, K).bfloat16())
    call(w, 1, x)
    a = last(kernels, 1)
    for address, t in ((a.codes, w.qdata), (a.scale, w.scale), (a.x, x)):
        assert address != t.data_ptr()
        assert address % 16 == 0


def test_a_bias_is_read_as_it_is_or_widened(kernels: dict[str, Noting], w: QuantizedTensor) -> None:
    for dtype, fp32, own in ((torch.bfloat16, 0, True), (torch.float32, 1, True), (torch.float16, 1, False)):
        bias = torch.randn(N).to(dtype)
        call(w, 1, bias=bias)
        a = last(kernels, 1)
        assert a.bias_fp32 == fp32
        assert (a.bias == bias.data_ptr()) == own
        call(w, 1)
        assert (last(kernels, 1).bias, last(kernels, 1).bias_fp32) == (None, 0), "nothing is left of the call before"


@pytest.mark.parametrize("m", TOKENS)
def test_no_tensor_is_kept(kernels: dict[str, Noting], w: QuantizedTensor, m: int) -> None:
    bias = torch.randn(N).half()
    x, y = call(w, m, bias=bias)
    references = [weakref.ref(t) for t in (*w.planes.values(), x, y, bias)]
    w.__dict__.clear()
    del x, y, bias
    gc.collect()
    assert [r() for r in references] == [None] * len(references)


@pytest.mark.parametrize("m", TOKENS)
def test_threads_have_their_own_frames(kernels: dict[str, Noting], w: QuantizedTensor, m: int) -> None:
    given: dict[int, set[int]] = {}

    def work() -> None:
        outputs = given.setdefault(threading.get_ident(), set())
        kept = [call(w, m) for _ in range(50)]
        outputs.update(y.data_ptr() for _, y in kept)
        time.sleep(0.1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launches = kernels["small_m.cu" if m <= 8 else "wgmma.cu"].launches
    assert len(launches) == 400
    assert all(launch.y in given[launch.thread] for launch in launches)


def test_a_frame_is_used_again(kernels: dict[str, Noting], w: QuantizedTensor) -> None:
    for _ in range(3):
        call(w, 1)
    assert len({id(launch.frame) for launch in kernels["small_m.cu"].launches}) == 1


def test_the_plan_is_that_of_the_kernel_which_is_asked_for(kernels: dict[str, Noting], w: QuantizedTensor) -> None:
    def plan() -> Any:
        return planned(1, N, K, w.format.spec, "", torch.bfloat16, GPU)

    first = plan()
    assert plan() is first
    with use_kernel("triton_weight_only"):
        assert plan() is None
    with use_kernel("cuda_wgmma"):
        call(w, 1)
    with lowbit.batch_invariant():
        call(w, 1)
    others, invariant = kernels["wgmma.cu"].launches
    assert others.frame is not invariant.frame
    assert plan() is first
    with use_kernel("cuda_scaled_mm"), pytest.raises(lowbit.UnsupportedError, match="the activation is not quantized"):
        plan()


def test_codes_by_codes(kernels: dict[str, Noting]) -> None:
    fmt = parse_format("int8:row")
    w = quantized(fmt, N, K)
    codes, scales = torch.zeros(4, K, dtype=torch.int8), torch.ones(4, 1)
    for _ in range(2):
        y = scaled_mm.launch(codes, w.planes, fmt, fmt, N, torch.bfloat16, None, scales)
        a = kernels["scaled_mm.cu"].launches[-1]
        assert (a.x, a.codes, a.row_scale, a.row_scales, a.y) == (
            codes.data_ptr(), w.qdata.data_ptr(), scales.data_ptr(), 4, y.data_ptr()
        )  # fmt: skip
    w.qdata = w.qdata.clone()
    scaled_mm.launch(codes, w.planes, fmt, fmt, N, torch.bfloat16, None, scales)
    assert kernels["scaled_mm.cu"].launches[-1].codes == w.qdata.data_ptr()


# Activations -------------------------------------------------------------------------------------

#: Weight, activation, tokens, and the kernel that multiplies.
QUANTIZED = [
    ("float8_e4m3:row", "float8_e4m3:row", 1, "small_m.cu"), ("int8:row", "int8:row:asym", 64, "wgmma.cu"),
    ("float8_e4m3:row", "float8_e4m3:row", 64, "scaled_mm.cu"), ("int4:g128", "int8:tensor@static", 64, "scaled_mm.cu"),
    ("float8_e4m3:b128x128", "float8_e4m3:g128", 2000, "scaled_mm.cu"),
]  # fmt: skip


def call_quantized(
    weight: str, act: str, m: int, x: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Launch as `ops.linear` does; gives the input and the scale of a static activation."""
    w = quantized(parse_format(weight), N, K, torch.bfloat16)
    launch = planned(m, N, K, weight, act, torch.bfloat16, GPU)
    assert launch is not None
    x = torch.randn(m, K).bfloat16() if x is None else x
    scale = torch.ones(1, 1) if scale is None and "static" in act else scale
    launch(x.view(1, m, K), torch.empty(1, m, N, dtype=torch.bfloat16), list(w.planes.values()), None, scale)
    return x, scale


@pytest.mark.parametrize(("weight", "act", "m", "file"), QUANTIZED)
def test_activations_are_quantized_before(kernels: dict[str, Noting], weight: str, act: str, m: int, file: str) -> None:
    for _ in range(2):
        x, scale = call_quantized(weight, act, m)
        first, second = kernels["act_quant.cu"].launches[-1], kernels[file].launches[-1]
        assert (first.x, first.m, first.k) == (x.data_ptr(), m, K)
        assert first.given == (None if scale is None else scale.data_ptr())
        assert second.x == first.operand or file == "wgmma.cu"
        assert first.scales == (second.frame.arguments[5].value if "g128" in act else second.row_scale)
    assert len({id(launch.frame) for launch in kernels["act_quant.cu"].launches}) == 1


def test_what_the_kernel_does_not_take_is_quantized_by_triton(
    kernels: dict[str, Noting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs that lie badly, scales of a whole tensor, and errors of what is missing."""
    asked: list[str] = []

    def split(x: Tensor, act: Activation, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        assert x.shape == (1, K)
        asked.append(act.spec)
        return x, torch.ones(1, 1)

    triton = pytest.importorskip("lowbit.kernels.triton.act_quant")
    monkeypatch.setattr(triton, "split", split)
    x = torch.empty(K + 1, dtype=torch.bfloat16)[1:].view(1, K)
    row = "float8_e4m3:row"
    call_quantized(row, row, 1, x)
    call_quantized(row, "float8_e4m3:tensor", 1)
    call_quantized("int8:row", "int8:tensor@static", 1, scale=torch.ones(1, 1, dtype=torch.float64))
    assert asked == [row, "float8_e4m3:tensor", "int8:tensor@static"]
    assert not kernels["act_quant.cu"].launches
    call_quantized(row, row, 1)
    assert len(asked) == 3
    assert len(kernels["act_quant.cu"].launches) == 1


def test_a_missing_scale_is_an_error(kernels: dict[str, Noting]) -> None:
    pytest.importorskip("triton")
    launch = planned(1, N, K, "int8:row", "int8:tensor@static", torch.bfloat16, GPU)
    assert launch is not None
    w = quantized(parse_format("int8:row"), N, K, torch.bfloat16)
    with pytest.raises(ValueError, match="needs its calibrated scale"):
        launch(torch.zeros(1, K).bfloat16(), torch.empty(1, N).bfloat16(), list(w.planes.values()), None, None)


def test_a_frame_is_what_the_driver_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def launcher(config: int, function: int, parameters: int, extra: None) -> int:
        c = loader._LaunchConfig.from_address(config)
        pointers = (ctypes.c_void_p * 2).from_address(parameters)
        values = decode.Arguments.from_address(pointers[0]).m, ctypes.c_int.from_address(pointers[1]).value
        early = c.attribute_count and loader._LaunchAttribute.from_address(c.attributes).id
        grid, block = (c.grid_x, c.grid_y, c.grid_z), (c.block_x, c.block_y, c.block_z)
        seen.append((grid, block, c.shared_bytes, c.stream, early, function, values))
        return 0

    monkeypatch.setattr(loader, "_launcher", lambda: launcher)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 100 + device, raising=False)
    kernel = object.__new__(loader.CudaKernel)
    kernel.name, kernel.device, kernel._handle, kernel._starts_early = "k", 3, 77, True
    frame = loader.Frame(5, 256, 4096, (decode.Arguments(m=9), ctypes.c_int(4)))
    kernel.launch(frame, early=True)
    frame.arguments[0].m = 10
    kernel.launch(frame)
    kernel._starts_early = False  # before Hopper
    kernel.launch(frame, early=True)
    same = (5, 1, 1), (256, 1, 1), 4096, 103
    assert seen == [(*same, 6, 77, (9, 4)), (*same, 0, 77, (10, 4)), (*same, 0, 77, (10, 4))]
