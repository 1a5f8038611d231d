"""One self-contained page about a run: pictures, scores, curves, blocks and cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bksdm.common.assets import EMBEDDED
from bksdm.common.page import curves, shown, write_page
from bksdm.evaluate.table import cell, columns, noise_tables
from bksdm.pruning.cost import UNetCost
from bksdm.pruning.describe import Description

_CURVES = ("task", "output_kd", "feature_kd")


@dataclass(frozen=True)
class Model:
    """One column of the report.

    Attributes:
        name: Shown above its pictures.
        cost: Of its U-Net.
        scores: From `evaluate`.
        seconds_per_picture: Measured latency.
        pictures: In the order of the prompts.
    """

    name: str
    cost: UNetCost
    scores: Mapping[str, Any]
    seconds_per_picture: float
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
    evaluation: Mapping[str, Any],
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
        evaluation: What `evaluate` returned.
        results: What the run measured; shown as provenance.
    """
    write_page(
        path,
        "report.html.jinja",
        models=models,
        rows=[(prompts[n], real[n], [model.pictures[n] for model in models]) for n in shown(len(prompts))],
        columns=columns(evaluation),
        cell=cell,
        noise_tables=noise_tables(evaluation),
        evaluation=evaluation,
        description=description,
        curves=curves(metrics, {name: [name] for name in _CURVES}),
        samples=samples,
        results=results,
        named=_named(str(results["teacher"])),
    )


def _named(teacher: str) -> str:
    """What the page calls the teacher: not by a path, which is nobody's business."""
    return f"the embedded model {teacher}" if teacher in EMBEDDED else Path(teacher).name
