"""8-bit codes times codes of 8 bits, or float8 times codes of 4, on Hopper's matrix units (`scaled_mm.cu`)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.elements import IntElement, TableElement
from lowbit.kernels.cuda import decode, loader
from lowbit.kernels.cuda.tiles import SHARED_PER_BLOCK, Shares, Tiling, shares
from lowbit.kernels.problem import Operand, Problem
from lowbit.kernels.triton.launch import multiprocessors, on_device

#: Codes of K per stage.
DEPTH = 128


def instruction(tokens: int, kind: str, registers: bool = False) -> str:
    """C++ for `wgmma(d, a, b, add)`: m64 x n`tokens` x k32 of `kind`; 0: d is new.

    `b` is a descriptor of shared memory, and so is `a`, or it is in `registers`.
    """
    count, operands = tokens // 2, 4 if registers else 1
    integer = kind == "s8"
    constraint, value, result = ("+r", "int", "s32") if integer else ("+f", "float", "f32")
    outputs = ", ".join(f'"{constraint}"(d[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if registers else '"l"(a)'
    sums = ", ".join(f"%{i}" for i in range(count))
    first = ", ".join(f"%{count + i}" for i in range(operands))
    first = f"{{{first}}}" if registers else first
    signs = "" if integer else ", 1, 1"
    second, add = count + operands, count + operands + 1
    return (
        f"__device__ __forceinline__ void wgmma({value} (&d)[{count}], "
        f"{'const unsigned *' if registers else 'unsigned long long '}a, unsigned long long b, int add) {{\n"
        f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.s32 p, %{add}, 0;\\n"\n'
        f'        "wgmma.mma_async.sync.aligned.m64n{tokens}k32.{result}.{kind}.{kind} '
        f'{{{sums}}}, {first}, %{second}, p{signs};\\n}}"\n'
        f'        : {outputs} : {inputs}, "l"(b), "r"(add));\n}}\n'
    )


def kind(fmt: Format) -> str | None:
    """PTX's name of the operands in products with a weight's codes, None where there are no such products."""
    if looked_up(fmt):
        return "e4m3" if values(fmt) else None
    if isinstance(fmt.element, IntElement):
        return "s8"
    return {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}.get(fmt.planes[0].dtype)


def looked_up(fmt: Format) -> bool:
    """Whether a weight's codes are looked up, and not multiplied as they are."""
    return fmt.element.bits == 4


@cache
def values(fmt: Format) -> tuple[int, ...]:
    """float8_e4m3 of the 16 codes of a weight, as bytes; none where that is not exact."""
    if isinstance(fmt.element, TableElement) or fmt.element.vector > 1:
        return ()
    levels = fmt.element.decode(torch.arange(16, dtype=torch.uint8), {})
    found = levels.to(torch.float8_e4m3fn)
    # Codes 2i and 2i + 1 have to have one sign, which takes no part in the choice between them.
    signs = found.view(torch.uint8).view(8, 2) >> 7
    if bool((found.float() != levels).any()) or bool((signs[:, 0] != signs[:, 1]).any()):
        return ()
    return tuple(found.view(torch.uint8).tolist())


