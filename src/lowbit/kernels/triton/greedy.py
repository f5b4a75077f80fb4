"""The most likely token of every sequence, put where the next step reads it, in one kernel.

Parts of the vocabulary run side by side. The block of a sequence that finishes last compares what all have left in
memory; of equal logits the first wins, so the result does not depend on which one that was.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.kernels.triton.early import let_the_next_start, wait_for_the_kernel_before
from lowbit.kernels.triton.launch import OPTIONS, ceil_pow2, early_options, on_device

BLOCK = 2048  # logits of a part


@triton.jit
def take_greedy_kernel(
    logits, token, positions, ids, values, places, arrived, V, width, step,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid `(B, PARTS)`; `values` and `places (B, PARTS)` are for the parts, `arrived (B,)` is zero and left zero."""
    let_the_next_start(EARLY)
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    n = part * BLOCK + tl.arange(0, BLOCK)
    wait_for_the_kernel_before(EARLY)
    v = tl.load(logits + b * V + n, mask=n < V, other=float("-inf")).to(tl.float32)
    v = tl.where(v != v, float("inf"), v)  # NaN wins, as in torch.argmax
    most = tl.max(v, axis=0)
    tl.store(values + b * PARTS + part, most)
    tl.store(places + b * PARTS + part, tl.min(tl.where((v == most) & (n < V), n, V), axis=0))
    # Both stores come before the addition that tells of them.
    tl.debug_barrier()
    before = tl.atomic_add(arrived + b, 1, sem="acq_rel", scope="gpu")
    if before == PARTS - 1:
        p = tl.arange(0, ALL)
        # Not from this multiprocessor's own cache, which knows nothing of the others' stores.
        highs = tl.load(values + b * PARTS + p, mask=p < PARTS, other=float("-inf"), cache_modifier=".cg")
        found = tl.load(places + b * PARTS + p, mask=p < PARTS, other=V, cache_modifier=".cg")
        chosen = tl.min(tl.where(highs == tl.max(highs, axis=0), found, V), axis=0).to(tl.int64)
        position = tl.load(positions + b) + step
        tl.store(token + b, chosen)
        tl.store(positions + b, position)
        tl.store(ids + b * width + position, chosen, mask=position < width)
        tl.store(arrived + b, 0)


def take_greedy(logits: Tensor, token: Tensor, positions: Tensor, ids: Tensor, arrived: Tensor, step: int) -> None:
    """Into `token (B,)`, and into `ids (B, S)` at `positions (B,)` moved on by `step`, goes the argmax of `logits`."""
    logits = logits.contiguous()
    batch, vocabulary = logits.shape
    parts = -(-vocabulary // BLOCK)
    values = torch.empty(batch, parts, dtype=torch.float32, device=logits.device)
    places = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
    with on_device(logits):
        take_greedy_kernel[(batch, parts)](
            logits, token, positions, ids, values, places, arrived, vocabulary, ids.stride(0), step, PARTS=parts,
            BLOCK=BLOCK, ALL=ceil_pow2(parts), num_warps=4, **early_options(logits.device), **OPTIONS,
        )  # fmt: skip
