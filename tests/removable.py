"""Sets of units that recipes can remove, enumerated."""

from collections.abc import Iterable, Iterator
from itertools import product

from bksdm.families import removals, units
from bksdm.families.units import Names, Unit


def named(config: dict, names: Iterable[str]) -> list[Unit]:
    return [unit for unit in units(config) if unit.name in set(names)]


def all_sets(config: dict) -> Iterator[Names]:
    """Every set of units that recipes for this U-Net can remove."""
    for kind in removals(config):
        for chosen in product(*kind.groups):
            yield frozenset().union(kind.always, *chosen)


def single_choices(config: dict) -> Iterator[Names]:
    """Of these sets, those with a choice in one group at most."""
    for kind in removals(config):
        yield from {kind.always | names for group in kind.groups for names in group}
