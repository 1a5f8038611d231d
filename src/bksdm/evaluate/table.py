"""Scores as a table, for a terminal, a page or a spreadsheet."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from bksdm.common.tables import aligned
from bksdm.evaluate.scores import KINDS

_WAY = ("steps", "guidance")
_FIELDS = ("value", "deviation", "low", "high")


def columns(result: Mapping[str, Any]) -> dict[str, str]:
    """Name -> title of the scores that any model of the result has."""
    found = {name for model in result["models"].values() for name in model["scores"]}
    return {name: kind.title for name, kind in KINDS.items() if name in found}


def text_table(result: Mapping[str, Any]) -> str:
    """One line a model, each score with half its 95 % interval; the real pictures' own scores last.

    Steps and guidance are in it where models have their own.

    Arguments:
        result: What `evaluate` returns.
    """
    titles, models = columns(result), result["models"]
    ways = {tuple(model[name] for name in _WAY) for model in models.values() if "steps" in model}
    way = _WAY if len(ways) > 1 else ()
    rows = [["model", *way, *titles.values()]]
    for name, model in [*models.items(), ("real pictures", result["reference"])]:
        rows.append([name, *(f"{model.get(key, '')}" for key in way), *(cell(model["scores"].get(k)) for k in titles)])
    if not result["reference"]["scores"]:
        rows.pop()
    return aligned(rows)


def cell(score: Mapping[str, float] | None) -> str:
    """A value and half of its interval, to the digits that the interval leaves."""
    if score is None:
        return ""
    half = score["high"] - score["value"]
    return f"{score['value']:.4g} ± {half:.2g}" if half else f"{score['value']:.4g}"


def noise_tables(result: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """By the title of a score, what of the error of pruning is left at every noise level: a header, and a row a level.

    Arguments:
        result: What `evaluate` returns.
    """
    tables = {}
    for score, title in columns(result).items():
        models = {
            name: model["by_noise"][score] for name, model in result["models"].items() if score in model["by_noise"]
        }
        levels: list[dict[str, Any]] = next(iter(models.values()), [])
        rows = [
            [
                "{:.4g} to {:.4g}".format(*level["timesteps"]),
                *(f"{rows[number]['left']:.1%}" for rows in models.values()),
            ]
            for number, level in enumerate(levels)
        ]
        if rows:
            tables[title] = [["timesteps", *models], *rows]
    return tables


def csv_table(result: Mapping[str, Any]) -> str:
    """One line a model and score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "score", *_FIELDS])
    for name, model in [*result["models"].items(), ("real pictures", result["reference"])]:
        for score, values in model["scores"].items():
            writer.writerow([name, score, *(values[field] for field in _FIELDS)])
    return text.getvalue()
