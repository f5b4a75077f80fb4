"""Activations of 8-bit codes times weights of 8-bit codes, or of integers of 4 bits, on Hopper's matrix units
(`scaled_mm.cu`), for any number of tokens."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.elements import IntElement
from lowbit.kernels.cuda import act_quant, decode, loader
from lowbit.kernels.cuda.tiles import SHARED_PER_BLOCK, Exchange, Shares, Tiling, fastest, shares, why_not_hopper
from lowbit.kernels.problem import Operand, Problem
from lowbit.kernels.triton.launch import multiprocessors, on_device

#: Codes of K per stage.
DEPTH = 128
# Registers per thread of the warpgroups that bring operands, and that widen W.
PRODUCER, WIDENER = 32, 64


def instruction(columns: int, kind: str) -> str:
    """C++ for `wgmma(d, a, b, add)`: m64 x n`columns` x k32 of `kind`, both from shared memory; 0: d is new."""
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    integer = kind == "s8"
    constraint, value, result = ("+r", "int", "s32") if integer else ("+f", "float", "f32")
    outputs = ", ".join(f'"{constraint}"(d[{i}])' for i in range(count))
    signs = "" if integer else ", 1, 1"
    return (
        f"__device__ __forceinline__ void wgmma({value} (&d)[{count}], unsigned long long a, unsigned long long b, "
        "int add) {\n"
        f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.s32 p, %{count + 2}, 0;\\n"\n'
        f'        "wgmma.mma_async.sync.aligned.m64n{columns}k32.{result}.{kind}.{kind} '
        f'{{{sums}}}, %{count}, %{count + 1}, p{signs};\\n}}"\n'
        f'        : {outputs} : "l"(a), "l"(b), "r"(add));\n}}\n'
    )


def kind(fmt: Format) -> str | None:
    """PTX's name of a format's codes, as operands of a product."""
    if isinstance(fmt.element, IntElement):
        return "s8"
    return {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}.get(fmt.planes[0].dtype)


def is_narrow(fmt: Format) -> bool:
    """Whether a weight has codes of 4 bits, which are widened."""
    return fmt.element.bits == 4


def stage_bytes(fmt: Format, act: Format, c: Tiling) -> int:
    """Of shared memory for `DEPTH` codes of K of both operands, W before it is widened, the activations' scales."""
    w = DEPTH + (DEPTH // 2 if is_narrow(fmt) else 0)
    return c.rows * w + c.tokens * (DEPTH + (4 if _x_group(act) else 0))


def stages(fmt: Format, act: Format, c: Tiling) -> int:
    """That fit the shared memory of a block."""
    room = SHARED_PER_BLOCK // c.blocks - c.output_bytes - 1024
    return min(room // stage_bytes(fmt, act, c), 16)


def _x_group(act: Format) -> int:
    return act.plane("scale").k or 0


def _has_parts(fmt: Format, act: Format) -> bool:
    """Whether sums leave the matrix units along the way."""
    return kind(act) != "s8" or fmt.plane("scale").k is not None or _x_group(act) > 0


def _unit(fmt: Format, act: Format) -> int:
    """What widened codes leave undone, as a power of two."""
    if not is_narrow(fmt):
        return 0
    return 9 if kind(act) != "s8" else 0 if fmt.has("zero_point") else -4


@cache
def constants(fmt: Format, act: Format, c: Tiling) -> loader.Defines | str:
    """The kernel's constants for a weight, an activation and an instance, or why there is none."""
    found = decode.constants(fmt, (16,))
    if isinstance(found, str):
        return found
    defines, integer, narrow, parts = dict(found), kind(act) == "s8", is_narrow(fmt), _has_parts(fmt, act)
    # Parts of one tile of 64 rows at a time lie beside the sums; scales and addresses beside both.
    sums = c.row_tiles * c.columns // 2 + (c.columns // 2 if parts else 0)
    rest = 24
    along_k = defines["SCALE_MODE"] != decode.PER_ROW
    if c.turned and (not along_k or defines["SCALE_N"] % c.rows or c.rows < 32):
        return f"its scales are not those of blocks of {c.rows} rows, or these are too few"
    if along_k:
        scaled = 1 if c.turned else c.row_tiles * (1 if defines["SCALE_N"] % 16 == 0 else 2)
        rest += scaled * (2 + 2 * max(1, DEPTH // defines["GROUP"]))
    beside = (PRODUCER, WIDENER) if narrow else (PRODUCER,)
    consumer = c.registers(*beside)
    # The compiler does not give the registers of one product what setmaxnreg brings later.
    if sums + rest > consumer or c.columns // 2 + 32 > c.registers_at_launch(len(beside)):
        return "too many sums for the registers"
    if max(beside) > c.registers_at_launch(len(beside)):
        return "a block begins with fewer registers than its other warpgroups need"
    if stages(fmt, act, c) < 3:
        return "too few stages fit the shared memory"
    defines |= {
        "AS_CODES": 1, "CODES_UNIT": _unit(fmt, act), "S8": int(integer),
        "INTEGER": int(integer and not parts), "X_GROUP": _x_group(act), "COLUMNS": c.columns, "ROW_TILES": c.row_tiles,
        "TURNED": int(c.turned), "CONSUMERS": c.warpgroups, "SPLIT": c.split, "MIN_BLOCKS": c.blocks,
        "STAGES": stages(fmt, act, c),
        "PRODUCER_REGS": PRODUCER, "WIDENER_REGS": WIDENER, "CONSUMER_REGS": consumer,
    }  # fmt: skip
    return tuple(sorted(defines.items()))


def source(fmt: Format, act: Format, c: Tiling, n: int, dtype: torch.dtype) -> loader.Source:
    """What is compiled for an instance and layers of `n` rows."""
    defines, codes = constants(fmt, act, c), kind(act)
    assert not isinstance(defines, str), defines
    assert codes is not None, act
    more = *c.output_defines(n), ("FP16", int(dtype == torch.float16))
    return loader.Source("scaled_mm.cu", (*defines, *more), instruction(c.columns, codes))


@cache
def candidates(fmt: Format, act: Format, m: int, k: int) -> tuple[Tiling, ...]:
    """The instances that may be chosen: the smallest tile that holds the tokens and the next, or large ones."""
    many = (128, 160, 192) if _has_parts(fmt, act) else (128, 256)
    sizes = [(t, False) for t in (many if m >= 128 else [t for t in (8, 16, 32, 64, 128) if t >= m][:2])]
    # Tokens with scales along K are better rows of the products, of which a lane has two, than columns, of which it has
    # a quarter.
    sizes += [(128, True)] * (m > 32 and _x_group(act) > 0)
    ways = [(False, 1), (True, 1), *((False, split) for split in (2, 4, 8))]
    return tuple(
        c for (t, turned), row_tiles, groups, blocks, (cut, split) in product(sizes, (1, 2), (1, 2, 3), (1, 2), ways)
        # Outputs are written for 8, 16 or whole 32 columns at a time.
        if (split == 1 or ((t // split in (8, 16) or t % (32 * split) == 0) and split * DEPTH <= k))
        and (groups < 3 or (row_tiles, blocks, split) == (1, 1, 1))
        # Measured on an H200: never the fastest, and some a third slower than their counts say.
        and not (cut and blocks == 2 and t >= 128) and not (turned and row_tiles == groups == 2)
        and not isinstance(constants(fmt, act, c := Tiling(t, row_tiles, cut, blocks, groups, split, turned)), str)
    )  # fmt: skip


@cache
def config_for(fmt: Format, act: Format, m: int, n: int, k: int, sms: int) -> Tiling:
    """The instance that a model of the time finds fastest; its constants fit measurements on an H200."""
    parts, narrow, steps = _has_parts(fmt, act), is_narrow(fmt), -(-k // DEPTH)
    stage_parts = max(1, DEPTH // (fmt.plane("scale").k or DEPTH))

    def cycles(c: Tiling) -> float:
        """Of a multiprocessor."""
        # Instructions of a lane for each sum that leaves the matrix units.
        per_sum = 1 + 0.72 * (kind(act) == "s8") + (2.1 if _x_group(act) and not c.turned else 0)
        # Products keep the registers busy, so that instructions take their time beside that of the products.
        multiply, widen = c.rows * c.tokens / 32, 7 * c.rows if narrow else 0
        issue = c.row_tiles * stage_parts * ((c.columns / 2 * per_sum if parts else 0) + 52)
        # One warpgroup by itself: its products, and what it does before and after; or W that is widened for all.
        alone = max(multiply / c.warpgroups + 151 * c.row_tiles * stage_parts + 1.71 * issue, widen)
        if not parts:
            alone = max(alone, 700)
        brought = c.rows * DEPTH * fmt.element.bits / 8 + c.tokens * DEPTH
        together = multiply + c.warpgroups * (issue + 48) + 0.325 * widen
        stage = max(alone, c.blocks * together, c.blocks * brought / 37)
        waves, all_stages = c.tiles(m, n) * c.split / (sms * c.blocks), steps / c.split * stage
        memory = fmt.nbytes(n, k) / sms / 16.7
        if c.cut:
            return max(memory, waves * all_stages) + 6050 + 0.545 * c.rows * c.tokens
        exchange = 2060 + 0.37 * c.rows * c.tokens if c.split > 1 else 0
        return max(memory, math.ceil(waves) * all_stages) + 2430 * math.ceil(waves) + exchange

    return fastest(candidates(fmt, act, m, k), cycles, m, n, sms)


def _why_not_operands(fmt: Format, act: Format) -> str | None:
    """Why codes of the two cannot be multiplied by this kernel."""
    for side, f in (("activation", act), ("weight", fmt)):
        if f.element.vector != 1 or f.element.bits not in ((8,) if f is act else (4, 8)) or f.has("codebook"):
            return f"the {side} has no 8-bit codes" + (" or integers of 4 bits" if f is fmt else "")
        if f.has("zero_point") and (f is act or not is_narrow(f)):
            return f"the {side} has zero points"
    if kind(act) is None:
        return f"Hopper has no products of {act.element}"
    if is_narrow(fmt) and (not isinstance(fmt.element, IntElement) or kind(act) == "e5m2"):
        return f"{fmt.element} is not widened to {act.element}"
    if not is_narrow(fmt) and fmt.element != act.element:
        return "activation and weight have different elements"
    if act.has("outer_scale") or act.scale_planes[0].n not in (None, 1) or act.scale_planes[0].k not in (None, DEPTH):
        return f"the activation's scales are not per token, per tensor or per group of {DEPTH}"
    group = fmt.plane("scale").k
    if group is not None and (group % 32 or (DEPTH % group and group % DEPTH)):
        return f"groups of {group} do not line up with the {DEPTH} codes of a stage"
    return None


def why_not(problem: Problem) -> str | None:
    """The condition of the table of kernels."""
    if problem.activation is None:
        return "the activation is not quantized"
    fmt, act = problem.weight, problem.activation.format
    if (reason := _why_not_operands(fmt, act) or why_not_hopper(problem)) is not None:
        return reason
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"written for bf16 and fp16, got {problem.dtype}"
    if problem.k % (128 // fmt.element.bits):
        return f"rows of the weight start at multiples of 16 bytes, got K = {problem.k}"
    # A product is at most 2**14.
    if not _has_parts(fmt, act) and problem.k >= 1 << 17:
        return f"its int32 sums can overflow from K = 131072, got {problem.k}"
    found = decode.constants(fmt, (16,))
    if isinstance(found, str):
        return found
    plain = kind(act) != "s8" and fmt.element == act.element and fmt.plane("scale").k is None and not _x_group(act)
    if plain and problem.m > 128:
        # Measured on an H100 (docs/measured.md): sums of float8 in fp32 leave registers for small tiles only.
        return f"M = {problem.m} is above 128, where cuBLAS is faster"
    return loader.missing()


def describe(problem: Problem) -> str:
    """The instance for a problem, on a GPU with as many multiprocessors as an H100."""
    return str(_config(problem, 132))


def sources(problem: Problem, sms: int) -> list[loader.Source]:
    """What is compiled for a problem on a GPU with `sms` multiprocessors."""
    assert problem.activation is not None
    return [source(problem.weight, problem.activation.format, _config(problem, sms), problem.n, problem.dtype)]


def _config(problem: Problem, sms: int) -> Tiling:
    assert problem.activation is not None
    return config_for(problem.weight, problem.activation.format, problem.m, problem.n, problem.k, sms)


def scaled_mm(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The table's entry: activation to codes, codes times codes."""
    from lowbit.kernels.triton import act_quant as triton  # late: not every installation of torch brings triton

    act = problem.activation
    assert act is not None
    codes, scales = triton.codes(x, act, act_scale)
    return launch(codes, planes, problem.weight, act.format, problem.n, problem.dtype, bias, scales)


def launch(
    codes: Tensor,
    planes: Mapping[str, Tensor],
    fmt: Format,
    act: Format,
    n: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    config: Tiling | None = None,
) -> Tensor:
    """`y (M, N)` in bf16 or fp16 from codes `(M, K)` of the activation's format.

    Args:
        scales: fp32 `(M or 1, 1)`, multiplied into the result, or `(M, ceil(K / 128))`, each into its part of a sum.
        config: instead of the rule's choice.
    """
    m, k = codes.shape
    y = torch.empty(m, n, dtype=dtype, device=codes.device)
    c = config or config_for(fmt, act, m, n, k, multiprocessors(codes.device))
    found = _plan(fmt, act, c, m, n, k, codes.device.index, dtype)
    found.start(codes, y, decode.in_order(planes, fmt), bias, scales)
    return y


def plan(problem: Problem, device: int) -> decode.Launch:
    """The table's entry for calls that look alike."""
    act, m, n, k = problem.activation, problem.m, problem.n, problem.k
    assert act is not None
    c = _config(problem, multiprocessors(torch.device("cuda", device)))
    found = _plan(problem.weight, act.format, c, m, n, k, device, problem.dtype)
    quantize = act_quant.quantizer(problem, act.format.planes[0].dtype, device)

    def launch(x: Tensor, y: Tensor, planes: Sequence[Tensor], bias: Tensor | None, act_scale: Tensor | None) -> None:
        codes, scales = quantize(x, act_scale)
        found.start(codes, y, planes, bias, scales)

    return launch


class Plan(NamedTuple):
    """What launches of one kind have in common.

    Attributes:
        sizes: M, N and K.
        grouped: whether the activation has scales along K.
        w_box: how the copy engine reads W: columns of the matrix it sees, bytes of a box's row, whether swizzled.
        y_box: tokens of a run of outputs that it writes, 0 where warps write them.
    """

    spec: str
    config: Tiling
    sizes: tuple[int, int, int]
    grouped: bool
    w_box: tuple[int, int, bool]
    kernel: loader.CudaKernel
    frames: loader.Frames
    shares: Shares
    y_box: int

    def start(
        self, codes: Tensor, y: Tensor, planes: Sequence[Tensor], bias: Tensor | None, scales: Tensor | None
    ) -> None:
        """Launch for tensors as `decode.fill` takes them; `scales` are those of `launch`."""
        frame, c, (m, n, k) = self.frames.take(), self.config, self.sizes
        a, _, _, _, exchange, x_scales, _ = frame.arguments
        row_scale = None if self.grouped else scales
        _keep = decode.fill(frame, codes, y, planes, self.spec, self.sizes, bias, row_scale)
        if self.grouped:
            assert scales is not None, self
            assert scales.shape == (m, -(-k // DEPTH)), (self, scales.shape)
            _keep.append(scales.contiguous())
            x_scales.value = _keep[-1].data_ptr()
        work = torch.empty(self.shares.sums + self.shares.flags, dtype=torch.uint8, device=codes.device)
        self.shares.fill(exchange, work.data_ptr())
        columns, *box = self.w_box
        with on_device(codes):
            x_map = loader.tensor_map(a.x, m, k // 2, c.tokens)
            w_map = loader.tensor_map(a.codes, n, columns, c.rows, a.stride, *box)
            frame.parameters[1], frame.parameters[2] = ctypes.addressof(x_map), ctypes.addressof(w_map)
            if self.y_box:
                y_map = loader.tensor_map(a.y, m, n, self.y_box)
                frame.parameters[3] = ctypes.addressof(y_map)
            # W is read before the kernel ahead has ended. Outside of graphs, that kernel may be the one that made W.
            self.kernel.launch(frame, torch.cuda.is_current_stream_capturing())
        self.frames.give(frame)


@cache
def _plan(fmt: Format, act: Format, c: Tiling, m: int, n: int, k: int, device: int, dtype: torch.dtype) -> Plan:
    sms = multiprocessors(torch.device("cuda", device))
    kernel = loader.load(source(fmt, act, c, n, dtype), "scaled_mm", device)
    shared = stages(fmt, act, c) * stage_bytes(fmt, act, c) + c.output_bytes + 1024
    parts, threads = shares(c, m, n, -(-k // DEPTH), c.resident(sms)), c.threads(2 if is_narrow(fmt) else 1)
    w_box = (k * fmt.element.bits // 16, *((DEPTH // 2, False) if is_narrow(fmt) else (DEPTH, True)))

    def frame() -> loader.Frame:
        maps, pointer = tuple(loader.TensorMap() for _ in range(3)), ctypes.c_void_p()
        return loader.Frame(
            parts.blocks, threads, shared,
            (decode.Arguments(), *maps, Exchange(), pointer, ctypes.c_int(int(c.cut))),
        )  # fmt: skip

    return Plan(fmt.spec, c, (m, n, k), _x_group(act) > 0, w_box, kernel, loader.Frames(frame), parts, c.output_box(n))
