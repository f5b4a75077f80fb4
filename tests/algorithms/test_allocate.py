"""The knapsack against all combinations."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.algorithms.allocate import least_loss_bound, pareto_front

# Whole numbers: their sums are exact in any order.
OPTION = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda o: (float(o[0]), float(o[1])))
GROUPS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def every_sum(groups: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    return [(sum(o[0] for o in c), sum(o[1] for o in c)) for c in itertools.product(*groups)]


@settings(max_examples=80, deadline=None)
@given(GROUPS)
def test_front_is_what_no_combination_beats(groups: list[list[tuple[float, float]]]) -> None:
    front, sums = pareto_front(groups), every_sum(groups)
    best = {s for s in sums if not any(o != s and o[0] <= s[0] and o[1] <= s[1] for o in sums)}
    assert front.exact
    assert list(zip(front.cost, front.loss)) == sorted(best)
    for choice, cost, loss in zip(front.choices, front.cost, front.loss):
        chosen = [g[i] for g, i in zip(groups, choice)]
        assert (cost, loss) == (sum(o[0] for o in chosen), sum(o[1] for o in chosen))


@settings(max_examples=80, deadline=None)
@given(GROUPS, st.integers(0, 60))
def test_budgets(groups: list[list[tuple[float, float]]], budget: int) -> None:
    front, sums = pareto_front(groups), every_sum(groups)
    affordable = [loss for cost, loss in sums if cost <= budget]
    at = front.within_cost(budget)
    assert (None if at is None else front.loss[at]) == min(affordable, default=None)
    if affordable:
        assert least_loss_bound(groups, budget) <= min(affordable) + 1e-9
    good = [cost for cost, loss in sums if loss <= budget]
    at = front.within_loss(budget)
    assert (None if at is None else front.cost[at]) == min(good, default=None)


def test_bound_is_met_at_corners_of_the_hull() -> None:
    groups = [[(0.0, 8.0), (2.0, 0.0)], [(0.0, 3.0), (1.0, 0.0)]]
    assert [least_loss_bound(groups, b) for b in (0, 2, 3)] == [11, 3, 0]


def test_a_thinned_front_says_so_and_stays_true() -> None:
    rng = np.random.default_rng(0)
    groups = [[tuple(o) for o in rng.random((4, 2)).tolist()] for _ in range(9)]
    whole, thin = pareto_front(groups, limit=1 << 20), pareto_front(groups, limit=16)
    assert whole.exact
    assert not thin.exact
    assert len(thin.cost) <= 16
    assert thin.cost[-1] == whole.cost[-1]
    for choice, cost in zip(thin.choices, thin.cost):
        assert cost == pytest.approx(sum(g[i][0] for g, i in zip(groups, choice)))
        assert least_loss_bound(groups, cost) <= thin.loss[list(thin.cost).index(cost)] + 1e-9


@pytest.mark.parametrize("groups", [[], [[]], [[(-1.0, 0.0)]], [[(0.0, float("nan"))]]])
def test_bad_numbers_are_refused(groups: list[list[tuple[float, float]]]) -> None:
    with pytest.raises(ValueError, match="allocate"):
        pareto_front(groups)
