"""Scores as a table for a terminal."""

from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "frechet_distance": "Frechet distance",
    "clip_score": "CLIP score",
    "retrieval_r1": "R@1",
    "output_error": "output error",
}


def text_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a model; the real pictures' own scores last."""
    rows = [["model", *COLUMNS.values()]]
    for name, values in scores.items():
        rows.append([name, *(_number(values.get(key)) for key in COLUMNS)])
    reference = next(iter(scores.values()))["reference"]
    rows.append(["real pictures", *(_number(reference.get(key)) for key in COLUMNS)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
