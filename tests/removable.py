"""Sets of units that recipes can remove, enumerated."""

from collections.abc import Iterable, Iterator
from itertools import product

from bksdm.families import removals, units
from bksdm.families.units import Names, Removals, Unit


def named(config: dict, names: Iterable[str]) -> list[Unit]:
    return [unit for unit in units(config) if unit.name in set(names)]


def all_sets(config: dict) -> Iterator[Names]:
    """Every set of units that recipes for this U-Net can remove."""
    for kind in removals(config):
        yield from together(kind)


def together(kind: Removals) -> Iterator[Names]:
    for chosen in product(*([names for choice in group for names in together(choice)] for group in kind.groups)):
        yield frozenset().union(kind.always, *chosen)


def single_choices(config: dict) -> Iterator[Names]:
    """Of these sets, those with a choice in one group at most."""
    for kind in removals(config):
        yield from {kind.always | names for group in kind.groups for choice in group for names in together(choice)}
