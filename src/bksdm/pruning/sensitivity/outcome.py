"""What a sensitivity analysis has found: for people a table, for programs JSON and CSV."""

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bksdm.common.tables import aligned
from bksdm.families.units import Unit
from bksdm.pruning.budget import Choice
from bksdm.pruning.cost import UNetCost
from bksdm.pruning.describe import Description
from bksdm.pruning.sensitivity.measures import Score

TITLES = {
    "output": "output loss",
    "frechet": "rise of Frechet distance",
    "clip": "fall of CLIP score",
    "latents": "shift of latents",
}


@dataclass(frozen=True)
class Sensitivity:
    """What the units of a U-Net are worth.

    Attributes:
        units: As the data meets them.
        costs: Of each, by its name.
        scores: By the score's name, then the unit's.
        whole: Frechet distance and CLIP score of the whole teacher, where they were asked for.
        choice: The recipe under the budget, where there is one.
        description: What that recipe leaves.
    """

    units: tuple[Unit, ...]
    costs: Mapping[str, UNetCost]
    scores: Mapping[str, Mapping[str, Score]]
    whole: Mapping[str, float]
    choice: Choice | None = None
    description: Description | None = None

    def ranks(self, score: str) -> dict[str, float]:
        """1 for the unit that is worth most; the mean of their ranks for equals."""
        return ranks({unit.name: -self.scores[score][unit.name].value for unit in self.units})

    def correlations(self) -> dict[tuple[str, str], float | None]:
        """Spearman's correlation of every two scores' rankings."""
        ranked = {score: list(self.ranks(score).values()) for score in self.scores}
        return {pair: correlation(*(ranked[score] for score in pair)) for pair in itertools.combinations(ranked, 2)}

    def to_dict(self) -> dict[str, Any]:
        """The object that `bksdm sensitivity --json` prints."""
        return {
            "whole": dict(self.whole),
            "units": [self._unit(unit) for unit in self.units],
            "rank_correlation": {" and ".join(pair): value for pair, value in self.correlations().items()},
            "recipe": self._recipe(),
        }

    def _unit(self, unit: Unit) -> dict[str, Any]:
        cost = self.costs[unit.name]
        return {
            "name": unit.name,
            "kind": unit.kind,
            "modules": list(unit.paths),
            "params": cost.params,
            "gmacs_modules": round(cost.gmacs_modules, 6),
            "gmacs_all": round(cost.gmacs_all, 6),
            "removable": unit.removable,
            "why_it_stays": unit.why_it_stays or None,
            "scores": {
                score: {
                    "value": values[unit.name].value,
                    "error": values[unit.name].error,
                    "rank": self.ranks(score)[unit.name],
                }
                for score, values in self.scores.items()
            },
        }

    def _recipe(self) -> dict[str, Any] | None:
        if self.choice is None or self.description is None:
            return None
        return {
            **self.description.to_dict(),
            "removed_units": [unit.name for unit in self.units if unit.name in self.choice.removed],
            "share": self.choice.share,
            "loses": self.choice.loses,
        }

    def csv(self) -> str:
        """One line a unit."""
        text = io.StringIO()
        columns = [f"{score}{suffix}" for score in self.scores for suffix in ("", "_error", "_rank")]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["unit", "kind", "params", "gmacs_modules", "removable", *columns])
        for unit in map(self._unit, self.units):
            scores = [unit["scores"][score][key] for score in self.scores for key in ("value", "error", "rank")]
            plain = (unit[key] for key in ("name", "kind", "params", "gmacs_modules", "removable"))
            writer.writerow([*plain, *scores])
        return text.getvalue()

    def rows(self) -> list[list[str]]:
        """The table's cells, its head first."""
        rows = [["unit", "M params", "GMACs", *(TITLES[score] for score in self.scores), ""]]
        ranks = {score: self.ranks(score) for score in self.scores}
        for unit in self.units:
            cost = self.costs[unit.name]
            cells = [
                f"{values[unit.name].value:.3g} ± {values[unit.name].error:.1g} ({ranks[score][unit.name]:g})"
                for score, values in self.scores.items()
            ]
            stays = f"stays: {unit.why_it_stays}" if unit.why_it_stays else ""
            rows.append([unit.name, f"{cost.params / 1e6:.4g}", f"{cost.gmacs_modules:.3g}", *cells, stays])
        return rows

    def text(self) -> str:
        """The table, the correlations and the recipe."""
        lines = [aligned(self.rows()), "value ± standard error (rank)"]
        for (a, b), value in self.correlations().items():
            if value is not None:
                lines.append(f"rank correlation of {TITLES[a]} and {TITLES[b]}: {value:.2f}")
        if self.description:
            lines += ["", self.description.text()]
        return "\n".join(lines)


def ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Ranks from 1, the lowest value first; equal values share the mean of theirs."""
    ordered = sorted(values.values())
    return {name: ordered.index(value) + (ordered.count(value) + 1) / 2 for name, value in values.items()}


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's correlation, which of ranks is Spearman's; None where all of one are equal."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    shared = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return shared / spread**0.5 if spread else None