def stage_bytes(fmt: Format, c: Tiling) -> int:
    """Of shared memory for `DEPTH` codes of K of both operands."""
    return (c.rows * fmt.element.bits // 8 + c.tokens) * DEPTH


def stages(fmt: Format, c: Tiling) -> int:
    """That fit the shared memory of a block."""
    room = SHARED_PER_BLOCK // c.blocks - c.output_bytes - 1024
    return min(room // stage_bytes(fmt, c), 16)


def threads(fmt: Format, c: Tiling) -> int:
    """Of a block: those that multiply, and two warps that bring operands, or a warpgroup that gives registers away."""
    return 128 * c.warpgroups + (128 if looked_up(fmt) else 64)


@cache
def constants(fmt: Format, c: Tiling) -> loader.Defines | str:
    """The kernel's constants, or why there is no such instance."""
    found = decode.constants(fmt, (16,))
    if isinstance(found, str):
        return found
    if kind(fmt) is None:
        return "there are no products of its codes"
    integer = isinstance(fmt.element, IntElement) and not looked_up(fmt)
    defines = dict(found) | {
        "AS_CODES": 1, "INTEGER": int(integer), "TOKENS": c.tokens, "ROW_TILES": c.row_tiles, "CONSUMERS": c.warpgroups,
        "SPLIT": c.split, "MIN_BLOCKS": c.blocks, "STAGES": stages(fmt, c),
    }  # fmt: skip
    # Registers of a thread: a multiprocessor's quarter has a warp of every warpgroup and one that brings operands.
    registers = 512 // (c.warpgroups + 1) // c.blocks // 8 * 8
    # float8 adds a part of its own to the sums, for one tile of 64 rows at a time.
    sums, rest = c.row_tiles * c.tokens // 2 + (0 if integer else c.tokens // 2), 32
    if looked_up(fmt):
        if c.row_tiles > 1:
            return "one tile of rows is looked up at a time"
        producer = 32 if c.blocks > 1 else 40
        registers = (registers * (c.warpgroups + 1) - producer) // c.warpgroups // 8 * 8
        rest = 72
        low_to_high = [int.from_bytes(bytes(values(fmt)[i : i + 8 : 2]), "little") for i in (0, 8, 1, 9)]
        defines |= dict(zip(("EVEN_LOW", "EVEN_HIGH", "ODD_LOW", "ODD_HIGH"), low_to_high, strict=True))
        defines |= {"PRODUCER_REGS": producer, "CONSUMER_REGS": min(registers, 240)}
    if sums + rest > registers:
        return "too many sums for the registers"
    if stages(fmt, c) < 3:
        return "too few stages fit the shared memory"
    return tuple(sorted(defines.items()))


def source(fmt: Format, c: Tiling, dtype: torch.dtype) -> loader.Source:
    """What is compiled for an instance."""
    defines, operands = constants(fmt, c), kind(fmt)
    assert not isinstance(defines, str), defines
    assert operands is not None, fmt
    return loader.Source(
        "scaled_mm.cu", (*defines, ("FP16", int(dtype == torch.float16))),
        instruction(c.tokens, operands, registers=looked_up(fmt)),
    )  # fmt: skip


@cache
def candidates(fmt: Format, m: int, k: int) -> tuple[Tiling, ...]:
    """The instances that may be chosen: the smallest tile that holds the tokens and the next, in every way."""
    sizes = [t for t in (8, 16, 32, 64, 128, 256) if t >= min(m, 128)][:2]
    ways = [(False, 1), (True, 1), *((False, split) for split in (2, 4, 8))]
    return tuple(
        c for t, row_tiles, groups, blocks, (cut, split) in product(sizes, (1, 2), (1, 2), (1, 2), ways)
        if (split == 1 or (split * 8 <= t and split * DEPTH <= k))
        and not isinstance(constants(fmt, c := Tiling(t, row_tiles, cut, blocks, groups, split)), str)
    )  # fmt: skip


@cache
def config_for(fmt: Format, m: int, n: int, k: int, sms: int) -> Tiling:
    """The instance that a model of the time finds fastest; its constants fit measurements on an H100."""
    integer, steps = kind(fmt) == "s8", -(-k // DEPTH)

    def cycles(c: Tiling) -> float:
        """Of a multiprocessor."""
        # A stage takes the time of its products, of bringing it, or what one block waits for where it is alone.
        multiply = c.rows * c.tokens / 32
        alone = max(multiply + 115, 700) if integer else multiply + 115 + 2 * c.row_tiles * c.tokens
        stage = max(alone, c.blocks * max(multiply, (c.rows + c.tokens) * DEPTH / 42))
        waves, all_stages = c.tiles(m, n) * c.split / (sms * c.blocks), steps / c.split * stage
        memory = n * k / sms / 12.5
        if c.cut:
            return max(memory, 1.08 * waves * all_stages) + 2800 + 0.5 * c.rows * c.tokens
        exchange = 1400 + 0.2 * c.rows * c.tokens if c.split > 1 else 0
        return max(memory, math.ceil(waves) * all_stages) + 600 * math.ceil(waves) + exchange

    # Blocks that share tiles wait for each other, and so belong in one wave.
    return min(
        (c for c in candidates(fmt, m, k) if c.split == 1 or c.tiles(m, n) * c.split <= sms * c.blocks), key=cycles
    )


def why_not(problem: Problem) -> str | None:
    """The condition of the table of kernels, for weights of 4 bits, and for those of 8 whose rows have one scale."""
    fmt, bits = problem.weight, problem.weight.element.bits
    if problem.arch is not None and problem.arch != (9, 0):
        return f"needs Hopper's matrix units (9.0), this GPU has {problem.arch[0]}.{problem.arch[1]}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"written for bf16 and fp16, got {problem.dtype}"
    if problem.k * bits % 128:
        return f"rows of the weight start at multiples of 16 bytes, got K = {problem.k}"
    if kind(fmt) is None:
        return f"Hopper has no products of {fmt.element}"
    if fmt.has("zero_point"):
        return "the weight has zero points"
    if fmt.has("outer_scale") or fmt.has("scale_offset"):
        return "the weight has two levels of scales"
    if (group := fmt.plane("scale").k) is not None and group % 32:
        return f"one product is of 32 weights, groups have {group}"
    found = decode.constants(fmt, (16,))
    if isinstance(found, str):
        return found
    if kind(fmt) == "s8":
        if problem.k >= 1 << 17:
            return f"its int32 sums can overflow from K = 131072, got {problem.k}"
    elif bits == 8 and problem.m > 128:
        # Measured on an H100 (docs/measured.md): sums of float8 in fp32 leave registers for small tiles only.
        return f"M = {problem.m} is above 128, where cuBLAS is faster"
    return loader.missing()


def describe(problem: Problem) -> str:
    """The instance for a problem, on a GPU with as many multiprocessors as an H100."""
    return str(config_for(problem.weight, problem.m, problem.n, problem.k, 132))


def sources(problem: Problem, sms: int) -> list[loader.Source]:
    """What is compiled for a problem on a GPU with `sms` multiprocessors."""
    fmt = problem.weight
    return [source(fmt, config_for(fmt, problem.m, problem.n, problem.k, sms), problem.dtype)]


def scaled_mm(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The table's entry: activation to codes, codes times codes."""
    from lowbit.kernels.triton import act_quant  # late: not every installation of torch brings triton

    assert problem.activation is not None
    codes, row_scale = act_quant.codes(x, problem.activation, act_scale)
    return launch(codes, planes, problem.weight, problem.n, problem.dtype, bias, row_scale)


def launch(
    codes: Tensor,
    planes: Mapping[str, Tensor],
    fmt: Format,
    n: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    config: Tiling | None = None,
) -> Tensor:
    """`y (M, N)` in bf16 or fp16 from codes `(M, K)` of the weight's element.

    Args:
        row_scale: fp32 `(M or 1, 1)`, multiplied into the result.
        config: instead of the rule's choice.
    """
    m, k = codes.shape
    y = torch.empty(m, n, dtype=dtype, device=codes.device)
    c = config or config_for(fmt, m, n, k, multiprocessors(codes.device))
    plan = _plan(fmt, c, m, n, k, codes.device.index, dtype)
    a, _keep = decode.arguments(codes, y, planes, fmt, bias, row_scale)
    work = torch.empty(plan.shares.sums + plan.shares.flags, dtype=torch.uint8, device=codes.device)
    with on_device(codes):
        x_map = loader.tensor_map(a.x, m, k // 2, c.tokens)
        bits = fmt.element.bits
        w_map = loader.tensor_map(a.codes, n, k * bits // 16, c.rows, a.stride, DEPTH * bits // 16)
        # W is read before the kernel ahead has ended. Outside of graphs, that kernel may be the one that made W.
        early = torch.cuda.is_current_stream_capturing()
        exchange, cut = plan.shares.exchange(work.data_ptr()), ctypes.c_int(int(c.cut))
        plan.kernel(
            plan.shares.blocks, threads(fmt, c), a, x_map, w_map, exchange, cut, early=early, shared=plan.shared
        )
    return y


class Plan(NamedTuple):
    """What launches of one kind have in common; `shared` are bytes of dynamic shared memory per block."""

    kernel: loader.CudaKernel
    shares: Shares
    shared: int


@cache
def _plan(fmt: Format, c: Tiling, m: int, n: int, k: int, device: int, dtype: torch.dtype) -> Plan:
    sms = multiprocessors(torch.device("cuda", device))
    kernel = loader.load(source(fmt, c, dtype), "scaled_mm", device)
    shared = stages(fmt, c) * stage_bytes(fmt, c) + c.output_bytes + 1024
    return Plan(kernel, shares(c, m, n, -(-k // DEPTH), sms), shared)
