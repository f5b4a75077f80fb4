"""The roofline of ReLU -> Linear: how long a layer has to take on a machine whose ceilings were measured.

A model of bytes and operations, nothing else (Williams, Waterman and Patterson, "Roofline", CACM 2009): a kernel takes
one launch, and after it the longer of moving its bytes and doing its operations. Two kernels make the layer: the
ReLU, which quantizes what it writes where the scheme quantizes activations, and the matmul. Times are seconds.

Columns carry the names of torchao's float8_inference_roofline.py, with `q` where it says `fp8`, since schemes are many:
`r_` is what the roofline expects, `b_` what the benchmark observed, `gemm` the matmul, `ovhd` the kernel before it,
`e2e` both, and `spdp` the speed-up over bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from lowbit.configs import Scheme
from lowbit.formats.fp8 import Float8Format
from lowbit.formats.int import IntFormat

BF16 = "bf16"
BF16_BYTES = 2


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do, measured on it.

    Attributes:
        reads: bytes and the seconds of a kernel that reads as many, its launch included; ascending.
        peaks: operations per second (a multiplication and an addition are two) of large square matmuls, by unit:
            `bf16`, and `int8` and `float8` where there are such.
        launch_s: seconds of an empty kernel between others.
        missing: units that could not be measured, and why.
    """

    reads: tuple[tuple[int, float], ...]
    peaks: dict[str, float]
    launch_s: float
    missing: dict[str, str]

    def move_s(self, nbytes: float) -> float:
        """Seconds of moving so many bytes, without a launch: on the straight line, in logarithms, between the sizes
        that were measured. Beyond the largest its bandwidth holds, below the smallest its time."""
        points = [(size, max(seconds - self.launch_s, 0.0)) for size, seconds in self.reads]
        (least, first), (most, last) = points[0], points[-1]
        if nbytes <= least:
            return first
        if nbytes >= most:
            return last * nbytes / most
        (a, ta), (b, tb) = next(pair for pair in pairwise(points) if nbytes <= pair[1][0])
        share = math.log(nbytes / a) / math.log(b / a)
        if ta == 0 or tb == 0:
            return ta + (tb - ta) * share
        return float(ta * (tb / ta) ** share)

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the largest read."""
        size, seconds = self.reads[-1]
        return size / (seconds - self.launch_s)


@dataclass(frozen=True)
class Shape:
    """One layer and its tokens: `y (M, N) = relu(x (M, K)) @ W (N, K).T`."""

    m: int
    k: int
    n: int
    name: str = ""

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n


def unit_of(scheme: Scheme, ceilings: Ceilings) -> str:
    """The matrix units that can multiply a scheme's codes on this machine; bf16 holds every operand.

    Integers of 4 bits are whole numbers in int8, and in float8 too.
    """
    weight, act = scheme
    if act is None or act.format.element.bits != 8 or act.format.has("zero_point") or weight.has("codebook"):
        return BF16
    if act.format.element != weight.element and not (isinstance(weight, IntFormat) and weight.element.bits == 4):
        return BF16
    unit = {Float8Format: "float8", IntFormat: "int8"}.get(type(act.format), BF16)
    return unit if unit in ceilings.peaks else BF16


# The model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """Seconds of the matmul and of what is before it, the bytes that they move, and how many kernels they are."""

    gemm_s: float
    ovhd_s: float
    nbytes: int
    kernels: int

    @property
    def e2e_s(self) -> float:
        return self.gemm_s + self.ovhd_s


def expected_bf16(shape: Shape, ceilings: Ceilings) -> Expected:
    """Of ReLU and a bf16 layer."""
    weight, x, y = (BF16_BYTES * size for size in (shape.n * shape.k, shape.m * shape.k, shape.m * shape.n))
    return _expected(shape, ceilings, BF16, weight, x, y)


def expected(shape: Shape, scheme: Scheme, ceilings: Ceilings) -> Expected:
    """Of ReLU with the quantization in it, where there is one, and the quantized layer.

    A scale of the whole input cannot be known before all of it was read: such an activation is read twice, by two
    kernels.
    """
    m, k, n = shape.m, shape.k, shape.n
    operand = BF16_BYTES * m * k if scheme.act is None else scheme.act.format.nbytes(m, k)
    passes = 1
    if scheme.act is not None and not scheme.act.static:
        passes += any(p.n is None for p in scheme.act.format.scale_planes)
    weight = scheme.weight.nbytes(n, k)
    return _expected(shape, ceilings, unit_of(scheme, ceilings), weight, operand, BF16_BYTES * m * n, passes)


def _expected(
    shape: Shape, ceilings: Ceilings, unit: str, weight: int, operand: int, result: int, passes: int = 1
) -> Expected:
    before, gemm = BF16_BYTES * shape.m * shape.k * passes + operand, operand + weight + result
    multiply = max(ceilings.move_s(gemm), shape.operations / ceilings.peaks[unit])
    ovhd = passes * ceilings.launch_s + ceilings.move_s(before)
    return Expected(ceilings.launch_s + multiply, ovhd, before + gemm, passes + 1)


# A row -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RooflineRow:
    """One shape in one recipe: expected, observed, and what lies between.

    Attributes:
        recipe, weight, act: the scheme, and its formats.
        name: of the layer, if it has one.
        unit: the matrix units that the expectation counts on.
        kernel: what multiplied.
        fused: whether ReLU handed over codes. Otherwise the layer quantized for itself, and `b_q_gemm_s` has both.
        intensity: operations by bytes, of both kernels.
        r_*, b_*: seconds; see the file. Every expected kernel has its launch in it.
        b_q_quant_s: the activation's quantization alone, whether or not it is a part of `b_q_gemm_s`.
        rb_bf16_gemm_ratio, rb_q_gemm_ratio: what share of the expected speed the matmul reached.
        gap_gemm_s, gap_ovhd_s, gap_rest_s: observed beyond expected: in the matmul, in the kernel before it, and in
            neither alone (waiting for each other; what one leaves in the cache makes it negative). Together
            `b_q_e2e_s - r_q_gemm_and_ovhd_s`.
        launch_share: what part of the observed time launches are, as expected.
        error: why there are no observed times; empty otherwise.
    """

    recipe: str
    weight: str
    act: str
    name: str
    fwd_M: int
    fwd_K: int
    fwd_N: int
    unit: str
    kernel: str
    fused: bool
    intensity: float
    bf16_intensity: float
    r_bf16_gemm_s: float
    r_bf16_ovhd_s: float
    r_bf16_e2e_s: float
    r_q_gemm_s: float
    r_q_ovhd_s: float
    r_q_gemm_and_ovhd_s: float
    r_q_gemm_and_ovhd_spdp: float
    b_bf16_gemm_s: float | None = None
    b_bf16_ovhd_s: float | None = None
    b_bf16_e2e_s: float | None = None
    b_q_gemm_s: float | None = None
    b_q_ovhd_s: float | None = None
    b_q_quant_s: float | None = None
    b_q_e2e_s: float | None = None
    b_q_e2e_spdp: float | None = None
    rb_bf16_gemm_ratio: float | None = None
    rb_q_gemm_ratio: float | None = None
    gap_gemm_s: float | None = None
    gap_ovhd_s: float | None = None
    gap_rest_s: float | None = None
    launch_share: float | None = None
    error: str = ""

    @property
    def spdp_ratio(self) -> float | None:
        """The observed speed-up by the expected one."""
        return None if self.b_q_e2e_spdp is None else self.b_q_e2e_spdp / self.r_q_gemm_and_ovhd_spdp

    @property
    def operations(self) -> int:
        return Shape(self.fwd_M, self.fwd_K, self.fwd_N).operations


def row_of(
    shape: Shape, recipe: str, scheme: Scheme, ceilings: Ceilings, kernel: str = "", fused: bool = False,
    observed: dict[str, Any] | None = None, error: str = "",
) -> RooflineRow:  # fmt: skip
    """The row of a shape: what the model says, and what follows from the observed seconds, `b_*` by name."""
    bf16, q = expected_bf16(shape, ceilings), expected(shape, scheme, ceilings)
    row = RooflineRow(
        recipe, scheme.weight.spec, scheme.act.spec if scheme.act else "", shape.name, shape.m, shape.k, shape.n,
        unit_of(scheme, ceilings), kernel, fused, shape.operations / q.nbytes, shape.operations / bf16.nbytes,
        bf16.gemm_s, bf16.ovhd_s, bf16.e2e_s, q.gemm_s, q.ovhd_s, q.e2e_s, bf16.e2e_s / q.e2e_s, error=error,
    )  # fmt: skip
    if observed is None:
        return row
    gemm, ovhd, e2e = observed["b_q_gemm_s"], observed["b_q_ovhd_s"], observed["b_q_e2e_s"]
    return replace(
        row,
        **observed,
        b_q_e2e_spdp=observed["b_bf16_e2e_s"] / e2e,
        rb_bf16_gemm_ratio=bf16.gemm_s / observed["b_bf16_gemm_s"],
        rb_q_gemm_ratio=q.gemm_s / gemm,
        gap_gemm_s=gemm - q.gemm_s,
        gap_ovhd_s=ovhd - q.ovhd_s,
        gap_rest_s=e2e - gemm - ovhd,
        launch_share=q.kernels * ceilings.launch_s / e2e,
    )


SQUARES = tuple(Shape(s, s, s) for s in (1024, 2048, 4096, 8192, 16384))


def llama_shapes(layers: dict[str, tuple[int, int]], tokens: Sequence[int]) -> list[Shape]:
    """Layers `(N, K)` by name at these numbers of tokens."""
    return [Shape(m, k, n, name) for name, (n, k) in layers.items() for m in tokens]
