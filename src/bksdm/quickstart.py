"""`bksdm quickstart`: the whole story on the embedded model, in minutes on two cores.

Describe, prune, retrain, generate the same prompts and seeds from teacher, just-pruned and
retrained student, score all three, and write it down as one page.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bksdm.benchmark import latencies
from bksdm.data.folder import data_folder, read_captions, read_prompts
from bksdm.describe import Description, describe
from bksdm.devices import choose_device, choose_precision
from bksdm.distill.record import read_metrics
from bksdm.distill.run import distill
from bksdm.errors import InputError
from bksdm.evaluate.run import evaluate
from bksdm.evaluate.table import text_table
from bksdm.models import load_pipeline
from bksdm.options import DistillOptions, EvaluateOptions, PruneOptions, QuickstartOptions
from bksdm.prune import prune
from bksdm.recipe import load_recipe
from bksdm.report import Model, write_report
from bksdm.runs import open_run, provenance, write_text

TEACHER = "emoji"
HELD_OUT = "emoji/heldout"
STEPS, GUIDANCE = 25, 2.5
_LATENCY_ROUNDS = 5


def quickstart(options: QuickstartOptions) -> Path:
    """Run the story; the same options again go on where it stopped.

    Returns:
        The report, `OUT/report.html`.

    Raises:
        InputError: An option is unfit; see the message.
    """
    if options.steps < 1:
        raise InputError(f"steps is {options.steps}; give at least 1")
    recipe = load_recipe(options.recipe)
    if not describe(TEACHER, recipe).pruning.removed:
        raise InputError(f"recipe {options.recipe} removes nothing, so there is nothing to retrain; give another")
    made_by = provenance()
    out = open_run(Path(options.out), "quickstart", dataclasses.asdict(options), may_change=("steps",))
    folders = _Folders(out, options.steps)
    console = Console(stderr=True)
    clock = _Clock(console, out / "seconds.json")

    with clock.phase(f"prune: {options.recipe}"):
        description = prune(PruneOptions(TEACHER, options.recipe, str(folders.pruned)))
        console.print(description.text(), highlight=False, markup=False)
    with clock.phase(f"distill: {options.steps} steps"):
        retrained = distill(distillation(options, out))
    models = {"teacher": TEACHER, "pruned": str(folders.pruned), "retrained": str(retrained)}
    with clock.phase(f"generate and evaluate: teacher, pruned, retrained for {options.steps} steps"):
        scores = {name: evaluate(_evaluation(model, folders.evaluation(name))) for name, model in models.items()}
    with clock.phase("measure latency"):
        device = choose_device()
        dtype = choose_precision("auto", device, training=False)
        timed = {name: load_pipeline(models[name], dtype).to(device) for name in ("teacher", "retrained")}
        pace = latencies(timed, steps=STEPS, guidance=GUIDANCE, rounds=_LATENCY_ROUNDS)

    closed = {score: gap_closed(scores, score) for score in ("output_error", "frechet_distance")}
    results = {
        "recipe": options.recipe,
        "steps": options.steps,
        "scores": scores,
        "gap_closed": closed,
        "sampling": {"denoising_steps": STEPS, "guidance": GUIDANCE},
        "seconds_per_picture": {name: spread.median for name, spread in pace.items()},
        "device": str(device),
        "seconds": clock.seconds,
        **made_by,
    }
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    _report(folders, description, results)
    console.print(text_table(scores), highlight=False, markup=False)
    return out / "report.html"


@dataclass(frozen=True)
class _Folders:
    """Where the story keeps its parts; the student after more steps is another one."""

    out: Path
    steps: int

    @property
    def pruned(self) -> Path:
        return self.out / "pruned"

    @property
    def distillation(self) -> Path:
        return self.out / f"distill-{self.steps}"

    def evaluation(self, model: str) -> Path:
        return self.out / "evaluate" / (f"{model}-{self.steps}" if model == "retrained" else model)


def distillation(options: QuickstartOptions, out: Path) -> DistillOptions:
    """How the quickstart retrains: the paper's losses, paced for a small model and few steps."""
    return DistillOptions(
        teacher=TEACHER,
        student=str(_Folders(out, options.steps).pruned),
        data="emoji/train",
        out=str(_Folders(out, options.steps).distillation),
        steps=options.steps,
        batch_size=32,
        accumulation=1,
        lr=1e-3,
        warmup=10,
        cosine=True,
        ema_decay=0.97,
        flip=False,
        seed=options.seed,
        sample_every=max(1, options.steps // 4),
        sample_guidance=GUIDANCE,
        checkpoint_every=50,
    )


def gap_closed(scores: dict[str, dict[str, Any]], score: str) -> float:
    """Share of the distance from just-pruned to teacher that retraining closed; for scores where less is better."""
    pruned, retrained = scores["pruned"][score], scores["retrained"][score]
    return float((pruned - retrained) / (pruned - scores["teacher"][score]))


def _evaluation(model: str, out: Path) -> EvaluateOptions:
    return EvaluateOptions(
        model=model, out=str(out), reference=HELD_OUT, teacher=TEACHER, steps=STEPS, guidance=GUIDANCE, batch_size=25
    )


def _report(folders: _Folders, description: Description, results: dict[str, Any]) -> None:
    costs = {"teacher": description.teacher, "pruned": description.student, "retrained": description.student}
    models = [
        Model(
            name=name,
            cost=cost,
            scores=results["scores"][name],
            seconds_per_picture=results["seconds_per_picture"].get(name),
            pictures=sorted((folders.evaluation(name) / "pictures").glob("*.png")),
        )
        for name, cost in costs.items()
    ]
    write_report(
        folders.out / "report.html",
        models,
        prompts=read_prompts(HELD_OUT),
        real=[entry.path for entry in read_captions(data_folder(HELD_OUT))],
        description=description,
        metrics=read_metrics(folders.distillation / "metrics.jsonl"),
        samples=sorted((folders.distillation / "samples").glob("*.png")),
        results=results,
    )


class _Clock:
    """Says which phase runs, and keeps how long each took until it was done, over all calls of the command."""

    def __init__(self, console: Console, file: Path) -> None:
        self._console = console
        self._file = file
        self._kept: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._console.rule(name, align="left")
        began, done = time.perf_counter(), False
        try:
            yield
            done = True
        finally:
            spent = time.perf_counter() - began + self._kept.get(f"before {name}", 0.0)
            self._kept.setdefault(name, spent) if done else self._kept.update({f"before {name}": spent})
            write_text(self._file, json.dumps(self._kept, indent=2) + "\n")
        self.seconds[name] = round(self._kept[name], 1)
