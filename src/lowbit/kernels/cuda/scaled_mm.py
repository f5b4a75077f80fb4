"""8-bit codes times 8-bit codes on Hopper's matrix units (`scaled_mm.cu`), for any number of tokens."""

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
from lowbit.formats.elements import IntElement
from lowbit.kernels.cuda import decode, loader
from lowbit.kernels.cuda.tiles import SHARED_PER_BLOCK, Shares, Tiling, fastest, shares, why_not_hopper
from lowbit.kernels.problem import Operand, Problem
from lowbit.kernels.triton.launch import multiprocessors, on_device

#: Codes of K per stage.
DEPTH = 128


def instruction(tokens: int, kind: str) -> str:
    """C++ for `wgmma(d, a, b, add)`: m64 x n`tokens` x k32 of `kind`, both from shared memory; 0: d is new."""
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    integer = kind == "s8"
    constraint, value, result = ("+r", "int", "s32") if integer else ("+f", "float", "f32")
    outputs = ", ".join(f'"{constraint}"(d[{i}])' for i in range(count))
    signs = "" if integer else ", 1, 1"
    return (
        f"__device__ __forceinline__ void wgmma({value} (&d)[{count}], unsigned long long a, unsigned long long b, "
        "int add) {\n"
        f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.s32 p, %{count + 2}, 0;\\n"\n'
        f'        "wgmma.mma_async.sync.aligned.m64n{tokens}k32.{result}.{kind}.{kind} '
        f'{{{sums}}}, %{count}, %{count + 1}, p{signs};\\n}}"\n'
        f'        : {outputs} : "l"(a), "l"(b), "r"(add));\n}}\n'
    )


def kind(fmt: Format) -> str | None:
    """PTX's name of a format's codes, as operands of a product."""
    if isinstance(fmt.element, IntElement):
        return "s8"
    return {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}.get(fmt.planes[0].dtype)


def stage_bytes(c: Tiling) -> int:
    """Of shared memory for `DEPTH` codes of K of both operands."""
    return (c.rows + c.tokens) * DEPTH


def stages(c: Tiling) -> int:
    """That fit the shared memory of a block."""
    room = SHARED_PER_BLOCK // c.blocks - c.output_bytes - 1024
    return min(room // stage_bytes(c), 16)


@cache
def constants(fmt: Format, c: Tiling) -> loader.Defines | str:
    """The kernel's constants, or why there is no such instance."""
    found = decode.constants(fmt, (16,))
    if isinstance(found, str):
        return found
    integer = kind(fmt) == "s8"
    # float8 adds a part of its own to the sums, for one tile of 64 rows at a time.
    sums = c.row_tiles * c.tokens // 2 + (0 if integer else c.tokens // 2)
    # Of a multiprocessor's quarter, which has a warp of every warpgroup and one that brings operands.
    if sums + 32 > 512 // (c.warpgroups + 1) // c.blocks // 8 * 8:
        return "too many sums for the registers"
    if stages(c) < 3:
        return "too few stages fit the shared memory"
    defines = dict(found) | {
        "AS_CODES": 1, "INTEGER": int(integer), "TOKENS": c.tokens, "ROW_TILES": c.row_tiles, "CONSUMERS": c.warpgroups,
        "SPLIT": c.split, "MIN_BLOCKS": c.blocks, "STAGES": stages(c),
    }  # fmt: skip
    return tuple(sorted(defines.items()))


def source(fmt: Format, c: Tiling, dtype: torch.dtype) -> loader.Source:
    """What is compiled for an instance."""
    defines, codes = constants(fmt, c), kind(fmt)
    assert not isinstance(defines, str), defines
    assert codes is not None, fmt
    return loader.Source(
        "scaled_mm.cu", (*defines, ("FP16", int(dtype == torch.float16))), instruction(c.tokens, codes)
    )


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

    return fastest(candidates(fmt, m, k), cycles, m, n, sms)


def why_not(problem: Problem) -> str | None:
    """The condition of the table of kernels, for formats of 8 bits whose scales do not change along K."""
    fmt = problem.weight
    if (reason := why_not_hopper(problem)) is not None:
        return reason
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"written for bf16 and fp16, got {problem.dtype}"
    if problem.k % 16:
        return f"rows of the weight start at multiples of 16 bytes, got K = {problem.k}"
    if kind(fmt) is None:
        return f"Hopper has no products of {fmt.element}"
    found = decode.constants(fmt, (16,))
    if isinstance(found, str):
        return found
    if kind(fmt) != "s8" and problem.m > 128:
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
        w_map = loader.tensor_map(a.codes, n, k // 2, c.rows, a.stride)
        # W is read before the kernel ahead has ended. Outside of graphs, that kernel may be the one that made W.
        early = torch.cuda.is_current_stream_capturing()
        exchange, cut = plan.shares.exchange(work.data_ptr()), ctypes.c_int(int(c.cut))
        threads = 128 * c.warpgroups + 64
        plan.kernel(plan.shares.blocks, threads, a, x_map, w_map, exchange, cut, early=early, shared=plan.shared)
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
    shared = stages(c) * stage_bytes(c) + c.output_bytes + 1024
    return Plan(kernel, shares(c, m, n, -(-k // DEPTH), sms), shared)
