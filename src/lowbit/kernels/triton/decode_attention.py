"""Attention of one or some new tokens per sequence over its KV cache, in one kernel: rotary embedding, the write into
the cache, the attention, and the sum over parts of the sequence.

Parts of a sequence ("splits", as in Flash-Decoding, Dao et al., 2023) run side by side, each for all new tokens and all
query heads that share one key head. The block that finishes last adds up what all have left in memory, in the order of
the parts: the result does not depend on which one that was. How long a sequence is, is read from memory, so that a CUDA
graph that holds this kernel is good for every length.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.cache_layout import check_heads
from lowbit.kernels.triton.between import rotated
from lowbit.kernels.triton.early import let_the_next_start, wait_for_the_kernel_before
from lowbit.kernels.triton.launch import OPTIONS, ceil_pow2, early_options, on_device

MOST_SPLITS = 16
# Sums of all parts that the last block holds at once, in numbers: what fits into registers.
MOST_SUMS = 8192
SUFFICIENT_BLOCKS = 128
#: Less than any score; unlike minus infinity it may be subtracted from itself.
LOWEST: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def attend(best, weight, ya, yb, qa, qb, ka, kb, va, vb, real, scale_log2):
    """Some more keys and values, those that are `real`: largest score, sum of weights and weighted sums so far."""
    scores = tl.dot(qa, tl.trans(ka), input_precision="ieee") + tl.dot(qb, tl.trans(kb), input_precision="ieee")
    scores = tl.where(real[None, :], scores * scale_log2, LOWEST)
    higher = tl.maximum(best, tl.max(scores, axis=1))
    p = tl.where(real[None, :], tl.exp2(scores - higher[:, None]), 0.0)
    fade = tl.exp2(best - higher)
    weight = weight * fade + tl.sum(p, axis=1)
    ya = ya * fade[:, None] + tl.dot(p.to(va.dtype), va, input_precision="ieee")
    yb = yb * fade[:, None] + tl.dot(p.to(vb.dtype), vb, input_precision="ieee")
    return higher, weight, ya, yb


@triton.jit
def decode_attention_kernel(
    qkv, keys, values, positions, cos, sin, q_norm, k_norm, eps, sums, stats, arrived, out, G, S, D, HALF_D, scale_log2,
    T: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    FEW: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid `(B G, SPLITS)`: R query heads of T new tokens over one part of one key head's cache.

    The rows of a block are the heads of the first token, then those of the next. Vectors of D numbers are handled as
    their two halves, which the rotary embedding mixes. `sums (B G, SPLITS, T R, D)`, `stats (B G, SPLITS, T R, 2)`
    (largest score and sum of weights) and `arrived (B G,)`, all zero, are for the parts.
    """
    let_the_next_start(EARLY)
    bg = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, group = bg // G, bg % G
    row = tl.arange(0, ROWS)
    t, r = row // R, row % R
    i = tl.arange(0, HALF)
    half = i < HALF_D
    inside = (row < T * R)[:, None] & half[None, :]
    # What earlier steps have left need not wait for the kernel ahead, whose result is that of the new tokens alone: the
    # place, its angles, and the first keys and values of this part. Parts are equal, in whole blocks.
    position = tl.load(positions + batch)
    turned = inside & (position + t < S)[:, None]
    angle = (position + t).to(tl.int64)[:, None] * HALF_D + i[None, :]
    c = tl.load(cos + angle, mask=turned, other=0.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    base = bg * S * D
    share = tl.cdiv(tl.cdiv(position, SPLITS), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, position)
    place = begin + tl.arange(0, BLOCK)
    there = (place < end)[:, None] & half[None, :]
    at = base + place.to(tl.int64)[:, None] * D + i[None, :]
    ka = tl.load(keys + at, mask=there, other=0.0)
    kb = tl.load(keys + at + HALF_D, mask=there, other=0.0)
    va = tl.load(values + at, mask=there, other=0.0)
    vb = tl.load(values + at + HALF_D, mask=there, other=0.0)
    wait_for_the_kernel_before(EARLY)

    token = qkv + batch * T * (R + 2) * G * D
    query = token + (t * (R + 2) * G * D + (group * R + r) * D)[:, None] + i[None, :]
    qa = tl.load(query, mask=inside, other=0.0).to(tl.float32)
    qb = tl.load(query + HALF_D, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        norm = (1.0 / tl.sqrt_rn((tl.sum(qa * qa, axis=1) + tl.sum(qb * qb, axis=1)) / D + eps))[:, None]
        qa *= norm * tl.load(q_norm + i, mask=half, other=0.0).to(tl.float32)[None, :]
        qb *= norm * tl.load(q_norm + HALF_D + i, mask=half, other=0.0).to(tl.float32)[None, :]
    turned_qa, turned_qb = rotated(qa, qb, c, s)
    kind = keys.dtype.element_ty
    qa, qb = turned_qa.to(kind), turned_qb.to(kind)

    best = tl.full((ROWS,), LOWEST, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    ya = tl.zeros((ROWS, HALF), tl.float32)
    yb = tl.zeros((ROWS, HALF), tl.float32)
    if split == 0:
        # The new tokens' own keys and values: no other block looks at their places in the cache.
        for new in range(T):
            its = (position + new).to(tl.int64)
            fits = i < tl.where(its < S, HALF_D, 0)
            own_c = tl.load(cos + its * HALF_D + i, mask=fits, other=0.0)
            own_s = tl.load(sin + its * HALF_D + i, mask=fits, other=0.0)
            own = token + new * (R + 2) * G * D + (R * G + group) * D + i
            own_ka = tl.load(own, mask=half, other=0.0).to(tl.float32)
            own_kb = tl.load(own + HALF_D, mask=half, other=0.0).to(tl.float32)
            if NORM:
                square = tl.sum(own_ka * own_ka, axis=0) + tl.sum(own_kb * own_kb, axis=0)
                own_norm = 1.0 / tl.sqrt_rn(square / D + eps)
                own_ka *= own_norm * tl.load(k_norm + i, mask=half, other=0.0).to(tl.float32)
                own_kb *= own_norm * tl.load(k_norm + HALF_D + i, mask=half, other=0.0).to(tl.float32)
            turned_a, turned_b = rotated(own_ka, own_kb, own_c, own_s)
            new_ka, new_kb = turned_a.to(kind), turned_b.to(kind)
            new_va = tl.load(own + G * D, mask=half, other=0.0)
            new_vb = tl.load(own + G * D + HALF_D, mask=half, other=0.0)
            to = base + its * D + i
            tl.store(keys + to, new_ka, mask=fits)
            tl.store(keys + to + HALF_D, new_kb, mask=fits)
            tl.store(values + to, new_va, mask=fits)
            tl.store(values + to + HALF_D, new_vb, mask=fits)
            products = (
                qa.to(tl.float32) * new_ka.to(tl.float32)[None, :] + qb.to(tl.float32) * new_kb.to(tl.float32)[None, :]
            )
            # Every row sees the first new token, so that `best` is a score from then on.
            score = tl.where(t >= new, tl.sum(products, axis=1) * scale_log2, LOWEST)
            higher = tl.maximum(best, score)
            p = tl.exp2(score - higher)
            fade = tl.exp2(best - higher)
            weight = weight * fade + p
            ya = ya * fade[:, None] + p[:, None] * new_va.to(tl.float32)[None, :]
            yb = yb * fade[:, None] + p[:, None] * new_vb.to(tl.float32)[None, :]
            best = higher

    best, weight, ya, yb = attend(best, weight, ya, yb, qa, qb, ka, kb, va, vb, place < end, scale_log2)
    for s0 in range(begin + BLOCK, end, BLOCK):
        place = s0 + tl.arange(0, BLOCK)
        there = (place < end)[:, None] & half[None, :]
        at = base + place.to(tl.int64)[:, None] * D + i[None, :]
        ka = tl.load(keys + at, mask=there, other=0.0)
        kb = tl.load(keys + at + HALF_D, mask=there, other=0.0)
        va = tl.load(values + at, mask=there, other=0.0)
        vb = tl.load(values + at + HALF_D, mask=there, other=0.0)
        best, weight, ya, yb = attend(best, weight, ya, yb, qa, qb, ka, kb, va, vb, place < end, scale_log2)

    to_out = out + batch * T * G * R * D + group * R * D
    if SPLITS == 1:
        whole = to_out + (t * G * R * D + r * D)[:, None] + i[None, :]
        tl.store(whole, (ya / weight[:, None]).to(out.dtype.element_ty), mask=inside)
        tl.store(whole + HALF_D, (yb / weight[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        part = (bg * SPLITS + split) * T * R
        to_sums = sums + (part + row)[:, None] * D + i[None, :]
        tl.store(to_sums, ya, mask=inside)
        tl.store(to_sums + HALF_D, yb, mask=inside)
        to_stats = stats + (part + row) * 2
        tl.store(to_stats, best, mask=row < T * R)
        tl.store(to_stats + 1, weight, mask=row < T * R)
        # All of the block's stores come before the one addition that tells of them.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + bg, 1, sem="acq_rel", scope="gpu")
        if before == SPLITS - 1:
            n = bg * SPLITS + tl.arange(0, SPLITS)
            for first in range(0, T * R, FEW):
                few = first + tl.arange(0, FEW)
                real = (n >= 0)[:, None] & (few < T * R)[None, :]
                from_stats = stats + (n[:, None] * T * R + few[None, :]) * 2
                # Not from this multiprocessor's own cache, which knows nothing of the others' stores.
                highs = tl.load(from_stats, mask=real, other=LOWEST, cache_modifier=".cg")
                weights = tl.load(from_stats + 1, mask=real, other=1.0, cache_modifier=".cg")
                fades = tl.exp2(highs - tl.max(highs, axis=0)[None, :])
                total = tl.sum(weights * fades, axis=0)[:, None]
                from_sums = sums + (n[:, None, None] * T * R + few[None, :, None]) * D + i[None, None, :]
                numbers = real[:, :, None] & half[None, None, :]
                results = (few < T * R)[:, None] & half[None, :]
                joint = to_out + (few // R * G * R * D + few % R * D)[:, None] + i[None, :]
                all_a = tl.load(from_sums, mask=numbers, other=0.0, cache_modifier=".cg")
                all_b = tl.load(from_sums + HALF_D, mask=numbers, other=0.0, cache_modifier=".cg")
                sum_a = tl.sum(all_a * fades[:, :, None], axis=0) / total
                sum_b = tl.sum(all_b * fades[:, :, None], axis=0) / total
                tl.store(joint, sum_a.to(out.dtype.element_ty), mask=results)
                tl.store(joint + HALF_D, sum_b.to(out.dtype.element_ty), mask=results)
            tl.store(arrived + bg, 0)


def splits_for(sequences: int, shared: int, capacity: int, d: int, block: int) -> int:
    """Parts of every sequence, a power of two: enough blocks for a GPU, and not more than the last one can add up.

    Args:
        sequences: of the cache, times its key heads.
        shared: query heads per key head.
    """
    sums = ceil_pow2(shared) * ceil_pow2(d // 2, 16)
    most = min(MOST_SPLITS, SUFFICIENT_BLOCKS // sequences, MOST_SUMS // sums, -(-capacity // block))
    return 1 << max(1, most).bit_length() - 1


def decode_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, heads: int, arrived: Tensor, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """`(B, T, H D)`: the attention of T new tokens over the cache `(B, G, S, D)`, which they are written into.

    Args:
        qkv: `(B, T, (H + 2 G) D)`: queries, keys and values of the new tokens before rotation.
        positions: int32 `(B,)`: of the first new token, which is how many tokens the cache holds before it.
        arrived: int32 `(B G,)` of zeros, zeros again afterwards; calls that may overlap need their own.
        splits: parts of a sequence, a power of two up to 16, instead of the rule's choice.
    """
    check_heads(qkv, keys, heads)
    qkv = qkv.contiguous()
    tokens = qkv.shape[1]
    batch, groups, capacity, d = keys.shape
    shared, block = heads // groups, 32 if capacity <= 2048 else 64
    splits = splits or splits_for(batch * groups, shared, capacity, d, block)
    lines, half = tokens * shared, ceil_pow2(d // 2, 16)
    rows = ceil_pow2(lines, 16)
    out = qkv.new_empty(batch, tokens, heads * d)
    parts = (batch * groups, splits, lines) if splits > 1 else (1, 1, 1)
    sums = torch.empty(*parts, d, dtype=torch.float32, device=qkv.device)
    stats = torch.empty(*parts, 2, dtype=torch.float32, device=qkv.device)
    with on_device(qkv):
        decode_attention_kernel[(batch * groups, splits)](
            qkv, keys, values, positions, cos, sin, qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm, eps, sums, stats, arrived, out, groups, capacity, d, d // 2,
            math.log2(math.e) / math.sqrt(d), T=tokens, R=shared, NORM=q_norm is not None, SPLITS=splits, BLOCK=block,
            ROWS=rows, FEW=max(1, min(ceil_pow2(lines), MOST_SUMS // (splits * half))), HALF=half,
            num_warps=4 if rows < 32 else 8, num_stages=2, **early_options(qkv.device), **OPTIONS,
        )  # fmt: skip
    return out
