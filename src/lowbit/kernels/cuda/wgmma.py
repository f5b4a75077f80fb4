"""Weight-only matmul for more than a few tokens in CUDA C++ (`wgmma.cu`): Hopper's matrix units on weights decoded in
registers, read from the canonical planes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.kernels.cuda import loader, small_m
from lowbit.kernels.problem import Problem
from lowbit.kernels.triton.launch import multiprocessors, on_device

THREADS = 384
# What a block may use, less what lies beside the rings (barriers and tables).
SHARED_PER_BLOCK = 216 << 10


@dataclass(frozen=True)
class Config:
    """One instance of the kernel.

    Attributes:
        tokens: columns of a tile, a multiple of 8 up to 256.
        row_tiles: of 128 rows of W per block, 1 or 2.
        split: blocks of a cluster that share K: 1, 2, 4 or 8.
        blocks: resident per multiprocessor, 1 or 2.
    """

    tokens: int
    row_tiles: int = 1
    split: int = 1
    blocks: int = 1

    def __str__(self) -> str:
        return f"{128 * self.row_tiles}x{self.tokens} split {self.split} blocks {self.blocks}"


def instruction(tokens: int) -> str:
    """C++ for `wgmma(acc, a, descriptor)`: m64 x n`tokens` x k16, A from registers, B from shared memory."""
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    return (
        f"__device__ __forceinline__ void wgmma(float (&d)[{count}], const unsigned *a, unsigned long long b) {{\n"
        '    asm volatile("{\\n.reg .pred p;\\nsetp.eq.u32 p, 1, 1;\\n"\n'
        f'        "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.bf16.bf16 '
        f'{{{sums}}}, {{{a}}}, %{count + 4}, p, 1, 1, 0;\\n}}"\n'
        f'        : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));\n}}\n'
    )


def stages(fmt: Format, c: Config) -> tuple[int, int, int]:
    """Stages of the rings of activations and of weights that fit, and the bytes of dynamic shared memory."""
    size = small_m.chunk(fmt)
    per_stage = 4 * size // 64
    x_bytes, rows = c.tokens * 128, 128 * c.row_tiles
    w_bytes = rows * sum(width * 4 * size // fmt.element.vector // 8 for _, width, _ in fmt.element.code_planes)
    budget = SHARED_PER_BLOCK // c.blocks - (8 << 10)
    best = (2, 2)
    for x_stages in range(2, 25):
        w_stages = max(2, -(-x_stages // per_stage))
        if x_stages * x_bytes + w_stages * w_bytes <= budget:
            best = (x_stages, w_stages)
    sums = c.tokens * (rows + 4) * 4
    return *best, max(best[0] * x_bytes + best[1] * w_bytes, sums) + 1024


@cache
def constants(fmt: Format, c: Config) -> loader.Defines | str:
    """The kernel's constants, or why there is no such instance."""
    defines = small_m.constants(fmt)
    if isinstance(defines, str):
        return defines
    if c.row_tiles * c.tokens > 256:
        return "too many sums for the registers"
    x_stages, w_stages, _ = stages(fmt, c)
    found = dict(defines)
    if found["SCALE_MODE"] == 1:
        found["SCALE_MODE"] = 2
    # Registers per thread of the two kinds of warpgroup, out of 65536 per multiprocessor.
    producer, consumer = (56, 224) if c.blocks == 1 else (56, 88)
    found |= {
        "TOKENS": c.tokens, "ROW_TILES": c.row_tiles, "SPLIT": c.split, "MIN_BLOCKS": c.blocks, "X_STAGES": x_stages,
        "W_STAGES": w_stages, "PRODUCER_REGS": producer, "CONSUMER_REGS": consumer,
    }  # fmt: skip
    return tuple(sorted(found.items()))


def config_for(fmt: Format, m: int, n: int, k: int, sms: int) -> Config:
    """Tiles from the shape alone."""
    tokens = next((t for t in (16, 32, 64, 128) if m <= t), 128)
    row_tiles = 2 if n >= 128 * sms else 1
    tiles = -(-n // (128 * row_tiles)) * -(-m // tokens)
    blocks = 2 if row_tiles == 1 and tokens <= 64 else 1
    split, steps = 1, -(-k // (4 * small_m.chunk(fmt)))
    while split < 8 and tiles * split * 2 <= sms * blocks and steps >= 4 * split:
        split *= 2
    return Config(tokens, row_tiles, split, blocks)


def why_not(problem: Problem) -> str | None:
    """The condition of the table of kernels."""
    fmt, act = problem.weight, problem.activation
    if problem.dtype != torch.bfloat16:
        return f"written for bf16, got {problem.dtype}"
    if problem.arch is not None and problem.arch != (9, 0):
        return f"needs Hopper's matrix units (9.0), this GPU has {problem.arch[0]}.{problem.arch[1]}"
    if act is not None and act.grouped:
        return "scales per group of the activation change along K"
    if problem.k % small_m.chunk(fmt):
        return f"K = {problem.k} is no multiple of the {small_m.chunk(fmt)} weights that a lane takes"
    reason = small_m.constants(fmt)
    return reason if isinstance(reason, str) else loader.missing()


def wgmma(
    x: Tensor, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None
) -> Tensor:
    """The table's entry: `y (M, N)` bf16 from `x (M, K)` bf16 and the planes; a quantized activation is split first."""
    row_scale = None
    if problem.activation is not None:
        from lowbit.kernels.triton import act_quant

        x, row_scale = act_quant.split(x, problem.activation, act_scale)
    return launch(x, planes, problem.weight, problem.n, bias, row_scale)


def launch(
    x: Tensor,
    planes: Mapping[str, Tensor],
    fmt: Format,
    n: int,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """`y (M, N)` bf16 from `x (M, K)` bf16.

    Args:
        row_scale: fp32 `(M or 1, 1)`, multiplied into the result.
        config: instead of the rule's choice.
    """
    m, k = x.shape
    y = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
    c = config or config_for(fmt, m, n, k, multiprocessors(x.device))
    pack, kernel = _kernels(fmt, c, x.device.index)
    a, _keep = small_m.arguments(x, y, planes, fmt, bias, row_scale)
    step = 4 * small_m.chunk(fmt)
    stages = -(-k // step) * step // 64
    token_tiles = -(-m // c.tokens)
    images = torch.empty(token_tiles * stages * c.tokens * 64, dtype=torch.bfloat16, device=x.device)
    packing = (
        ctypes.c_void_p(a.x), ctypes.c_void_p(images.data_ptr()), ctypes.c_int(m), ctypes.c_int(k), ctypes.c_int(stages)
    )  # fmt: skip
    with on_device(x):
        pack(-(-images.numel() // (8 * 256)), 256, *packing)
        a.x = images.data_ptr()
        kernel(-(-n // (128 * c.row_tiles)) * token_tiles * c.split, THREADS, a, early=True)
    return y


@cache
def _kernels(fmt: Format, c: Config, device: int) -> tuple[loader.CudaKernel, loader.CudaKernel]:
    """The kernel that lays out activations, and the product."""
    defines = constants(fmt, c)
    assert not isinstance(defines, str), defines
    prelude, (*_, shared) = instruction(c.tokens), stages(fmt, c)
    pack = loader.load("wgmma.cu", "pack_x", defines, device, prelude)
    return pack, loader.load("wgmma.cu", "wgmma_kernel", defines, device, prelude, shared)
