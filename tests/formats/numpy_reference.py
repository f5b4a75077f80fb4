"""Every family's quantization a second time, in NumPy and from its definition: lists of all levels and a search for
the nearest, exponents by comparison with every power of two, bits laid out one by one. Slow, and shares no code with
lowbit, so that equal bits mean something.

A new family adds its function to `REFERENCES` under the words that its specs begin with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

F32 = np.float32
Tile = tuple[int | None, int | None]
FP32_TINY, FP32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
BF16_MAX = 2.0**127 * (2 - 2.0**-7)
# Scales are chosen as if no weight were larger, so that no decoded weight leaves fp32.
LARGEST = F32(2.0**126)


@dataclass
class Quantized:
    """What quantization by the definition gives: one code per weight (or vector), and every other plane's values."""

    codes: np.ndarray
    params: dict[str, np.ndarray]


# Numbers -----------------------------------------------------------------------------------------


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 rounded to the nearest bf16, ties to even, as fp32."""
    low = x.astype(F32).view(np.uint32) & np.uint32(0xFFFF0000)
    below, above = low.view(F32).astype(np.float64), (low + np.uint32(0x10000)).view(F32).astype(np.float64)
    gap_low, gap_high = np.abs(x - below), np.abs(above - x)
    even = (low >> np.uint32(16)) % 2 == 0
    return np.where((gap_low < gap_high) | ((gap_low == gap_high) & even), below, above).astype(F32)


def float_magnitudes(exponent_bits: int, mantissa_bits: int, codes: int) -> np.ndarray:
    """Value of each of the first `codes` magnitudes of a small float, from sign-less code to number, in fp64."""
    bias = 2 ** (exponent_bits - 1) - 1
    out = []
    for code in range(codes):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        if exponent == 0:
            out.append(mantissa * 2.0 ** (1 - bias - mantissa_bits))
        else:
            out.append((1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))
    return np.array(out)


# Finite magnitudes: E4M3 keeps one code for NaN, E5M2 four for Inf and NaN, the MX elements none.
E4M3, E5M2 = float_magnitudes(4, 3, 127), float_magnitudes(5, 2, 124)
E2M1, E2M3, E3M2 = float_magnitudes(2, 1, 8), float_magnitudes(2, 3, 32), float_magnitudes(3, 2, 32)


def nearest_float(x: np.ndarray, magnitudes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of the nearest levels: ties to the even code, saturating, the sign in the top bit."""
    size = np.minimum(np.abs(x.astype(np.float64)), magnitudes[-1])
    upper = np.clip(np.searchsorted(magnitudes, size), 1, len(magnitudes) - 1)
    lower = upper - 1
    to_upper, to_lower = magnitudes[upper] - size, size - magnitudes[lower]
    even = np.where(upper % 2 == 0, upper, lower)
    code = np.where(to_upper < to_lower, upper, np.where(to_lower < to_upper, lower, even))
    return (code + (np.signbit(x).astype(np.int64) << (bits - 1))).astype(np.uint8)


def float_values(codes: np.ndarray, magnitudes: np.ndarray, bits: int) -> np.ndarray:
    half = 1 << (bits - 1)
    values = magnitudes[codes % half].astype(F32)
    return np.where(codes >= half, -values, values)


def round_e4m3(x: np.ndarray) -> np.ndarray:
    return float_values(nearest_float(x, E4M3, 8), E4M3, 8)


