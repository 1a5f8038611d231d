"""The page and the chart of a sensitivity analysis: bars along the U-Net, from the input to the output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bksdm.common.page import style, svg, write_page, write_png
from bksdm.pruning.sensitivity.outcome import TITLES, Sensitivity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"down": "#2563eb", "mid": "#7c3aed", "innermost": "#c026d3", "up": "#0d9488", "block": "#2563eb"}
_LOGARITHMIC = 100  # ratio of the ends from which bars are drawn on a logarithmic scale
_HATCH, _EDGE = "///", "white"


def write_chart(found: Sensitivity, path: Path) -> None:
    """Write the chart as a PNG."""
    with style():
        write_png(path, _chart(found))


def write_sensitivity_report(found: Sensitivity, out: Path, *, teacher: str, data: str, pictures: int) -> None:
    """Write the page from what was found and from the files of the run.

    Arguments:
        found: The result.
        out: The folder of the run.
        teacher: The MODEL.
        data: What it was measured on.
        pictures: How many pictures that is.
    """
    with style():
        chart = svg(_chart(found))
    write_page(
        out / "report.html",
        "sensitivity.html.jinja",
        found=found,
        titles=TITLES,
        teacher=teacher,
        data=data,
        pictures=pictures,
        chart=chart,
        recipe=(out / "recipe.yaml").read_text(encoding="utf-8") if found.choice else "",
        config=(out / "config.yaml").read_text(encoding="utf-8"),
        made_by=(out / "provenance.json").read_text(encoding="utf-8"),
    )


def _chart(found: Sensitivity) -> Figure:
    """One row of bars for every score; bars of units that no recipe removes are hatched."""
    names = [_short(unit.name) for unit in found.units]
    from matplotlib.figure import Figure  # noqa: PLC0415 - as in `page`
    from matplotlib.patches import Patch  # noqa: PLC0415

    figure = Figure(figsize=(10.4, 1.2 + 1.9 * len(found.scores)), layout="constrained")
    rows = figure.subplots(len(found.scores), 1, squeeze=False, sharex=True)[:, 0]
    removed = found.choice.removed if found.choice else frozenset()
    for axes, (name, values) in zip(rows, found.scores.items(), strict=True):
        for position, unit in enumerate(found.units):
            score, colour = values[unit.name], _COLOURS[unit.kind]
            bar = axes.bar(position, score.value, yerr=score.error, color=colour, ecolor="#374151")
            if not unit.removable:
                bar[0].set(hatch=_HATCH, edgecolor=_EDGE)
        axes.set_title(TITLES[name], loc="left", fontsize=9)
        lowest, highest = (ends(score.value for score in values.values()) for ends in (min, max))
        axes.set_yscale("log" if highest > _LOGARITHMIC * lowest > 0 else "linear")
        axes.axhline(0, color="#9ca3af", linewidth=0.8)
        axes.grid(axis="y", alpha=0.3)
    rows[-1].set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    for label, unit in zip(rows[-1].get_xticklabels(), found.units, strict=True):
        if unit.name in removed:
            label.set_color("#dc2626")
    kinds = dict.fromkeys(unit.kind for unit in found.units)
    keys = [Patch(color=_COLOURS[kind], label=kind) for kind in kinds]
    keys.append(Patch(facecolor="#9ca3af", label="no recipe removes it", hatch=_HATCH, edgecolor=_EDGE))
    figure.legend(handles=keys, loc="outside upper right", ncols=len(keys), fontsize=7)
    if removed:
        figure.supxlabel("names in red: the recipe under the budget removes them", fontsize=7)
    return figure


def _short(name: str) -> str:
    return name.replace("_blocks.", " ").replace(" layer ", ".").replace("_block", "")
