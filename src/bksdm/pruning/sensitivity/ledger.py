"""What is scored already: `scores.jsonl`, a line a score; whole at every moment."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from bksdm.common.errors import InputError
from bksdm.common.runs import read_lines, write_text
from bksdm.pruning.sensitivity.measures import Score


class Ledger:
    """The scores of a run by (unit, score).

    Arguments:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scores = {(line["unit"], line["score"]): Score(line["value"], line["error"]) for line in read_lines(path)}

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._scores

    def __getitem__(self, key: tuple[str, str]) -> Score:
        return self._scores[key]

    def missing(self, asked: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Names of the scores that are not there, of those that are asked for by the name of the unit."""
        lacking = {unit: [name for name in names if (unit, name) not in self] for unit, names in asked.items()}
        return {unit: names for unit, names in lacking.items() if names}

    def add(self, unit: str, scores: dict[str, Score]) -> None:
        """Write down scores of a unit.

        Raises:
            InputError: One is not a finite number.
        """
        for name, score in scores.items():
            if not math.isfinite(score.value):
                raise InputError(
                    f"the score {name} of {unit} is {score.value}; choose another --out and --precision fp32"
                )
        self._scores |= {(unit, name): score for name, score in scores.items()}
        lines = [
            {"unit": unit, "score": name, **dataclasses.asdict(score)} for (unit, name), score in self._scores.items()
        ]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
