"""Weight-only matmul for more than a few tokens in CUDA C++ (`wgmma.cu`): Hopper's matrix units on weights decoded in
registers, read from the canonical planes."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.elements import IntElement
from lowbit.kernels.cuda import decode, loader, small_m
from lowbit.kernels.cuda.tiles import SHARED_PER_BLOCK, Exchange, Shares, Tiling, fastest, shares, why_not_hopper
from lowbit.kernels.problem import Operand, Problem, is_batch_invariant
from lowbit.kernels.triton.launch import multiprocessors, on_device

# Outputs of a thread, halved, up to which scales multiply fp32 sums: more would spill registers.
MOST_SUMMED = 64


@dataclass(frozen=True)
class Config(Tiling):
    """One instance of the kernel.

    Attributes:
        own_order: activations are multiplied as they are, else a kernel ahead lays them out.
    """

    own_order: bool = False

    def __str__(self) -> str:
        return super().__str__() + ("" if self.own_order else " packed")


#: For every number of tokens the same sums in the same order.
INVARIANT = Config(64)


def instruction(tokens: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """C++ for `wgmma(d, a, b, add)`: m64 x n`tokens` x k16, A from registers, B from shared memory; 0: d is new."""
    operand = "f16" if dtype == torch.float16 else "bf16"
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    return (
        f"__device__ __forceinline__ void wgmma(float (&d)[{count}], const unsigned *a, unsigned long long b, "
        "int add) {\n"
        f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.s32 p, %{count + 5}, 0;\\n"\n'
        f'        "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{operand}.{operand} '
        f'{{{sums}}}, {{{a}}}, %{count + 4}, p, 1, 1, 0;\\n}}"\n'
        f'        : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));\n}}\n'
    )


@dataclass(frozen=True)
class Stages:
    """How shared memory is divided.

    Attributes:
        x_octets: octets of K per stage of activations.
        x, w: stages of the rings of activations and of weights.
        shared: bytes of dynamic shared memory.
    """

    x_octets: int
    x: int
    w: int
    shared: int


def stages(fmt: Format, c: Config) -> Stages:
    """The rings that fit: stages of weights for all of those of activations."""
    size = decode.chunk(fmt)
    # As many octets as a stage of weights has, in stages of about 16 KiB.
    x_octets = min(size // 8, max(2, (16 << 10) // (c.tokens * 64)))
    per_step, x_bytes = size // 8 // x_octets, c.tokens * 64 * x_octets
    w_bytes = c.rows * sum(width * 4 * size // fmt.element.vector // 8 for _, width, _ in fmt.element.code_planes)
    tables = 32 << 10 if decode.has_table(fmt) else 0
    budget = SHARED_PER_BLOCK // c.blocks - c.output_bytes - tables
    x, w = 2, 2
    for more_x in range(2, 25):
        more_w = max(2, -(-more_x // per_step))
        if more_x * x_bytes + more_w * w_bytes <= budget:
            x, w = more_x, more_w
    return Stages(x_octets, x, w, x * x_bytes + w * w_bytes + c.output_bytes + 1024)


@cache
def constants(fmt: Format, c: Config) -> loader.Defines | str:
    """The kernel's constants, or why there is no such instance."""
    defines = decode.constants(fmt, (16,))
    if isinstance(defines, str):
        return defines
    if c.own_order and decode.cost(fmt, True) is None:
        return "its codes need activations laid out for them"
    rings = stages(fmt, c)
    found = dict(defines)
    # Per thread of the two kinds of warpgroup.
    producer = 56 if c.warpgroups == 2 else 40
    consumer = c.registers(producer)
    # What the products need beside their sums, as the compiler's reports say.
    sums = c.row_tiles * c.columns // 2
    scales = max(1, decode.chunk(fmt) * (2 if c.own_order else 1) // found["GROUP"])
    rest = 40 * c.row_tiles + 16 * (scales if found["SCALE_MODE"] == decode.PER_CHUNK else 1)
    rest += 4 * c.row_tiles * (c.own_order and found["BITS"] == 8 and found["SCALE_MODE"] != decode.PER_ROW)
    rest += 16 * c.row_tiles * (decode.chunk(fmt) // 128)  # words of many codes, shifted once for all of them
    rest += 8 * c.row_tiles * (len(fmt.element.code_planes) - 1)
    rest += 8 * c.row_tiles * (found["ZERO"] + (found["OUTER_K"] > 0) + (found["SCALE_N"] > 1))
    if sums + rest > consumer:
        return "too many sums for the registers"
    if found["SCALE_MODE"] == decode.PER_STEP and (2 * sums > MOST_SUMMED or 2 * sums + rest >= consumer):
        found["SCALE_MODE"] = decode.PER_CHUNK
    found |= {
        "COLUMNS": c.columns, "ROW_TILES": c.row_tiles, "MIN_BLOCKS": c.blocks, "X_STAGES": rings.x,
        "X_OCTETS": rings.x_octets, "CONSUMERS": c.warpgroups, "W_STAGES": rings.w,
        "PRODUCER_REGS": producer, "CONSUMER_REGS": consumer, "SPLIT": c.split, "OWN_ORDER": int(c.own_order),
        "CLUSTER": c.cluster,
    }  # fmt: skip
    return tuple(sorted(found.items()))


@cache
def candidates(fmt: Format, m: int, k: int) -> tuple[Config, ...]:
    """The instances that may be chosen: the smallest tile that holds the tokens and the next, in every way."""
    sizes = [t for t in (16, 32, 64, 128, 256) if t >= min(m, 128)][:2]
    ways = [(False, 1), (True, 1), *((False, split) for split in (2, 4, 8))]
    orders = (False,) if decode.cost(fmt, own_order=True) is None else (True, False)
    # Three warpgroups fit 6144 rows (queries, keys and values) better than two.
    shapes = ((1, 2), (2, 2), (1, 3))
    # Clusters save power and bytes from the second level cache, neither of which fewer tokens are short of.
    clusters = (1, 2) if m > 256 else (1,)
    return tuple(
        c for t, (row_tiles, groups), blocks, (cut, split), own, cluster
        in product(sizes, shapes, (1, 2), ways, orders, clusters)
        if (blocks == 1 or (t <= 32 and groups == 2)) and (groups == 2 or 64 <= t <= 128)
        and (split == 1 or (split * 8 <= t and split * 4 * decode.chunk(fmt) <= k))
        and (cluster == 1 or (t == 256 and split == 1 and (own or not cut)))
        and not isinstance(
            constants(fmt, c := Config(t, row_tiles, cut, blocks, groups, split, cluster=cluster, own_order=own)), str
        )
    )  # fmt: skip


@cache
def config_for(fmt: Format, m: int, n: int, k: int, sms: int) -> Config:
    """The instance that a model of the time finds fastest; its constants fit measurements on an H100 and an H200."""

    def cycles(c: Config) -> float:
        """Of a multiprocessor."""
        # A step of 128 weights takes the time of decoding, or of products and most of the decoding beside them.
        # One warpgroup by itself decodes at less than half of the speed.
        decoding = 305 * (decode.cost(fmt, c.own_order) or 1)
        all_rows, multiply = decoding * c.rows / 64, c.rows * c.tokens / 16
        step = max(2.45 * decoding * c.row_tiles, c.blocks * max(all_rows, 0.955 * multiply + 0.81 * all_rows))
        step *= 1 if c.cluster == 1 else 0.92
        waves, all_steps = c.tiles(m, n) * c.split / (sms * c.blocks), k / 128 / c.split * step
        memory = fmt.nbytes(n, k) / sms / 11.7
        ahead = 0 if c.own_order else 4000 + 0.0035 * m * k
        if c.cut:
            # Sums go to memory and come back, one block after the other; and blocks that are at different places of K
            # share no cache, which matters where activations do not fit into it, and more often in many waves.
            far = 1.18 if 2 * m * k > 40 << 20 else 1.06 if waves > 6 else 1
            return ahead + max(memory, waves * all_steps * far) + 10000 + 0.445 * c.rows * c.tokens
        exchange = 2000 + 0.34 * (1 - 1 / c.split) * c.rows * c.tokens if c.split > 1 else 0
        return ahead + max(memory, math.ceil(waves) * (all_steps + 350) + exchange)

    return fastest(candidates(fmt, m, k), cycles, m, n, sms)


def why_not(problem: Problem) -> str | None:
    """The condition of the table of kernels."""
    fmt, act = problem.weight, problem.activation
    if (reason := decode.why_not_dtype(problem)) is not None:
        return reason
    if (reason := why_not_hopper(problem)) is not None:
        return reason
    if act is not None and act.grouped:
        return "scales per group of the activation change along K"
    if problem.k % decode.chunk(fmt):
        return f"K = {problem.k} is no multiple of the {decode.chunk(fmt)} weights that a lane takes"
    found = decode.constants(fmt, (16,))
    if isinstance(found, str):
        return found
    if not is_batch_invariant():
        # What was measured (docs/measured.md): codes of 8 bits need little decoding, and for very many tokens one
        # dequantization costs less than decoding for every tile.
        least = 33 if isinstance(fmt.element, IntElement) else 17
        if small_m.is_cheap(fmt) and fmt.element.bits == 8 and problem.m < least:
            return f"M = {problem.m} is below {least}, where another kernel is faster for this format"
        if problem.m > 4096 and (decode.cost(fmt, own_order=True) or math.inf) > 1.2:
            return f"M = {problem.m} is above 4096, where dequantizing in chunks is faster for this format"
    return loader.missing()


def describe(problem: Problem) -> str:
    """The instance for a problem, on a GPU with as many multiprocessors as an H100."""
    return str(_config(problem.weight, problem.m, problem.n, problem.k, 132))


def sources(problem: Problem, sms: int) -> list[loader.Source]:
    """What is compiled for a problem on a GPU with `sms` multiprocessors."""
    c = _config(problem.weight, problem.m, problem.n, problem.k, sms)
    return [source(problem.weight, c, problem.n, problem.dtype)]


def _config(fmt: Format, m: int, n: int, k: int, sms: int) -> Config:
    return INVARIANT if is_batch_invariant() else config_for(fmt, m, n, k, sms)


def source(fmt: Format, c: Config, n: int, dtype: torch.dtype) -> loader.Source:
    """What is compiled for an instance and layers of `n` rows."""
    defines = constants(fmt, c)
    assert not isinstance(defines, str), defines
    more = *c.output_defines(n), ("FP16", int(dtype == torch.float16))
    return loader.Source("wgmma.cu", (*defines, *more), instruction(c.tokens, dtype))


def wgmma(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The table's entry: `y (M, N)` from `x (M, K)`, both bf16 or fp16, and the planes."""
    x, row_scale = decode.operand(x, problem, act_scale)
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
    """`y (M, N)` from `x (M, K)`, both bf16 or fp16.

    Args:
        row_scale: fp32 `(M or 1, 1)`, multiplied into the result.
        config: instead of the rule's choice.
    """
    m, k = x.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    c = config or _config(fmt, m, n, k, multiprocessors(x.device))
    _plan(fmt, c, m, n, k, x.device.index, x.dtype).start(x, y, decode.in_order(planes, fmt), bias, row_scale)
    return y


def plan(problem: Problem, device: int) -> decode.Launch:
    """The table's entry for calls that look alike."""
    fmt, m, n, k = problem.weight, problem.m, problem.n, problem.k
    c = _config(fmt, m, n, k, multiprocessors(torch.device("cuda", device)))
    return decode.with_operand(_plan(fmt, c, m, n, k, device, problem.dtype).start, problem, device)


class Plan(NamedTuple):
    """What launches of one kind have in common.

    Attributes:
        sizes: M, N and K.
        pack, kernel: what lays out activations, if they have to be, and the product.
        pack_frames, frames: for launches of the two.
        shares: blocks of the product, and what they exchange.
        images: bytes of memory for activations that are laid out.
        y_box: tokens of a run of outputs that the copy engine writes, 0 where warps write them.
    """

    spec: str
    config: Config
    sizes: tuple[int, int, int]
    pack: loader.CudaKernel | None
    pack_frames: loader.Frames
    kernel: loader.CudaKernel
    frames: loader.Frames
    shares: Shares
    images: int
    y_box: int

    def start(
        self, x: Tensor, y: Tensor, planes: Sequence[Tensor], bias: Tensor | None, row_scale: Tensor | None
    ) -> None:
        """Launch for tensors as `decode.fill` takes them."""
        frame, c, (m, n, k) = self.frames.take(), self.config, self.sizes
        a, _, _, exchange, _ = frame.arguments
        _keep = decode.fill(frame, x, y, planes, self.spec, self.sizes, bias, row_scale)
        work = torch.empty(self.images + self.shares.sums + self.shares.flags, dtype=torch.uint8, device=x.device)
        at = work.data_ptr()
        self.shares.fill(exchange, at + self.images)
        if self.y_box:
            y_map = loader.tensor_map(a.y, m, n, self.y_box)
            frame.parameters[2] = ctypes.addressof(y_map)
        with on_device(x):
            capturing = torch.cuda.is_current_stream_capturing()
            if self.pack is None:
                tensor_map = loader.tensor_map(a.x, m, k, c.tokens // c.cluster)
                frame.parameters[1] = ctypes.addressof(tensor_map)
            else:
                packing = self.pack_frames.take()
                packing.arguments[0].value, packing.arguments[1].value = a.x, at
                self.pack.launch(packing, capturing)
                self.pack_frames.give(packing)
                a.x = at
            # Weights are read before the kernel ahead has ended. Outside of graphs, that kernel is ours or none.
            self.kernel.launch(frame, capturing or not c.own_order)
        self.frames.give(frame)


@cache
def _plan(fmt: Format, c: Config, m: int, n: int, k: int, device: int, dtype: torch.dtype) -> Plan:
    step = 4 * decode.chunk(fmt)
    steps = -(-k // step)
    images = 0 if c.own_order else 2 * -(-m // c.tokens) * c.tokens * steps * step
    code, shared = source(fmt, c, n, dtype), stages(fmt, c).shared
    pack = None if c.own_order else loader.load(code, "pack_x", device)
    kernel = loader.load(code, "wgmma_kernel", device)
    parts = shares(c, m, n, steps, kernel.resident(c.threads(), shared, c.cluster) * c.cluster)
    number, pointer = ctypes.c_int, ctypes.c_void_p

    def pack_frame() -> loader.Frame:
        of_tile = steps * step // 64  # images of 64 weights each
        # A thread for every 16 bytes.
        return loader.Frame(-(-images // 4096), 256, 0, (pointer(), pointer(), number(m), number(k), number(of_tile)))

    def frame() -> loader.Frame:
        maps = loader.TensorMap(), loader.TensorMap()
        arguments = decode.Arguments(), *maps, Exchange(), number(int(c.cut))
        return loader.Frame(parts.blocks, c.threads(), shared, arguments)

    frames = loader.Frames(pack_frame), loader.Frames(frame)
    return Plan(fmt.spec, c, (m, n, k), pack, frames[0], kernel, frames[1], parts, images, c.output_box(n))
