"""The knapsack with groups, against all combinations."""

import random
from itertools import product

import pytest

from bksdm.pruning.knapsack import NOTHING, Item, frontier, least_loss


def random_groups(seed: int) -> list[list[Item]]:
    """Few groups of few items; savings come in steps, so that many are equal, and losses may be negative."""
    rng = random.Random(seed)
    return [
        [
            Item(rng.randrange(0, 40, 5), rng.choice([-1.5, 0, 0.25, 1, 2, 4.75]), frozenset([f"{g}.{n}"]))
            for n in range(4)
        ]
        for g in range(5)
    ]


def all_sums(groups: list[list[Item]]) -> list[Item]:
    return [sum(chosen, NOTHING) for chosen in product(*groups)]


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_loses_less(seed: int) -> None:
    groups = random_groups(seed)
    sums = all_sums(groups)
    for needed in range(-10, 200, 7):
        able = [item for item in sums if item.saves >= needed]
        found = least_loss(groups, needed)
        if not able:
            assert found is None
            continue
        assert found.loses == min(item.loses for item in able)
        assert found in sums


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_holds_what_no_other_beats(seed: int) -> None:
    groups = random_groups(seed)
    sums = all_sums(groups)
    for item in frontier(groups):
        assert not [other for other in sums if other.saves >= item.saves and other.loses < item.loses]
        assert not [other for other in sums if other.saves > item.saves and other.loses <= item.loses]


def test_without_groups_there_is_nothing_to_save() -> None:
    assert least_loss([], 0) == NOTHING
    assert least_loss([], 1) is None