def pack(codes: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """The bytes of each code plane, bit by bit: low bits first in a byte, planes of 4, 2 and 1 bits."""
    names = {1: ["qdata"], 2: ["qdata"], 4: ["qdata"], 8: ["qdata"]}.get(bits)
    widths = [bits] if names else [w for w in (4, 2, 1) if bits & w]
    names = names or [f"qdata_{w}bit" for w in widths]
    out, at = {}, 0
    for name, width in zip(names, widths, strict=True):
        stream = np.stack([(codes >> (at + i)) & 1 for i in range(width)], axis=-1).reshape(len(codes), -1)
        out[name] = np.packbits(stream, axis=1, bitorder="little")
        at += width
    return out


# Tiles -------------------------------------------------------------------------------------------


def tile_of(words: list[str], default: Tile) -> Tile:
    """The tile `(rows, columns)` that the words after a format's name ask for; None is the whole axis."""
    for word in words:
        if word == "tensor":
            return (None, None)
        if word == "row":
            return (1, None)
        if word[0] == "g" and word[1:].isdigit():
            return (1, int(word[1:]))
        if word[0] == "b" and word[1].isdigit():
            rows, columns = word[1:].split("x")
            return (int(rows), int(columns))
    return default


def per_tile(w: np.ndarray, tile: Tile, reduce: Callable[[np.ndarray], float]) -> np.ndarray:
    """`reduce` of each tile's weights, without padding, as fp32."""
    n, k = w.shape
    tn, tk = tile[0] or n, tile[1] or k
    rows = [[reduce(w[i : i + tn, j : j + tk]) for j in range(0, k, tk)] for i in range(0, n, tn)]
    return np.array(rows, dtype=F32)


def spread(s: np.ndarray, tile: Tile, n: int, k: int) -> np.ndarray:
    """Each element of `s` repeated over its tile of a weight `(n, k)`."""
    return np.repeat(np.repeat(s, tile[0] or n, 0)[:n], tile[1] or k, 1)[:, :k]


def amax(t: np.ndarray) -> float:
    return min(np.abs(t).max(), LARGEST)


def stored(scale: np.ndarray, dtype: str = "fp32") -> np.ndarray:
    """Scales as kept: 1 for a tile of zeros, never subnormal, never infinite."""
    low, top = {"fp32": (FP32_TINY, FP32_MAX), "bf16": (FP32_TINY, BF16_MAX), "fp16": (2.0**-14, 65504.0)}[dtype]
    kept = np.where(scale == 0, 1, np.clip(scale, low, top)).astype(F32)
    return to_bf16(kept) if dtype == "bf16" else kept.astype(np.float16).astype(F32) if dtype == "fp16" else kept


# Families ----------------------------------------------------------------------------------------


def quantize_int(words: list[str], w: np.ndarray, planes: dict[str, np.ndarray]) -> Quantized:
    bits, tile = int(words[0][3:]), tile_of(words[1:], (1, 128))
    grouped = any(word[0] == "g" for word in words[1:]) or len(words) == 1
    dtype = next((word for word in words if word in ("fp32", "bf16", "fp16")), "bf16" if grouped else "fp32")
    top = 2**bits - 1
    if "asym" in words:
        low = per_tile(w, tile, lambda t: max(min(t.min(), 0), -LARGEST))
        high = per_tile(w, tile, lambda t: min(max(t.max(), 0), LARGEST))
        scale = stored(high / F32(top) - low / F32(top), dtype)
        zero = np.clip(np.rint(-low / scale), 0, top)
        x = np.rint(w / spread(scale, tile, *w.shape)) + spread(zero, tile, *w.shape)
        return Quantized(np.clip(x, 0, top).astype(np.uint8), {"scale": scale, "zero_point": zero.astype(F32)})
    if bits == 1:
        mean = per_tile(np.abs(w.astype(np.float64)), tile, np.mean)
        used = per_tile(w, tile, np.any) > 0
        scale = stored(mean, dtype) * used
        # A group of zeros has scale zero; its codes say nothing, and are those of -1.
        positive = (w >= 0) & spread(used, tile, *w.shape)
        return Quantized(positive.astype(np.uint8), {"scale": scale})
    scale = stored(per_tile(w, tile, amax) / F32(top / 2), dtype)
    q = np.clip(np.rint(w / spread(scale, tile, *w.shape)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int64)
    # Eight bits are two's complement, fewer are counted from the lowest level.
    codes = q & 0xFF if bits == 8 else q + 2 ** (bits - 1)
    return Quantized(codes.astype(np.uint8), {"scale": scale})


def dequantize_int(words: list[str], q: Quantized, n: int, k: int) -> np.ndarray:
    bits, tile = int(words[0][3:]), tile_of(words[1:], (1, 128))
    codes = q.codes[:, :k].astype(np.int64)
    if "asym" in words:
        level = codes - spread(q.params["zero_point"], tile, n, k)
    elif bits == 1:
        level = np.where(codes == 1, 1, -1)
    elif bits == 8:
        level = np.where(codes >= 128, codes - 256, codes)
    else:
        level = codes - 2 ** (bits - 1)
    return level.astype(F32) * spread(q.params["scale"], tile, n, k)


FLOAT8 = {"float8_e4m3": E4M3, "float8_e5m2": E5M2}


def quantize_float8(words: list[str], w: np.ndarray, planes: dict[str, np.ndarray]) -> Quantized:
    magnitudes, tile = FLOAT8[words[0]], tile_of(words[1:], (1, None))
    scale = stored(per_tile(w, tile, amax) / F32(magnitudes[-1]))
    return Quantized(nearest_float(w / spread(scale, tile, *w.shape), magnitudes, 8), {"scale": scale})


def dequantize_float8(words: list[str], q: Quantized, n: int, k: int) -> np.ndarray:
    values = float_values(q.codes[:, :k], FLOAT8[words[0]], 8)
    return values * spread(q.params["scale"], tile_of(words[1:], (1, None)), n, k)


# Magnitudes and bits of each MX element.
MX = {
    "mxfp8_e4m3": (E4M3, 8), "mxfp8_e5m2": (E5M2, 8), "mxfp6_e2m3": (E2M3, 6), "mxfp6_e3m2": (E3M2, 6),
    "mxfp4": (E2M1, 4),
}  # fmt: skip


def quantize_mx(words: list[str], w: np.ndarray, planes: dict[str, np.ndarray]) -> Quantized:
    magnitudes, bits = MX[words[0]]
    powers = np.array([2.0**e for e in range(-127, 128)])
    top = per_tile(w, (1, 32), amax).astype(np.float64)
    if "rceil" in words:  # the smallest power of two for which nothing saturates
        at = np.searchsorted(powers * magnitudes[-1], top)
    else:  # the power of two of the largest weight over the power of two of the largest level
        largest = max(2.0**e for e in range(-10, 20) if 2.0**e <= magnitudes[-1])
        at = np.searchsorted(powers * largest, top, side="right") - 1
    at = np.where(top == 0, 127, np.clip(at, 0, 254))
    scale = powers[at].astype(F32)
    return Quantized(nearest_float(w / spread(scale, (1, 32), *w.shape), magnitudes, bits), {"scale": scale})


def dequantize_mx(words: list[str], q: Quantized, n: int, k: int) -> np.ndarray:
    return float_values(q.codes[:, :k], *MX[words[0]]) * spread(q.params["scale"], (1, 32), n, k)


def quantize_nvfp4(words: list[str], w: np.ndarray, planes: dict[str, np.ndarray]) -> Quantized:
    outer = stored(per_tile(w, (None, None), amax) / F32(448 * 6))
    top = per_tile(w, (1, 16), amax)
    scale = np.where(top == 0, 1, round_e4m3(np.clip(top / F32(6) / outer, 2.0**-9, 448))).astype(F32)
    x = w / spread(scale * outer, (1, 16), *w.shape)
    return Quantized(nearest_float(x, E2M1, 4), {"scale": scale, "outer_scale": outer})


def dequantize_nvfp4(words: list[str], q: Quantized, n: int, k: int) -> np.ndarray:
    scale = q.params["scale"] * q.params["outer_scale"]
    return float_values(q.codes[:, :k], E2M1, 4) * spread(scale, (1, 16), n, k)


def nearest_entry(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Index of the nearest scalar entry; half way, the lower level; of equal levels, the first."""
    levels, first = np.unique(table.astype(np.float64), return_index=True)
    x = x.astype(np.float64)
    # The neighbours alone: fp64 cannot tell how far two levels of 1e-27 and 0 are from 1e-5.
    low = np.maximum((x[..., None] >= levels).sum(-1) - 1, 0)
    high = np.minimum(low + 1, len(levels) - 1)
    nearer = np.where(np.abs(levels[high] - x) < np.abs(x - levels[low]), high, low)
    return first[nearer].astype(np.uint8)


def table_scale(words: list[str], w: np.ndarray) -> dict[str, np.ndarray]:
    group = tile_of(words[1:], (1, 64))
    top = per_tile(w, group, amax)
    if "dq" not in words:
        return {"scale": stored(top)}
    offset = np.array([[top.astype(np.float64).mean()]], dtype=F32)
    rest = top - offset
    outer = stored(per_tile(rest, (1, 256), amax) / F32(127))
    wide = spread(outer, (1, 256), *rest.shape)
    scale = np.clip(np.rint(rest / wide), -127, 127).astype(F32)
    scale = np.where(scale * wide + offset == 0, scale + 1, scale).astype(F32)
    return {"scale": scale, "outer_scale": outer, "scale_offset": offset}


def table_scale_value(params: dict[str, np.ndarray]) -> np.ndarray:
    if "outer_scale" not in params:
        return params["scale"]
    return params["scale"] * spread(params["outer_scale"], (1, 256), *params["scale"].shape) + params["scale_offset"]


def quantize_table(words: list[str], w: np.ndarray, planes: dict[str, np.ndarray]) -> Quantized:
    params = table_scale(words, w) | {"codebook": planes["codebook"]}
    x = w / spread(table_scale_value(params), tile_of(words[1:], (1, 64)), *w.shape)
    return Quantized(nearest_entry(x, planes["codebook"]), params)


def dequantize_table(words: list[str], q: Quantized, n: int, k: int) -> np.ndarray:
    values = q.params["codebook"][q.codes].reshape(n, -1)[:, :k]
    return values * spread(table_scale_value(q.params), tile_of(words[1:], (1, 64)), n, k)


def quantize_codebook(words: list[str], w: np.ndarray, planes: dict[str, np.ndarray]) -> Quantized:
    """Codes for a learned codebook, which is taken as given; of vectors equally near (up to fp64) any will do."""
    table, tile = planes["codebook"], tile_of(words[1:], (1, 64))
    scale = stored(per_tile(w, tile, amax), "bf16")
    x = w / spread(scale, tile, *w.shape)
    params = {"scale": scale, "codebook": table}
    if table.ndim == 1:
        return Quantized(nearest_entry(x, table), params)
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % table.shape[1]))).reshape(len(x), -1, 1, table.shape[1])
    gap = ((x.astype(np.float64) - table.astype(np.float64)) ** 2).sum(-1)
    taken = planes["qdata"].astype(np.int64)[..., None]
    as_near = np.take_along_axis(gap, taken, -1) <= gap.min(-1, keepdims=True) + 1e-13 * (1 + (x**2).sum(-1))
    codes = np.where(as_near[..., 0], taken[..., 0], gap.argmin(-1))
    return Quantized(codes.astype(np.uint8), params)


Quantize = Callable[[list[str], np.ndarray, dict[str, np.ndarray]], Quantized]
Dequantize = Callable[[list[str], Quantized, int, int], np.ndarray]
REFERENCES: dict[str, tuple[Quantize, Dequantize]] = {
    "int": (quantize_int, dequantize_int),
    "float8": (quantize_float8, dequantize_float8),
    "mxfp": (quantize_mx, dequantize_mx),
    "nvfp4": (quantize_nvfp4, dequantize_nvfp4),
    "nf4": (quantize_table, dequantize_table),
    "fp4": (quantize_table, dequantize_table),
    "codebook": (quantize_codebook, dequantize_table),
}


def reference_of(spec: str) -> tuple[Quantize, Dequantize]:
    found = [functions for prefix, functions in REFERENCES.items() if spec.startswith(prefix)]
    assert found, f"{spec} has no independent implementation: add its family to REFERENCES in {__file__}"
    return found[0]


def quantize(spec: str, w: np.ndarray, planes: dict[str, np.ndarray]) -> Quantized:
    """`w (N, K)` fp32 by the definition of `spec`. Of `planes` only learned tables may be used."""
    return reference_of(spec)[0](spec.split(":"), w, planes)


def dequantize(spec: str, q: Quantized, n: int, k: int) -> np.ndarray:
    return reference_of(spec)[1](spec.split(":"), q, n, k)
