"""Run by test_triton_interpret.py with TRITON_INTERPRET=1: the kernels themselves, on the CPU, against the definitions.

The interpreter computes bf16 products and roundings wrongly, so operands are fp32 and fp16 and scales fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import KINDS, sqnr_db, weights

from lowbit import decoder_ops
from lowbit.formats import parse_format
from lowbit.formats.activation import parse_activation
from lowbit.kernels.hadamard import transformed
from lowbit.kernels.triton import (
    act_quant,
    between,
    decode_attention,
    dequant,
    gemv,
    greedy,
    hadamard,
    row_quant,
    scaled_mm,
    weight_only,
)
from lowbit.kernels.triton.act_rules import rule_of

FORMATS = (
    "int4:g128", "int3:g64", "int2:g32:asym", "int1:g64:asym", "int8:row", "int8:b128x128", "int7:row", "nf4:g64:dq",
    "codebook4v2:g64", "codebook2v4:g64", "mxfp4", "mxfp6_e3m2", "mxfp8_e4m3", "nvfp4", "float8_e4m3:b128x128",
    "float8_e5m2:tensor",
)  # fmt: skip
ACTIVATIONS = (
    "float8_e4m3:row", "float8_e5m2:row", "float8_e4m3:tensor", "int8:row", "int8:row:asym", "int8:tensor@static",
    "float8_e4m3:g128", "int8:g32:fp32", "mxfp8_e4m3", "mxfp6_e2m3:rceil", "mxfp4", "nvfp4", "nvfp4@static",
)  # fmt: skip


def check_weights(spec: str) -> None:
    """Dequantization to the bit; products in fp32 and fp16, with and without a split of K."""
    fmt, n, k, m = parse_format(spec), 70, 300, 5
    planes = fmt.quantize(weights("zeros", n, k))
    dense = fmt.dequantize(planes, n, k)
    assert torch.equal(dequant.dequantize_into(torch.full((n, k), 7.0), planes, fmt, k, (0, n), (0, k)), dense)
    part = dequant.dequantize_into(torch.full((33, 108), 7.0), planes, fmt, k, (37, 70), (192, 300))
    assert torch.equal(part, dense[37:, 192:])
    for dtype, limit in ((torch.float32, 120), (torch.float16, 60)):
        x, bias = weights("normal", m, k, seed=1).to(dtype), torch.linspace(-1, 1, n)
        reference = x.double() @ dense.double().T + bias
        for config in (None, weight_only.Config(16, 64, 64, 4, 2, 2)):
            y = weight_only.matmul(x, planes, fmt, n, bias, torch.float32, config=config)
            assert sqnr_db(reference, y) > limit, f"{dtype} {config}: {sqnr_db(reference, y):.1f} dB"


def check_activation(spec: str) -> None:
    """Operand and scales equal those of `Activation.split`."""
    act = parse_activation(spec)
    assert act is not None
    static = torch.full((1, 1), 0.0021) if act.static else None
    for kind in KINDS:
        x = weights(kind, 3, 2100)
        operand, scale = act.split(x, static)
        got = act_quant.quantize(x, act, static, torch.float32)
        assert got is not None, "no fused kernel"
        assert torch.equal(got[0], operand.float()), f"{kind}: operands"
        assert torch.equal(got[1], scale), f"{kind}: scales"


SOURCES = ("plain", "relu", "silu_mul", "rms_norm", "add_rms_norm")
AFTER = (
    "float8_e4m3:row", "int8:row", "int8:row:asym", "float8_e4m3:g128", "mxfp8_e4m3", "nvfp4@static",
    "int8:tensor@static",
)  # fmt: skip
EXACT = ("float8_e4m3:row", "int8:row", "int8:row:asym", "mxfp8_e4m3")


def check_fused(spec: str) -> None:
    """What one kernel makes equals the kernel before it, then `Activation.split`: also where programs share rows."""
    act, (m, k) = parse_activation(spec), (3, 2100)
    assert act is not None
    rule = rule_of(act.format)
    assert rule is not None
    static = torch.full((1, 1), 0.0021) if act.static else None
    fold = rule.scaling in ("mx", "nvfp4")
    for dtype in (torch.float32, torch.float16):
        for kind in ("normal", "zeros", "student_t"):
            for name in SOURCES:
                x = weights(kind, m, 2 * k if name == "silu_mul" else k).to(dtype)
                y, w = weights("normal", m, k, seed=1).to(dtype), weights("normal", 1, k, seed=2)[0].to(dtype)
                expected = {
                    "plain": lambda x=x: x, "relu": lambda x=x: x.relu(), "silu_mul": lambda x=x: between.silu_mul(x),
                    "rms_norm": lambda x=x, w=w: between.rms_norm(x, w, 1e-5),
                    "add_rms_norm": lambda x=x, y=y, w=w: between.add_rms_norm(x, y, w, 1e-5)[1],
                }[name]()  # fmt: skip
                operand, scale = act.split(expected, static)
                source = row_quant.Source(name, x, y, w, 1e-5)
                for part in (None, 1024, 4096):
                    total, got, scales = row_quant.launch(source, rule, static, torch.float32, fold, part)
                    where = f"{name} {kind} {dtype} parts of {part}"
                    assert torch.equal(got, operand.float()), f"{where}: {int((got != operand).sum())} levels differ"
                    assert torch.equal(scales, scale), f"{where}: scales"
                    assert torch.equal(total, x + y if name == "add_rms_norm" else x), f"{where}: sum"


def check_exact_norm(spec: str) -> None:
    """Squares whose sum is exact in any order: then the codes are those of the definition itself."""
    act = parse_activation(spec)
    assert act is not None
    x, y = (torch.randint(-8, 9, (4, 3000), generator=torch.Generator().manual_seed(i)).float() for i in (0, 1))
    w = weights("normal", 1, 3000, seed=2)[0]
    if spec == "int8:row":
        codes, _ = act_quant.codes(x, act, None)
        assert torch.equal(codes, act.quantize(x)["qdata"]), "int8 codes"
    total, *got = act_quant.after("add_rms_norm", (x, y, w, 1e-5), act, None, torch.float32)
    expected = decoder_ops.add_rms_norm(x, y, w, 1e-5)
    assert torch.equal(total, expected[0]), "sum"
    assert all(map(torch.equal, got, (t.float() for t in act.split(expected[1])))), "codes"


def check_int8(spec: str) -> None:
    fmt, m, n, k = parse_format(spec), 17, 70, 300
    x, w = fmt.quantize(weights("normal", m, k)), fmt.quantize(weights("normal", n, k, seed=1))
    y = scaled_mm.matmul(x["qdata"], x["scale"], w["qdata"], w["scale"], None, torch.float32)
    reference = fmt.dequantize(x, m, k).double() @ fmt.dequantize(w, n, k).double().T
    assert sqnr_db(reference, y) > 120


def close(got: torch.Tensor, reference: torch.Tensor, what: str) -> None:
    """fp32 against fp64, to a few units in the last place of the largest number."""
    error = float((got.double() - reference).abs().max() / reference.abs().max())
    assert error < 2e-6, f"{what}: {error:.1e}"


def check_norms(width: str) -> None:
    x, y, w = (weights("normal", rows, int(width), seed=i) for i, rows in enumerate((5, 5, 1)))
    even = x[:, : int(width) // 2 * 2]
    total, normed = between.add_rms_norm(x, y, w[0], 1e-5)
    assert torch.equal(total, x + y)
    close(normed, decoder_ops.rms_norm((x + y).double(), w[0].double(), 1e-5), "sum and norm")
    close(between.rms_norm(x, w[0], 1e-5), decoder_ops.rms_norm(x.double(), w[0].double(), 1e-5), "norm")
    close(between.silu_mul(even), decoder_ops.silu_mul(even.double()), "silu")


def check_hadamard(width: str) -> None:
    """The bits of the definition where rows are a power of two; odd factors are mixed first, in an order of its own."""
    k = int(width)
    x, signs = weights("normal", 3, k), (torch.arange(k) % 3 - 1).sign().to(torch.int8) | 1
    assert hadamard.hadamard(x[:0], signs, False).shape == (0, k)
    for s in (None, signs):
        for inverse in (False, True):
            for dtype in (torch.float32, torch.float16):
                got, wanted = hadamard.hadamard(x.to(dtype), s, inverse), transformed(x.to(dtype), s, inverse)
                near = 0.0 if k & (k - 1) == 0 else 1e-5 if dtype == torch.float32 else 1e-2
                assert float((got - wanted).abs().max()) <= near, f"{dtype} inverse={inverse}"


def check_gemv(shape: str) -> None:
    n, k = map(int, shape.split("x"))
    x, w, bias = weights("normal", 1, k), weights("normal", n, k, seed=1), torch.linspace(-1, 1, n)
    close(gemv.gemv(x, w, bias), x.double() @ w.double().T + bias, "with bias")
    half = k // 2  # of every row: rows that do not touch
    close(
        gemv.gemv(x[:, :half], w[:, :half], None), x[:, :half].double() @ w[:, :half].double().T, "a part of the rows"
    )


def check_attention(case: str) -> None:
    """A prompt, and new tokens behind others: the ops in fp64, and the kernels with every number of parts."""
    heads, groups, d, normed, positions = parse_case(case)
    batch, capacity, tokens = len(positions), 150, 5
    norms = [weights("normal", 1, d, seed=7 + i)[0] if normed else None for i in range(2)]
    angles = torch.rand(capacity, d // 2, generator=torch.Generator().manual_seed(3)) * 6
    cos, sin = angles.cos(), angles.sin()
    at = torch.tensor(positions, dtype=torch.int32)
    start = [weights("normal", batch * groups * capacity, d, seed=i).view(batch, groups, capacity, d) for i in (1, 2)]

    def run(op, qkv, dtype, *more):
        cache = [t.to(dtype, copy=True) for t in start]
        own = [None if n is None else n.to(dtype) for n in norms]
        return op(qkv.to(dtype), *cache, at, cos, sin, *own, 1e-5, heads, *more), *cache

    wide = (heads + 2 * groups) * d
    qkv = weights("normal", batch * tokens, wide, seed=5).view(batch, tokens, wide)
    for got, reference in zip(run(between.rope_write, qkv, torch.float32),
                              run(decoder_ops.rope_write, qkv, torch.float64), strict=True):  # fmt: skip
        close(got, reference, "rope")
    arrived = torch.zeros(batch * groups, dtype=torch.int32)
    for new in (qkv[:, :1], qkv):
        expected = run(decoder_ops.decode_attention, new, torch.float64, arrived)
        for splits in (1, 2, 8):
            for got, reference in zip(run(decode_attention.decode_attention, new, torch.float32, arrived, splits),
                                      expected, strict=True):  # fmt: skip
                close(got, reference, f"attention of {new.shape[1]} tokens in {splits} parts")
            assert not arrived.any(), "the counters are not zero again"


def check_greedy(case: str) -> None:
    """`batch x vocabulary`: the ops and the kernel leave the same tokens, places and sequences."""
    batch, vocabulary = map(int, case.split("x"))
    logits = weights("normal", batch, vocabulary, seed=2)
    logits[0, vocabulary // 2 :] = logits[0].max() + 1  # equal ones in several parts
    logits[-1, 5] = torch.inf if batch % 2 else torch.nan
    found = []
    for op in (decoder_ops.take_greedy, greedy.take_greedy):
        token, arrived = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int32)
        positions, ids = torch.arange(batch, dtype=torch.int32), torch.full((batch, 9), -1)
        op(logits, token, positions, ids, arrived, 3)
        assert not arrived.any(), "the counters are not zero again"
        found.append((token, positions, ids))
    for expected, got in zip(*found, strict=True):
        assert torch.equal(got, expected)


def parse_case(case: str) -> tuple[int, int, int, bool, list[int]]:
    """`heads/key heads/head_dim/normed/positions`."""
    heads, groups, d, normed, positions = case.split("/")
    return int(heads), int(groups), int(d), normed == "normed", [int(p) for p in positions.split(",")]


ATTENTIONS = ("8/2/64/plain/0,1,33", "6/1/96/normed/140", "2/2/128/normed/31,32", "6/2/8/plain/100,7")


def main() -> int:
    failures = 0
    groups: list[tuple[Callable[[str], None], tuple[str, ...]]] = [
        (check_weights, FORMATS), (check_activation, ACTIVATIONS), (check_fused, AFTER), (check_exact_norm, EXACT),
        (check_int8, ("int8:row", "int8:tensor")), (check_norms, ("96", "2048", "4097")),
        (check_hadamard, ("1", "2", "256", "96", "576", "24")),
        (check_gemv, ("9x1000", "4x4096")), (check_attention, ATTENTIONS),
        (check_greedy, ("1x2048", "2x5000", "3x130")),
    ]  # fmt: skip
    for check, specs in groups:
        for spec in specs:
            try:
                check(spec)
            except AssertionError as error:
                failures += 1
                print(f"{check.__name__} {spec}: {error}")
    return failures


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
