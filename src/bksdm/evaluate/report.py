"""The page of an evaluation: table, pictures by prompt and model, and quality against what a model costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from bksdm.common.page import svg, write_page, write_png
from bksdm.common.runs import write_text
from bksdm.evaluate.scores import KINDS
from bksdm.evaluate.table import cell, columns, csv_table, noise_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COSTS = {
    "params": ("U-Net parameters, million", 1e-6),
    "gmacs_all": ("U-Net MACs with attention, G", 1),
    "seconds_per_picture": ("seconds a picture", 1),
}

Row = tuple[str, Image.Image | None, Sequence[Path]]


def write_evaluation(out: Path, result: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write `scores.csv`, `quality.png` and `report.html`.

    Arguments:
        out: The folder.
        result: What `evaluate` returns.
        rows: Prompt, real picture or None, and the picture of every model that draws.
    """
    write_text(out / "scores.csv", csv_table(result))
    figure = quality(result)
    if figure:
        write_png(out / "quality.png", figure)
    write_page(
        out / "report.html",
        "evaluation.html.jinja",
        result=result,
        columns=columns(result),
        cell=cell,
        noise_tables=noise_tables(result),
        kinds=KINDS,
        drawn=[name for name, model in result["models"].items() if "params" in model],
        rows=rows,
        quality=svg(figure) if figure else "",
        against_first=[item for item in result["differences"] if item["first"] == next(iter(result["models"]))],
    )


def quality(result: Mapping[str, Any]) -> Figure | None:
    """Every score against parameters, MACs and latency, with 95 % intervals; None where nothing draws."""
    models = {name: model for name, model in result["models"].items() if "params" in model}
    titles = columns(result)
    costs = {name: how for name, how in _COSTS.items() if all(name in model for model in models.values())}
    if not models or not titles:
        return None
    height = 2.4 * len(titles)
    from matplotlib.figure import Figure  # noqa: PLC0415 - as in `page`

    figure = Figure(figsize=(10.4, height))
    figure.subplots_adjust(0.08, 0.55 / height, 0.99, 1 - 0.15 / height, wspace=0.25, hspace=0.35)
    grid = figure.subplots(len(titles), len(costs), squeeze=False, sharey="row")
    for line, (score, title) in zip(grid, titles.items(), strict=True):
        for axes, (cost, (label, scale)) in zip(line, costs.items(), strict=True):
            for number, (name, model) in enumerate(models.items()):
                if score in model["scores"]:
                    values = model["scores"][score]
                    half = values["high"] - values["value"]
                    axes.errorbar(
                        model[cost] * scale, values["value"], half, fmt="o", capsize=3, color=f"C{number}", label=name
                    )
            axes.grid(alpha=0.3)
            axes.set_xlabel(label if line is grid[-1] else "")
        line[0].set_ylabel(f"{title} ({'less' if KINDS[score].less_is_better else 'more'} is better)", fontsize=8)
    grid[0][0].legend(fontsize=7)
    return figure
