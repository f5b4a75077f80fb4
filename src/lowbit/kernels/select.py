"""Which kernel runs: an ordered table of kernels with their conditions, searched by a pure function.

`select(Problem) -> Choice` names the first kernel that accepts the problem and says why each one before it did not.
A new kernel is an entry in `KERNELS`, with its conditions in `reject`; nothing branches on formats elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Literal

import torch

from lowbit.errors import see
from lowbit.formats.base import Format
from lowbit.kernels.cpu import native, packed
from lowbit.kernels.cuda import act_quant, loader, scaled_mm, small_m, wgmma
from lowbit.kernels.cuda.decode import Launch
from lowbit.kernels.cuda.loader import Source
from lowbit.kernels.problem import Problem, UnsupportedError, arch_of, is_batch_invariant
from lowbit.kernels.triton.launch import multiprocessors


@dataclass(frozen=True)
class Kernel:
    """An entry of the table.

    Attributes:
        run: `module:function` below `lowbit.kernels`, imported at the first call.
        plan: likewise, a function of a problem and a GPU's index: `run` for calls that differ in nothing but tensors,
            with all that they have in common found once.
        reject: why a problem is not for this kernel, or None.
        by_name_only: never chosen, only run by `use_kernel`.
        batch_invariant: whether it can multiply so that a row's bits do not depend on the others.
        config: how it would launch for a problem that it takes, in words.
        sources: the CUDA C++ that it compiles for a problem, on a GPU with so many multiprocessors.
        silu_mul: like `run`, a function that also takes `silu(gate) * up` of the two halves of the outputs.
        operand: what an activation has to be that comes to it quantized: "levels" in bf16, or the "codes" of its
            format; empty where the kernel quantizes it itself.
    """

    name: str
    device: str | None
    run: str
    reject: Callable[[Problem], str | None]
    by_name_only: bool = False
    batch_invariant: bool = False
    config: Callable[[Problem], str] | None = None
    sources: Callable[[Problem, int], list[Source]] | None = None
    silu_mul: str | None = None
    operand: Literal["", "levels", "codes"] = ""
    plan: str | None = None

    def why_not(self, p: Problem) -> str | None:
        if self.device is not None and self.device != p.device:
            return f"runs on {self.device}, not {p.device}"
        return self.reject(p)

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return _import_function(self.run)

    @property
    def silu_mul_function(self) -> Callable[..., torch.Tensor] | None:
        return None if self.silu_mul is None else _import_function(self.silu_mul)


@dataclass(frozen=True)
class Choice:
    """What `select` decided: the kernel, those tried before it with the reasons against them, how it launches."""

    kernel: Kernel
    rejected: tuple[tuple[str, str], ...] = field(default=())
    config: str = ""


@cache
def _import_function(path: str) -> Callable[..., Any]:
    module, function = path.split(":")
    return getattr(importlib.import_module(f"lowbit.kernels.{module}"), function)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _accept(p: Problem) -> str | None:
    return None


def _triton(p: Problem) -> str | None:
    if p.arch is not None and p.arch < (8, 0):
        return f"needs compute capability 8.0, this GPU has {p.arch[0]}.{p.arch[1]}"
    return triton_missing()


def _weight_only(p: Problem) -> str | None:
    # Codes that one load brings are decoded fast enough for more tokens.
    most = 128 if len(p.weight.code_planes) == 1 and p.weight.element.vector == 1 else 32
    if p.m > most:
        return f"M = {p.m} is above {most}, where dequantizing in chunks is faster"
    return _triton(p)


def _whole_codes(side: str, fmt: Format) -> str | None:
    """Why one side of a matmul is not 8-bit codes with a scale per row or tensor, and nothing else."""
    if fmt.element.vector != 1 or fmt.element.bits != 8 or fmt.has("codebook"):
        return f"the {side} has no 8-bit codes"
    if fmt.has("zero_point"):
        return f"the {side} has zero points"
    if fmt.plane("scale").k is not None or fmt.plane("scale").n not in (None, 1):
        return f"the {side}'s scales are not per row or per tensor"
    if fmt.has("outer_scale") or fmt.has("scale_offset"):
        return f"the {side} has two levels of scales"
    return None


def _eight_bit(p: Problem) -> str | None:
    """Conditions common to matmuls whose two operands are whole 8-bit codes with scales per row or tensor."""
    if p.activation is None:
        return "the activation is not quantized"
    reason = _whole_codes("activation", p.activation.format) or _whole_codes("weight", p.weight)
    if reason is None and p.activation.format.element != p.weight.element:
        return "activation and weight have different elements"
    # A product is at most 2**14.
    if reason is None and p.weight.planes[0].dtype == torch.int8 and p.k >= 1 << 17:
        return f"its int32 sums can overflow from K = 131072, got {p.k}"
    return reason


def _scaled_mm(p: Problem) -> str | None:
    reason = _eight_bit(p)
    if reason:
        return reason
    if p.weight.planes[0].dtype != torch.float8_e4m3fn:
        return "only float8_e4m3 x float8_e4m3"
    if p.arch is None or p.arch < (8, 9):
        return "needs compute capability 8.9"
    if p.k % 16 or p.n % 16:
        return f"needs N and K divisible by 16, got N = {p.n}, K = {p.k}"
    if p.dtype == torch.float32:
        return "its output is bf16 or fp16"
    return None


def _triton_scaled_mm(p: Problem) -> str | None:
    reason = _eight_bit(p)
    if reason:
        return reason
    if p.weight.planes[0].dtype != torch.int8 and (p.arch is None or p.arch < (8, 9)):
        return "matrix units multiply float8 from compute capability 8.9"
    return _triton(p)


def _cuda_scaled_mm(p: Problem) -> str | None:
    # Activations are quantized before this one runs, by a Triton kernel where that in CUDA C++ does not take them.
    return scaled_mm.why_not(p) or triton_missing()


def _cpu_int8(p: Problem) -> str | None:
    if p.activation is not None:
        return "the activation is quantized"
    if p.weight.planes[0].dtype != torch.int8 or p.weight.plane("scale").k is not None:
        return "only symmetric int8 with scales per row or per tensor"
    if p.dtype != torch.bfloat16:
        return f"only bf16 activations are fast, got {p.dtype}"
    if p.k % 32:
        return f"needs K % 32 == 0, got K = {p.k}"
    if p.m > 32:
        return f"M = {p.m} is above 32, where one dequantization per block is faster"
    return None


def _cpu_int_mm(p: Problem) -> str | None:
    if reason := _eight_bit(p):
        return reason
    if p.weight.planes[0].dtype != torch.int8:
        return "only int8 x int8"
    return None if packed.multiplies_int8() else "the CPU has no exact products of bytes (VNNI)"


def _small_m(p: Problem) -> str | None:
    # Activations are quantized before this one runs, by a Triton kernel where that in CUDA C++ does not take them.
    return small_m.why_not(p) or (triton_missing() if p.act else None)


def _wgmma(p: Problem) -> str | None:
    return wgmma.why_not(p) or (triton_missing() if p.act else None)


def _native(p: Problem) -> str | None:
    return native.missing()


KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "cuda_small_m",
        "cuda",
        "cuda.small_m:small_m",
        _small_m,
        config=small_m.describe,
        sources=small_m.sources,
        silu_mul="cuda.small_m:small_m_silu_mul",
        operand="levels",
        plan="cuda.small_m:plan",
    ),
    Kernel(
        "cuda_scaled_mm",
        "cuda",
        "cuda.scaled_mm:scaled_mm",
        _cuda_scaled_mm,
        config=scaled_mm.describe,
        sources=scaled_mm.sources,
        operand="codes",
        plan="cuda.scaled_mm:plan",
    ),
    Kernel("cublas_scaled_mm", "cuda", "scaled_mm:cublas_scaled_mm", _scaled_mm, operand="codes"),
    Kernel("triton_scaled_mm", "cuda", "triton.scaled_mm:scaled_mm", _triton_scaled_mm, operand="codes"),
    Kernel(
        "cuda_wgmma",
        "cuda",
        "cuda.wgmma:wgmma",
        _wgmma,
        batch_invariant=True,
        config=wgmma.describe,
        sources=wgmma.sources,
        operand="levels",
        plan="cuda.wgmma:plan",
    ),
    Kernel("triton_weight_only", "cuda", "triton.weight_only:weight_only", _weight_only, operand="levels"),
    Kernel("triton_chunked", "cuda", "triton.dequant:chunked", _triton, operand="levels"),
    Kernel("aten_int8_packed", "cpu", "cpu.packed:int8_packed", _cpu_int8),
    Kernel("aten_int_mm", "cpu", "cpu.packed:int_mm", _cpu_int_mm, operand="codes"),
    Kernel("cpu_native", "cpu", "cpu.native:native", _native, operand="levels"),
    Kernel("torch_blocked", None, "blocked:blocked", _accept, operand="levels"),
    Kernel("reference", None, "reference:reference", _accept, by_name_only=True),
)

# Gradients of the input, `f(grad (M, N), planes, fmt, n, k) -> (M, K)`; the first that accepts runs.
GRADIENTS: tuple[Kernel, ...] = (
    Kernel("triton_dgrad", "cuda", "triton.dequant:dgrad", _triton),
    Kernel("torch_blocked_dgrad", None, "blocked:blocked_dgrad", _accept),
)

_forced: ContextVar[str | None] = ContextVar("lowbit_kernel", default=None)


@contextlib.contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Run every lowbit matmul in this context with the kernel `name`, or fail with the reason it does not apply.

    The only way to the reference kernel, which dequantizes whole weights in fp64.
    """
    names = [k.name for k in KERNELS]
    if name not in names:
        raise ValueError(f"unknown kernel {name!r}; kernels: {', '.join(names)}" + see("unknown-kernel"))
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def select(problem: Problem) -> Choice:
    """The first kernel of the table that accepts `problem`, or the one named by `use_kernel`.

    Raises:
        UnsupportedError: none does; the message lists each kernel with its reason.
    """
    return _select(problem, _forced.get(), is_batch_invariant())


