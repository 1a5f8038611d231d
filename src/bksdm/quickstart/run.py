"""`bksdm quickstart`: the whole story on the embedded art, in minutes on two cores.

Describe, prune, repair, retrain, generate the same prompts and seeds from the teacher and from the student after
each of these, score all four, and write it down as one page.
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

from bksdm.common.assets import ART
from bksdm.common.devices import choose_device
from bksdm.common.errors import InputError
from bksdm.common.runs import open_run, provenance, write_text
from bksdm.data.folder import data_folder, read_captions
from bksdm.data.prompts import read_prompts
from bksdm.distill.record import read_metrics
from bksdm.distill.run import distill
from bksdm.evaluate.run import evaluate
from bksdm.evaluate.scores import LEFT, LEFT_UNSEEN
from bksdm.evaluate.table import text_table
from bksdm.families.recipe import load_recipe
from bksdm.models.configs import check_ready, family_of_model, load_denoiser_config
from bksdm.models.drawing import FAST_SCHEDULER, FAST_STEPS, drawing
from bksdm.models.folders import fingerprint
from bksdm.options.distill import DistillOptions
from bksdm.options.evaluate import EvaluateOptions
from bksdm.options.pruning import PruneOptions
from bksdm.options.quickstart import QuickstartOptions
from bksdm.pruning.describe import Description, describe
from bksdm.pruning.run import prune
from bksdm.quickstart.report import Model, write_report

TRAIN, HELD_OUT, UNSEEN = f"{ART}/train", f"{ART}/heldout", f"{ART}/unseen"
_SCORES = ("frechet_distance", "clip_score", "retrieval_r1", "output_error", LEFT, LEFT_UNSEEN)
_LATENCY_ROUNDS = 5


def quickstart(options: QuickstartOptions) -> Path:
    """Run the story; the same options again go on where it stopped.

    Returns:
        The report, `OUT/report.html`.

    Raises:
        InputError: An option is unfit; see the message.
    """
    check_ready("quickstart", options.teacher)
    if options.steps < 1:
        raise InputError(f"steps is {options.steps}; give at least 1")
    recipe = load_recipe(options.recipe)
    if not describe(options.teacher, recipe).pruning.removed:
        raise InputError(f"recipe {options.recipe} removes nothing, so there is nothing to retrain; give another")
    made_by = provenance()
    settings = dataclasses.asdict(options) | {"teacher_content": fingerprint(options.teacher)}
    out = open_run(Path(options.out), "quickstart", settings, may_change=("steps",))
    folders = _Folders(out, options.steps)
    console = Console(stderr=True)
    clock = _Clock(console, out / "seconds.json")

    with clock.phase(f"prune: {options.recipe}"):
        description = prune(PruneOptions(options.teacher, options.recipe, str(folders.pruned)))
        console.print(description.text(), highlight=False, markup=False)
    with clock.phase("repair: least squares"):
        prune(repairing(options, out))
    with clock.phase(f"distill: {options.steps} steps"):
        retrained = distill(distillation(options, out))
    models = {
        "teacher": options.teacher,
        "pruned": str(folders.pruned),
        "repaired": str(folders.repaired),
        "retrained": str(retrained),
    }
    with clock.phase(f"generate and evaluate: teacher, pruned, repaired, retrained for {options.steps} steps"):
        asked = _evaluation(models, folders)
        evaluation = evaluate(asked)
    found = {name: evaluation["models"][folders.name(name)] for name in models}
    scores = {name: {score: item["value"] for score, item in model["scores"].items()} for name, model in found.items()}
    closed = {score: gap_closed(scores, score) for score in ("output_error", LEFT, LEFT_UNSEEN, "frechet_distance")}
    how = drawing(options.teacher, asked.steps)
    results = {
        "teacher": options.teacher,
        "recipe": options.recipe,
        "steps": options.steps,
        "scores": scores,
        "gap_closed": closed,
        "sampling": {"denoising_steps": how.steps, "guidance": how.guidance},
        "seconds_per_picture": {name: model["seconds_per_picture"] for name, model in found.items()},
        "device": str(choose_device()),
        "seconds": clock.seconds,
        **made_by,
    }
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    _report(folders, description, results, evaluation)
    console.print(text_table(evaluation), highlight=False, markup=False)
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
    def repaired(self) -> Path:
        return self.out / "repaired"

    @property
    def distillation(self) -> Path:
        return self.out / f"distill-{self.steps}"

    @property
    def evaluation(self) -> Path:
        return self.out / "evaluate"

    def name(self, model: str) -> str:
        """What a model is called in the evaluation."""
        return f"{model}-{self.steps}" if model == "retrained" else model

    def pictures(self, model: str) -> list[Path]:
        return sorted((self.evaluation / "models" / self.name(model) / "pictures").glob("*.png"))


def repairing(options: QuickstartOptions, out: Path) -> PruneOptions:
    """How the quickstart repairs: on pictures that it trains on."""
    folders = _Folders(out, options.steps)
    return PruneOptions(options.teacher, options.recipe, str(folders.repaired), repair=TRAIN, seed=options.seed)


def distillation(options: QuickstartOptions, out: Path) -> DistillOptions:
    """How the quickstart retrains: the paper's losses, paced for a small model and few steps (docs/log.md).

    Guidance asks for the answer to the empty prompt at every step, which is won back only where it is met. At high
    noise the caption is all that a model goes by, so it is asked about many.
    """
    folders = _Folders(out, options.steps)
    plain = DistillOptions(
        teacher=options.teacher,
        student=str(folders.repaired),
        data=TRAIN,
        out=str(folders.distillation),
        steps=options.steps,
        batch_size=32,
        accumulation=1,
        lr=3e-4,
        warmup=10,
        cosine=True,
        caption_dropout=0.2,
        random_conditioning=1.0,
        ema_decay=0.97,
        flip=False,
        seed=options.seed,
        sample_every=max(1, options.steps // 4),
        checkpoint_every=50,
    )
    return _of_blocks(plain) if _has_blocks(options.teacher) else plain


def _has_blocks(teacher: str) -> bool:
    """Whether it is a stack of blocks, and no U-Net."""
    return bool(family_of_model(teacher).depths(load_denoiser_config(teacher)))


def _of_blocks(plain: DistillOptions) -> DistillOptions:
    """The same for a stack of blocks, which has learnt more of as many pictures so (docs/log.md).

    Its features grow with depth.
    """
    return dataclasses.replace(
        plain,
        steps=4 * plain.steps,
        batch_size=plain.batch_size // 4,
        optimizer="muon",
        lr=1.4e-3,
        warmup=4 * plain.warmup,
        ema_decay=0.98,
        normalize_features=True,
        caption_dropout=0.15,
        sample_every=4 * plain.sample_every,
        checkpoint_every=4 * plain.checkpoint_every,
    )


def gap_closed(scores: dict[str, dict[str, Any]], score: str) -> float:
    """Share of the distance from just-pruned to teacher that retraining closed; for scores where less is better."""
    pruned, retrained = scores["pruned"][score], scores["retrained"][score]
    return float((pruned - retrained) / (pruned - scores["teacher"][score]))


def _evaluation(models: dict[str, str], folders: _Folders) -> EvaluateOptions:
    few = not _has_blocks(models["teacher"]) and drawing(models["teacher"]).steps > FAST_STEPS
    return EvaluateOptions(
        models=[f"{folders.name(name)}={model}" for name, model in models.items()],
        out=str(folders.evaluation),
        reference=HELD_OUT,
        encoder=ART,
        distractors=TRAIN,
        scores=list(_SCORES),
        teacher=models["teacher"],
        unseen=UNSEEN,
        batch_size=25,
        latency=_LATENCY_ROUNDS,
        steps=FAST_STEPS if few else None,
        scheduler=FAST_SCHEDULER if few else None,
    )


def _report(folders: _Folders, description: Description, results: dict[str, Any], evaluation: dict[str, Any]) -> None:
    models = [
        Model(
            name=name,
            cost=description.teacher if name == "teacher" else description.student,
            scores=evaluation["models"][folders.name(name)]["scores"],
            seconds_per_picture=results["seconds_per_picture"][name],
            pictures=folders.pictures(name),
        )
        for name in results["scores"]
    ]
    write_report(
        folders.out / "report.html",
        models,
        prompts=read_prompts(HELD_OUT),
        real=[entry.path for entry in read_captions(data_folder(HELD_OUT))],
        description=description,
        metrics=read_metrics(folders.distillation / "metrics.jsonl"),
        samples=sorted((folders.distillation / "samples").glob("*.png")),
        evaluation=evaluation,
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
