"""One option per group, so that the sum of losses is least under a budget for the sum of costs: a knapsack.

The multiple-choice knapsack problem. Groups are added one after the other to the front of all sums that no other sum
beats in both cost and loss (Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation", 1969). That
is exact, and quick as long as costs repeat, as the bytes of equal layers do. A front longer than `limit` is thinned:
its points are still true sums, but one of them may miss the optimum. By how much at most is told by the bound of
Lagrange: for any price `p` per unit of cost, no choice within budget B has less loss than

    sum over groups of min over options (loss + p cost)  -  p B
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: cost and loss of one option
Option = tuple[float, float]


@dataclass(frozen=True)
class Front:
    """The sums that no other sum beats, by rising cost and falling loss.

    Attributes:
        cost, loss: `(points,)` fp64.
        choices: `(points, groups)`, the option of each group.
        exact: nothing was thinned: between two points there is no better choice.
    """

    cost: Floats
    loss: Floats
    choices: NDArray[np.int16]
    exact: bool

    def within_cost(self, budget: float) -> int | None:
        """The point of least loss that costs at most `budget`; None if all cost more."""
        i = int(np.searchsorted(self.cost, budget, side="right")) - 1
        return i if i >= 0 else None

    def within_loss(self, allowed: float) -> int | None:
        """The cheapest point that loses at most `allowed`; None if all lose more."""
        fit = np.flatnonzero(self.loss <= allowed)
        return int(fit[0]) if len(fit) else None


def pareto_front(groups: Sequence[Sequence[Option]], limit: int = 4096) -> Front:
    """The front of all ways to take one option of each group; see the module for the method.

    Raises:
        ValueError: there is no group, a group has no option, or a number is negative or not finite.
    """
    _check(groups)
    cost, loss = np.zeros(1), np.zeros(1)
    choices = np.zeros((1, len(groups)), np.int16)
    exact = True
    for at, options in enumerate(groups):
        costs, losses = np.array(options, np.float64).T
        all_cost, all_loss = (cost[:, None] + costs).ravel(), (loss[:, None] + losses).ravel()
        order = np.lexsort((all_loss, all_cost))
        before = np.concatenate(([np.inf], np.minimum.accumulate(all_loss[order])[:-1]))
        kept = order[all_loss[order] < before]
        if len(kept) > limit:
            exact = False
            kept = kept[_spread(all_cost[kept], limit)]
        cost, loss = all_cost[kept], all_loss[kept]
        choices = choices[kept // len(costs)]
        choices[:, at] = kept % len(costs)
    return Front(cost, loss, choices, exact)


def least_loss_bound(groups: Sequence[Sequence[Option]], budget: float) -> float:
    """No choice that costs at most `budget` has less loss than this (Lagrange's dual, at its best price).

    The dual is concave in the price and bends only where two options of a group tie, so the best price is one of those.
    """
    _check(groups)
    arrays = [np.array(options, np.float64).T for options in groups]
    prices = {0.0}
    for costs, losses in arrays:
        rise, run = losses[:, None] - losses, costs - costs[:, None]
        prices.update((rise[run > 0] / run[run > 0]).tolist())
    return max(
        sum(float((losses + p * costs).min()) for costs, losses in arrays) - p * budget for p in prices if p >= 0
    )


def _spread(cost: Floats, limit: int) -> NDArray[np.intp]:
    """Indices of at most `limit` rising costs, evenly spread; of each stretch its dearest, which loses the least."""
    stretch = np.ceil((cost - cost[0]) / (cost[-1] - cost[0]) * (limit - 1))
    return np.flatnonzero(np.append(stretch[1:] != stretch[:-1], True))


def _check(groups: Sequence[Sequence[Option]]) -> None:
    if not groups or not all(groups):
        raise ValueError("allocate: every group needs at least one option, and there must be a group")
    for at, options in enumerate(groups):
        for cost, loss in options:
            if not (0 <= cost < np.inf and 0 <= loss < np.inf):
                raise ValueError(f"allocate: group {at} has an option of cost {cost} and loss {loss}; give finite "
                                 "numbers from 0")  # fmt: skip