def planned(m: int, n: int, k: int, spec: str, act: str, dtype: torch.dtype, device: torch.device) -> Launch | None:
    """The chosen kernel's `plan` for such a call on a GPU, remembered; None where it has none.

    It holds no tensor. Its key is what `select` is asked, in parts: a `Problem` takes longer to make than to look up.
    """
    return _planned(m, n, k, spec, act, dtype, device, _forced.get(), is_batch_invariant())


@lru_cache(maxsize=4096)
def _planned(
    m: int, n: int, k: int, spec: str, act: str, dtype: torch.dtype, device: torch.device, forced: str | None,
    invariant: bool,
) -> Launch | None:  # fmt: skip
    problem = Problem(m, n, k, spec, act, dtype, device.type, arch_of(device))
    plan = _select(problem, forced, invariant).kernel.plan
    return None if plan is None else _import_function(plan)(problem, device.index)


def select_gradient(problem: Problem) -> Kernel:
    """The kernel for the gradient of the input of `problem`."""
    return next(kernel for kernel in GRADIENTS if kernel.why_not(problem) is None)


@lru_cache(maxsize=4096)
def _select(problem: Problem, forced: str | None, invariant: bool) -> Choice:
    rejected: list[tuple[str, str]] = []
    for kernel in KERNELS:
        if forced is not None and kernel.name != forced:
            continue
        reason = kernel.why_not(problem)
        if reason is None and invariant and not kernel.batch_invariant:
            reason = "the order of its sums depends on M, and lowbit.batch_invariant() is in force"
        if reason is None and kernel.by_name_only and forced is None:
            reason = f"dequantizes whole weights; ask for it with lowbit.use_kernel({kernel.name!r})"
        if reason is None:
            return Choice(kernel, tuple(rejected), kernel.config(problem) if kernel.config else "")
        rejected.append((kernel.name, reason))
    lines = "\n".join(f"  {name}: {reason}" for name, reason in rejected)
    raise UnsupportedError(f"no kernel for {problem}:\n{lines}" + see("no-kernel"))


def compile_ahead(problems: Iterable[tuple[torch.device, Problem]]) -> None:
    """Compile the CUDA C++ of these problems on all cores, before their runs need it one after the other."""
    sources: dict[tuple[int, int], list[Source]] = {}
    for device, problem in problems:
        kernel = select(problem).kernel
        if problem.arch is not None:
            sms, found = multiprocessors(device), sources.setdefault(problem.arch, [])
            found += act_quant.sources(problem, kernel.operand, sms)
            found += kernel.sources(problem, sms) if kernel.sources is not None else []
    for arch, found in sources.items():
        loader.compile_ahead(found, arch)
