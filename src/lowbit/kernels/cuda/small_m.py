"""Weight-only matmul for up to 16 tokens in CUDA C++ (`small_m.cu`): reads the canonical planes once, at the speed of
memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit.formats.base import Format
from lowbit.formats.elements import FloatElement, IntElement
from lowbit.kernels.cuda import decode, loader
from lowbit.kernels.problem import Operand, Problem, capability
from lowbit.kernels.triton.launch import multiprocessors, on_device

MAX_TOKENS = 16
WARPS, ROWS, STAGES = 8, 16, 4  # as in small_m.cu
# Dynamic shared memory with which two blocks fit a multiprocessor of Hopper, beside two buffers of sums.
SHARED_OF_TWO = (113 << 10) - (10 << 10)
SHARED_OF_THREE = (75 << 10) - (10 << 10)
SUMS_BYTES = WARPS * ROWS * 8 * 4  # of a tile, for eight tokens


def room(arch: tuple[int, int]) -> int:
    """Dynamic shared memory that a block may take beside the 20 KiB which the source declares."""
    if arch[0] in (9, 10):
        return 196 << 10
    return (163 if arch == (8, 0) else 99) - 20 << 10


@cache
def cluster_for(fmt: Format, m: int, n: int, k: int, sms: int, arch: tuple[int, int]) -> int:
    """Blocks that share K: what takes the fewest instructions of the busiest warp, counted in the machine code."""
    segments, tiles = -(-k // decode.chunk(fmt, 64)), -(-n // ROWS)

    def cost(cluster: int) -> float:
        resident = sms * (2 if shared_bytes(fmt, m, k, cluster) <= SHARED_OF_TWO else 1)
        rounds = -(-tiles // max(1, min(tiles, resident // cluster)))
        per_tile = math.ceil(math.ceil(segments / cluster) / WARPS)
        # A block that has a multiprocessor for itself runs faster, but not twice as fast. Blocks of a cluster wait for
        # each other at every tile.
        return rounds * (per_tile * 170 + (60 if cluster == 1 else 500)) * (2 if resident > sms else 1.3)

    fitting = [c for c in (1, 2, 4, 8) if c <= segments and (c == 1 or arch >= (9, 0))]
    fitting = [c for c in fitting if shared_bytes(fmt, m, k, c) <= room(arch)] or [max(fitting)]
    return min(fitting, key=cost)


def shared_bytes(fmt: Format, m: int, k: int, cluster: int) -> int:
    """Dynamic shared memory of a block: its share of the activations, and the rings of its warps."""
    segment = decode.chunk(fmt, 64)
    row = sum(width * segment // fmt.element.vector // 8 for _, width, _ in fmt.element.code_planes)
    segments = math.ceil(math.ceil(k / segment) / cluster)
    return segments * segment * 2 * m + WARPS * STAGES * ROWS * row


def is_cheap(fmt: Format) -> bool:
    """Whether the portable kernel decodes a format with few instructions: integers of 4 and 8 bits and 8-bit floats."""
    e, group = fmt.element, fmt.plane("scale").k
    by_row = group is None or group % 128 == 0
    if isinstance(e, IntElement):
        return e.bits in (4, 8) and (by_row or group == 32) and not fmt.has("zero_point")
    return isinstance(e, FloatElement) and e.bits == 8 and by_row


def why_not(problem: Problem) -> str | None:
    """The condition of the table of kernels."""
    fmt, act = problem.weight, problem.activation
    # Measured on an H100 (docs/measured.md): above 8 tokens the activations come from L2 too often.
    most = 8 if is_cheap(fmt) or problem.arch == (9, 0) else MAX_TOKENS
    if problem.m > most:
        return f"M = {problem.m} is above {most}, where other kernels are faster"
    if (reason := decode.why_not_dtype(problem)) is not None:
        return reason
    if problem.arch is not None and problem.arch < (8, 0):
        return f"needs compute capability 8.0, this GPU has {problem.arch[0]}.{problem.arch[1]}"
    if act is not None and act.grouped:
        return "scales per group of the activation change along K"
    if problem.k % decode.chunk(fmt):
        return f"K = {problem.k} is no multiple of the {decode.chunk(fmt)} weights that a lane takes"
    found = decode.constants(fmt)
    if isinstance(found, str):
        return found
    arch = problem.arch or (9, 0)
    shared = shared_bytes(fmt, problem.m, problem.k, cluster_for(fmt, problem.m, problem.n, problem.k, 132, arch))
    if shared > room(arch):
        return f"{problem.m} x {problem.k} activations need {shared >> 10} KiB of shared memory"
    return loader.missing()


def describe(problem: Problem) -> str:
    """The instance for a problem, on a GPU with as many multiprocessors as an H100."""
    arch = problem.arch or (9, 0)
    return f"cluster {cluster_for(problem.weight, problem.m, problem.n, problem.k, 132, arch)}"


def small_m(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The table's entry: `y (M, N)` from `x (M, K)`, both bf16 or fp16, and the planes."""
    x, row_scale = decode.operand(x, problem, act_scale)
    return launch(x, planes, problem.weight, problem.n, bias, row_scale)


