"""The recipe that loses least within a budget, as a knapsack over the units of a U-Net (LAPTOP-Diff, arXiv 2404.11098).

What removing a unit loses is given and taken to add up; what a recipe costs is exact. The middle block and the
innermost stages change what surrounds them, so each way with them is a knapsack of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bksdm.common.errors import InputError
from bksdm.families import derive, recipe_without, removals, units
from bksdm.families.recipe import Config, Recipe
from bksdm.families.units import Names, Removals
from bksdm.pruning.cost import TOKENS, UNetCost, parts_cost, unet_cost
from bksdm.pruning.knapsack import Item, frontier, least_loss

What = Literal["params", "gmacs"]
_Groups = tuple[tuple[Removals, ...], ...]


@dataclass(frozen=True)
class Choice:
    """A recipe under a budget.

    Attributes:
        recipe: The recipe.
        removed: Names of the units that it removes.
        loses: Sum of what each of them alone loses.
        cost: What is left of the U-Net, in whole parameters or multiply-accumulates.
        share: The same as a share of the whole.
    """

    recipe: Recipe
    removed: Names
    loses: float
    cost: int
    share: float


@dataclass(frozen=True)
class Budget:
    """All that recipes can save of one U-Net.

    Attributes:
        config: Of the U-Net.
        what: Whether parameters count, or the multiply-accumulates of convolutions and linear layers.
        whole: What the U-Net costs.
        saves: What a unit costs where everything around it stays, by its name.
        frames: Each way with the middle and the innermost stages, and what that alone saves. It may be less than
            nothing: without the stages inside of it, the middle block works on larger latents.
    """

    config: Config
    what: What
    whole: int
    saves: Mapping[str, int]
    frames: tuple[tuple[Removals, int], ...]

    @classmethod
    def of(cls, config: Config, what: What, tokens: int = TOKENS) -> "Budget":
        """Count for the U-Net with this config and captions of `tokens` tokens.

        Raises:
            InputError: The config is not one of a U-Net that runs, or of a family that is known.
        """

        def count(cost: UNetCost) -> int:
            return cost.params if what == "params" else cost.macs_modules

        parts = parts_cost(config, {unit.name: unit.paths for unit in units(config)}, tokens=tokens)
        whole, frames = count(unet_cost(config, tokens=tokens)), []
        for kind in removals(config):
            left = derive(recipe_without(config, kind.always, "frame"), config).student_config
            frames.append((kind, whole - count(unet_cost(left, tokens=tokens))))
        return cls(config, what, whole, {name: count(cost) for name, cost in parts.items()}, tuple(frames))

    @property
    def words(self) -> str:
        """What counts, for people."""
        return {"params": "parameters", "gmacs": "multiply-accumulates"}[self.what]

    @property
    def smallest(self) -> float:
        """The share of the U-Net that the smallest recipe keeps."""
        return 1 - max(saved + self._most(kind.groups) for kind, saved in self.frames) / self.whole

    def check(self, share: float) -> None:
        """Refuse a share that no recipe can keep to.

        Raises:
            InputError: Naming the smallest share that one can.
        """
        check_share(self.what, share)
        if self._limit(share) < round(self.smallest * self.whole):
            least = math.ceil(self.smallest * 1e4) / 1e4
            raise InputError(
                f"{self.what} is {share}, and the smallest recipe keeps {least:.4f} of this U-Net's "
                f"{self.words}; give that or more"
            )

    def choose(self, share: float, importance: Mapping[str, float], name: str, summary: str = "") -> Choice:
        """The recipe of at most `share` of the U-Net whose removed units are worth least together.

        Arguments:
            share: In (0, 1).
            importance: What each removable unit is worth, by its name.
            name: What the recipe is called.
            summary: One sentence for people.

        Raises:
            InputError: No recipe is as small as that.
        """
        self.check(share)
        found = []
        for kind, saved in self.frames:
            rest = least_loss(self._items(kind.groups, importance), self.whole - self._limit(share) - saved)
            if rest:
                found.append(Item(saved, _sum(importance, kind.always), kind.always) + rest)
        best = min(found, key=lambda item: item.loses)
        recipe = recipe_without(self.config, best.names, name, summary)
        cost = self.whole - best.saves
        return Choice(recipe, best.names, best.loses, cost, cost / self.whole)

    def _most(self, groups: _Groups) -> int:
        """What can be saved by one choice of each group."""
        return sum(max(self._saved(one.always) + self._most(one.groups) for one in group) for group in groups)

    def _items(self, groups: _Groups, importance: Mapping[str, float]) -> list[list[Item]]:
        """What the choices of each group save and lose, of those within them the ones that no other beats."""
        return [
            [
                Item(self._saved(one.always), _sum(importance, one.always), one.always) + inside
                for one in group
                for inside in frontier(self._items(one.groups, importance))
            ]
            for group in groups
        ]

    def _saved(self, names: Names) -> int:
        return sum(self.saves[name] for name in names)

    def _limit(self, share: float) -> int:
        """The nearest whole number, so that the share that a recipe was seen to keep lets this recipe in."""
        return round(share * self.whole)


def check_share(what: What, share: float) -> None:
    """Refuse what is no share.

    Raises:
        InputError: Naming it.
    """
    if not 0 < share < 1:
        raise InputError(f"{what} is {share}; give a share of the teacher's U-Net between 0 and 1")


def _sum(importance: Mapping[str, float], names: Names) -> float:
    return math.fsum(importance[name] for name in names)
