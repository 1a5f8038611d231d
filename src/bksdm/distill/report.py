"""The page of a retraining, `OUT/report.html`: written at every checkpoint, so that it can be watched."""

from pathlib import Path

from bksdm.common.page import curves, write_page
from bksdm.distill.record import read_metrics
from bksdm.pruning.describe import Description

_GRIDS = 12
_TERMS = ("loss", "task", "output_kd", "guided_kd", "feature_kd")
_PACE = {
    "learning rate": "lr",
    "norm of the gradient": "grad_norm",
    "images/s": "images_per_second",
    "peak memory, GiB": "peak_memory_gib",
}


def write_run_report(
    run: Path, description: Description, *, teacher: str, data: str, pictures: int, samples: int, steps: int
) -> None:
    """Write the page from what lies in the folder of a run.

    Arguments:
        run: The folder.
        description: What the recipe does to the teacher.
        teacher: The MODEL that teaches.
        data: What is learnt from.
        pictures: How many pictures that is.
        samples: How many samples have been drawn of them.
        steps: Optimizer steps in all.
    """
    lines = read_metrics(run / "metrics.jsonl")
    if not lines:
        return
    grids = sorted((run / "samples").glob("step-*.png"))
    taps = [name for name in lines[-1] if name.startswith("tap/")]
    write_page(
        run / "report.html",
        "run.html.jinja",
        description=description,
        teacher=teacher,
        data=data,
        pictures=pictures,
        samples=samples,
        steps=steps,
        step=int(lines[-1]["step"]),
        last=lines[-1],
        losses=curves(lines, {name: [name] for name in _TERMS if name in lines[-1]}),
        taps=curves(lines, {name.removeprefix("tap/"): [name] for name in taps}) if taps else "",
        pace=curves(lines, {title: [name] for title, name in _PACE.items()}, linear=list(_PACE)[2:]),
        spikes=[line for line in lines if "spike" in line],
        grids=_spread(grids),
        config=(run / "config.yaml").read_text(encoding="utf-8"),
        made_by=(run / "provenance.json").read_text(encoding="utf-8"),
    )


def _spread(grids: list[Path]) -> list[Path]:
    """Some of the grids, the first and the last with them."""
    if len(grids) <= _GRIDS:
        return grids
    return [grids[round(number * (len(grids) - 1) / (_GRIDS - 1))] for number in range(_GRIDS)]