def small_m_silu_mul(
    x: Tensor | Operand, planes: Mapping[str, Tensor], bias: Tensor | None, problem: Problem, act_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """`silu(gate) * up`, `(M, N / 2)`, for a weight whose first half are the rows of the gate, in the same kernel."""
    x, row_scale = decode.operand(x, problem, act_scale)
    return launch(x, planes, problem.weight, problem.n, bias, row_scale, gated=True)


def launch(
    x: Tensor,
    planes: Mapping[str, Tensor],
    fmt: Format,
    n: int,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    cluster: int | None = None,
    gated: bool = False,
) -> Tensor:
    """`y (M, N)` from `x (M, K)`, both bf16 or fp16, M <= 16.

    Args:
        row_scale: fp32 `(M or 1, 1)`, multiplied into the result.
        cluster: 1, 2, 4 or 8 blocks that share K, instead of the rule's choice.
        gated: the result is `silu(gate) * up`, `(M, N / 2)`, of the two halves of the outputs.
    """
    m, k = x.shape
    y = torch.empty(m, n // 2 if gated else n, dtype=x.dtype, device=x.device)
    with on_device(x):
        found = _plan(fmt, m, n, k, x.device.index, cluster, x.dtype, gated)
    found.start(x, y, decode.in_order(planes, fmt), bias, row_scale)
    return y


def plan(problem: Problem, device: int) -> decode.Launch:
    """The table's entry for calls that look alike."""
    with torch.cuda.device(device):
        found = _plan(problem.weight, problem.m, problem.n, problem.k, device, None, problem.dtype, False)
    return decode.with_operand(found.start, problem, device)


def sources(problem: Problem, sms: int) -> list[loader.Source]:
    """What is compiled for a problem on a GPU of its architecture with `sms` multiprocessors."""
    defines, _, _ = _instance(
        problem.weight, problem.m, problem.n, problem.k, sms, problem.arch or (9, 0), None, problem.dtype, False
    )
    return [loader.Source("small_m.cu", defines)]


def _instance(
    fmt: Format, m: int, n: int, k: int, sms: int, arch: tuple[int, int], cluster: int | None, dtype: torch.dtype,
    gated: bool,
) -> tuple[loader.Defines, int, int]:  # fmt: skip
    """The kernel's constants, blocks that share K, and bytes of shared memory."""
    cluster = cluster or cluster_for(fmt, m, n, k, sms, arch)
    shared = shared_bytes(fmt, m, k, cluster)
    more = {"TOKEN_TILES": 1 if m <= 8 else 2, "CLUSTER": cluster, "WHOLE": int(k % decode.chunk(fmt, 64) == 0)}
    more |= {"BUFFERS": 2, "RESIDENT": 2, "FP16": int(dtype == torch.float16), "GATED": int(gated)}
    if decode.has_table(fmt):
        more["COPIES"] = 32 if m <= 8 and shared + (32 << 10) <= SHARED_OF_TWO < room(arch) else 8
    elif cluster == 1 and m <= 8 and shared + 2 * SUMS_BYTES <= SHARED_OF_TWO:
        more["BUFFERS"] = 4
        # Fewer registers for each of three blocks pay where there are tiles for them, and one plane to decode.
        if -(-n // ROWS) > 2 * sms and len(fmt.element.code_planes) == 1 and shared + 2 * SUMS_BYTES <= SHARED_OF_THREE:
            more["RESIDENT"] = 3
    return tuple(sorted((dict(decode.defines_of(fmt)) | more).items())), cluster, shared


class Plan(NamedTuple):
    """What launches of one kind have in common.

    Attributes:
        sizes: M, N and K.
    """

    kernel: loader.CudaKernel
    frames: loader.Frames
    spec: str
    sizes: tuple[int, int, int]

    def start(
        self, x: Tensor, y: Tensor, planes: Sequence[Tensor], bias: Tensor | None, row_scale: Tensor | None
    ) -> None:
        """Launch for tensors as `decode.fill` takes them."""
        frame = self.frames.take()
        _keep = decode.fill(frame, x, y, planes, self.spec, self.sizes, bias, row_scale)
        with on_device(x):
            self.kernel.launch(frame, torch.cuda.is_current_stream_capturing())
        self.frames.give(frame)


@cache
def _plan(
    fmt: Format, m: int, n: int, k: int, device: int, cluster: int | None, dtype: torch.dtype, gated: bool
) -> Plan:
    sms, arch = multiprocessors(torch.device("cuda", device)), capability(device)
    defines, cluster, shared = _instance(fmt, m, n, k, sms, arch, cluster, dtype, gated)
    kernel = loader.load(loader.Source("small_m.cu", defines), "small_m", device)
    resident = kernel.resident(32 * WARPS, shared, cluster)
    grid = min(-(-n // ROWS), resident) * cluster
    # Half of the grid where two blocks share a multiprocessor.
    half = sms if cluster == 1 and grid == 2 * sms else 0

    def frame() -> loader.Frame:
        return loader.Frame(grid, 32 * WARPS, shared, (decode.Arguments(), ctypes.c_int(half)))

    return Plan(kernel, loader.Frames(frame), fmt.spec, (m, n, k))
