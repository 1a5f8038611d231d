"""The 0-1 knapsack with groups: of every group one item, saving enough, losing least; exact.

Groups are joined one after the other, and of the partial sums only those are kept that no other beats in both
savings and loss (Nemhauser and Ullmann, Management Science 15(9), 1969).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """Something that may go.

    Attributes:
        saves: What its going saves, in whole units of the budget.
        loses: What its going costs in quality; may be negative.
        names: What it is.
    """

    saves: int
    loses: float
    names: frozenset[str]

    def __add__(self, other: "Item") -> "Item":
        return Item(self.saves + other.saves, self.loses + other.loses, self.names | other.names)


NOTHING = Item(0, 0.0, frozenset())


def frontier(groups: Sequence[Sequence[Item]]) -> list[Item]:
    """All sums of one item of each group that no other sum beats, the one that saves most first."""
    best = [NOTHING]
    for group in groups:
        best = unbeaten(a + b for a in best for b in unbeaten(group))
    return best


def unbeaten(items: Iterable[Item]) -> list[Item]:
    """Those that no other beats in both savings and loss, the one that saves most first."""
    best: list[Item] = []
    for item in sorted(items, key=lambda item: (-item.saves, item.loses)):
        if not best or item.loses < best[-1].loses:
            best.append(item)
    return best


def least_loss(groups: Sequence[Sequence[Item]], needed: int) -> Item | None:
    """The sum of one item of each group that saves at least `needed` and loses least; None if none saves so much."""
    return min((item for item in frontier(groups) if item.saves >= needed), key=lambda item: item.loses, default=None)
