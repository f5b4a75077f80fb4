"""How a token's queries, keys and values lie next to each other, and how that fits a cache."""

from __future__ import annotations

from torch import Tensor

from lowbit.errors import see


def check_heads(qkv: Tensor, keys: Tensor, heads: int) -> None:
    """Whether `qkv (..., (H + 2 G) D)` fits a layer's cache `keys (B, G, S, D)` with `heads` = H.

    Raises:
        ValueError: the sizes, dtypes or devices do not.
    """
    _, groups, _, d = keys.shape
    if qkv.shape[-1] != (heads + 2 * groups) * d or heads % groups:
        raise ValueError(
            f"{heads} query and {groups} key heads of {d} make {(heads + 2 * groups) * d} numbers per token, got "
            f"{qkv.shape[-1]}" + see("input-mismatch")
        )
    if (qkv.dtype, qkv.device) != (keys.dtype, keys.device) or qkv.shape[0] != keys.shape[0]:
        raise ValueError(
            f"{qkv.shape[0]} sequences in {qkv.dtype} on {qkv.device} do not go into a cache of {keys.shape[0]} in "
            f"{keys.dtype} on {keys.device}" + see("input-mismatch")
        )
