"""One self-contained page about a run: pictures, scores, curves, blocks and cost."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from bksdm.cost import UNetCost
from bksdm.describe import Description
from bksdm.evaluate.table import COLUMNS
from bksdm.runs import write_text

GRID_ROWS = 16
_CURVES = ("task", "output_kd", "feature_kd")


@dataclass(frozen=True)
class Model:
    """One column of the report.

    Attributes:
        name: Shown above its pictures.
        cost: Of its U-Net.
        scores: From `evaluate`.
        seconds_per_picture: Measured latency, where it was measured.
        pictures: In the order of the prompts.
    """

    name: str
    cost: UNetCost
    scores: Mapping[str, Any]
    seconds_per_picture: float | None
    pictures: Sequence[Path]


def write_report(
    path: Path,
    models: Sequence[Model],
    *,
    prompts: Sequence[str],
    real: Sequence[Path],
    description: Description,
    metrics: Sequence[Mapping[str, float]],
    samples: Sequence[Path],
    results: Mapping[str, Any],
) -> None:
    """Write the page.

    Arguments:
        path: The HTML file.
        models: Columns, the teacher first.
        prompts: One a picture.
        real: Real pictures of the prompts.
        description: What the recipe does.
        metrics: Lines of `metrics.jsonl`.
        samples: Grids made while the student was trained.
        results: What the run measured; shown as provenance.
    """
    environment = Environment(loader=PackageLoader("bksdm", "assets"), undefined=StrictUndefined, autoescape=True)
    environment.filters["inline"] = _inline
    rows = range(0, len(prompts), max(1, len(prompts) // GRID_ROWS))
    page = environment.get_template("report.html.jinja").render(
        models=models,
        rows=[(prompts[n], real[n], [model.pictures[n] for model in models]) for n in rows][:GRID_ROWS],
        columns=COLUMNS,
        description=description,
        curves=_curves(metrics),
        samples=samples,
        results=results,
    )
    write_text(path, page)


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _curves(metrics: Sequence[Mapping[str, float]]) -> str:
    """The losses over the steps, as SVG."""
    with mpl.rc_context({"svg.hashsalt": "bksdm", "font.size": 9}):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(_CURVES)), _CURVES, strict=True):
            axes.plot([line["step"] for line in metrics], [line[name] for line in metrics], color="#2563eb")
            axes.set(title=name, xlabel="step", yscale="log")
            axes.grid(alpha=0.3, which="both")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
