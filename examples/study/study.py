"""The study of docs/study.md, part by part, each by one command; run again, a part goes on where it stopped.

    python examples/study/study.py sensitivity --out runs/study
    python examples/study/study.py ablation
    python examples/study/study.py options
    python examples/study/study.py start
    python examples/study/study.py budget
    python examples/study/study.py pairs

Every run retrains a student of the embedded teacher for the same few steps on the same pictures and is scored on
prompts that were held out from every training. Tables and plots go to docs/study.
"""

import argparse
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from matplotlib.figure import Figure
from units import damages

from bksdm.common.page import write_png
from bksdm.common.runs import provenance, write_bytes, write_text
from bksdm.data.folder import data_folder, read_captions
from bksdm.data.prepare import prepare
from bksdm.distill.run import distill
from bksdm.evaluate.run import evaluate
from bksdm.models.pipelines import load_pipeline, quiet_libraries
from bksdm.options.data import PrepareOptions
from bksdm.options.distill import DistillOptions
from bksdm.options.evaluate import EvaluateOptions
from bksdm.options.pruning import PruneOptions, SensitivityOptions
from bksdm.pruning.describe import describe
from bksdm.pruning.inherit import save_student, with_denoiser
from bksdm.pruning.run import prune
from bksdm.pruning.sensitivity.outcome import correlation, ranks
from bksdm.pruning.sensitivity.run import sensitivity as measure
from bksdm.pruning.told import read_recipe

TEACHER, TRAIN, HELD_OUT = "emoji", "emoji/train", "emoji/heldout"
BATCH = 16
UNIT_STEPS = 16  # of the teacher without a unit
# How pictures are drawn to be scored: these few steps are as good as 25 of the teacher's own scheduler.
DRAWING: dict[str, Any] = {"scheduler": "DPMSolverMultistepScheduler", "steps": 8, "guidance": 2.5}
RECIPES = ("base", "small", "tiny")
SCORES = ("output_error", "frechet_distance", "clip_score", "retrieval_r1")
RESULTS = Path(__file__).parents[2] / "docs" / "study"
# Student's t at 97.5 %, by the number of seeds: what turns the spread of few seeds into a 95 % interval.
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


@dataclass(frozen=True)
class Study:
    """Where the runs lie and how long each is."""

    out: Path
    steps: int
    seeds: int

    def latents(self) -> Path:
        """The training pictures as latents, made once."""
        prepare(PrepareOptions(TRAIN, TEACHER, str(self.out / "latents"), flip=False, text_embeddings=True))
        return self.out / "latents"

    def pruned(self, recipe: str | Path) -> Path:
        """A student with the teacher's weights."""
        folder = self.out / "students" / Path(recipe).stem
        prune(PruneOptions(TEACHER, str(recipe), str(folder)))
        return folder

    def repaired(self, recipe: str) -> Path:
        """The same after least squares on the training pictures."""
        folder = self.out / "students" / f"{recipe}-repaired"
        prune(PruneOptions(TEACHER, recipe, str(folder), repair=TRAIN))
        return folder

    def random(self, recipe: str) -> Path:
        """A student of the same shape with random weights."""
        folder = self.out / "students" / f"{recipe}-random"
        if not folder.exists():
            pruned = self.pruned(recipe)
            teacher, config = load_pipeline(TEACHER), load_pipeline(pruned).unet.config
            torch.manual_seed(0)
            unet = UNet2DConditionModel.from_config(config)
            card = f"The student of recipe {recipe} with random weights, for comparison.\n"
            save_student(with_denoiser(teacher, unet), read_recipe(pruned), card, folder)
        return folder

    def retrained(self, name: str, student: Path, seed: int = 0, data: Path | None = None, **changes: Any) -> Path:
        """The student after retraining, with some options changed."""
        options = DistillOptions(
            teacher=TEACHER,
            student=str(student),
            data=str(data or self.latents()),
            out=str(self.out / "runs" / f"{name}-{self.steps}-seed{seed}"),
            steps=self.steps,
            batch_size=BATCH,
            accumulation=1,
            lr=1e-3,
            warmup=max(1, self.steps // 10),
            cosine=True,
            ema_decay=0.9,
            flip=False,
            seed=seed,
            sample_every=0,
            checkpoint_every=self.steps,
            keep_checkpoints=1,
        )
        return distill(dataclasses.replace(options, **changes))

    def scored(self, part: str, models: Mapping[str, Path | str], scores: Sequence[str] = SCORES) -> dict[str, Any]:
        """What `evaluate` says of models, by name."""
        return evaluate(
            EvaluateOptions(
                models=[f"{name}={model}" for name, model in models.items()],
                out=str(self.out / f"evaluate-{part}-{self.steps}-{DRAWING['steps']}"),
                reference=HELD_OUT,
                teacher=TEACHER,
                scores=list(scores),
                batch_size=25,
                keep_pictures=False,
                latency=0,
                **DRAWING,
            )
        )


# The parts


def ablation(study: Study) -> None:
    """Teacher or random init x task, + output KD, + feature KD (the paper's table 4), for every recipe."""
    losses: dict[str, dict[str, Any]] = {
        "task": {"output_weight": 0.0, "feature_weight": 0.0},
        "task + output": {"feature_weight": 0.0},
        "task + output + features": {},
    }
    models: dict[str, Path | str] = {"teacher": TEACHER}
    rows: list[dict[str, Any]] = []
    for recipe in RECIPES:
        for init, student in (("random", study.random(recipe)), ("teacher", study.pruned(recipe))):
            for number, (loss, changes) in enumerate(losses.items()):
                name = f"{recipe}-{init}-{number}"
                models[name] = study.retrained(f"ablation-{name}", student, **changes)
                rows.append({"recipe": recipe, "init": init, "loss": loss, "model": name})
    found = study.scored("ablation", models)["models"]
    for row in rows:
        row["scores"] = found[row["model"]]["scores"]
    lines = [[row["recipe"], row["init"], row["loss"], *_cells(row["scores"])] for row in rows]
    lines.append(["teacher", "", "", *_cells(found["teacher"]["scores"])])
    _write("ablation", study, {"rows": rows, "teacher": found["teacher"]["scores"]}, ["recipe", "init", "loss"], lines)
    _plot_ablation(rows, found["teacher"]["scores"])


def options(study: Study) -> None:
    """Plain distillation against each of its options: the same steps, several seeds, recipe small."""
    choices: dict[str, dict[str, Any]] = {
        "plain": {},
        "norm-weighted features": {"normalize_features": True},
        "outlier-masked features": {"mask_features": 2.0},
        "self-attention taps": {"taps": "self_attention"},
        "random conditioning": {"random_conditioning": 5.0},
        "caption dropout": {"caption_dropout": 0.1},
        "guided output": {"guided_output": DRAWING["guidance"]},
    }
    student = study.pruned("small")
    _against_plain("options", study, {name: (student, changes) for name, changes in choices.items()}, SCORES)


def start(study: Study) -> None:
    """From where a student starts, what it is asked and how it steps: the same steps, several seeds, recipe small."""
    pruned, repaired = study.pruned("small"), study.repaired("small")
    muon = {"optimizer": "muon", "lr": 3e-3}
    made_up = {"cutmix": 0.5, "task_weight": 0.0, "lr": 2e-3}
    choices: dict[str, tuple[Path, dict[str, Any]]] = {
        "plain": (pruned, {}),
        "taps at every layer": (pruned, {"taps": "layers"}),
        "captions of others, at every noise level": (pruned, {"random_conditioning": 1.0}),
        "rectangles of others in half of the pictures": (pruned, {"cutmix": 0.5}),
        "the same without the task loss, at 2e-3": (pruned, made_up),
        "Muon at 3e-3": (pruned, muon),
        "from the repaired student": (repaired, {}),
        "from the repaired student, rectangles, no task loss, 2e-3": (repaired, made_up),
        "from the repaired student, Muon at 3e-3": (repaired, muon),
    }
    _against_plain("start", study, choices, ("error_left", *SCORES[1:]), {"pruned": pruned})


def _against_plain(
    part: str,
    study: Study,
    choices: Mapping[str, tuple[Path, dict[str, Any]]],
    scores: Sequence[str],
    beside: Mapping[str, Path | str] | None = None,
) -> None:
    """A table of choices, each a student and its changes of options, over seeds; `beside` is scored with them."""

    slugs = {name: re.sub("[^a-z0-9]+", "-", name.lower()) for name in choices}
    models: dict[str, Path | str] = {
        f"{slugs[name]}-{seed}": study.retrained(f"{part}-{slugs[name]}", student, seed, **changes)
        for name, (student, changes) in choices.items()
        for seed in range(study.seeds)
    }
    found = study.scored(part, models | dict(beside or {}), scores)["models"]
    values = {
        name: {
            score: [found[f"{slug}-{seed}"]["scores"][score]["value"] for seed in range(study.seeds)]
            for score in scores
        }
        for name, slug in slugs.items()
    }
    _write_seeds(part, study, values, "plain")


def budget(study: Study) -> None:
    """The hand-made recipe base against the one that sensitivity chose for as many parameters."""
    chosen = RESULTS / "recipe.yaml"
    shares = {}
    values: dict[str, dict[str, list[float]]] = {}
    for name, recipe in (("base", "base"), ("chosen", str(chosen))):
        description = describe(TEACHER, recipe)
        shares[name] = description.student.params / description.teacher.params
        student = study.pruned(recipe)
        models: dict[str, Path | str] = {
            f"{name}-{seed}": study.retrained(f"budget-{name}", student, seed) for seed in range(study.seeds)
        }
        found = study.scored("budget", models)["models"]
        values[f"{name} ({shares[name]:.1%} of the parameters)"] = {
            score: [model["scores"][score]["value"] for model in found.values()] for score in SCORES
        }
    _write_seeds("budget", study, values, next(iter(values)))


def pairs(study: Study) -> None:
    """Score against the number of training pairs, recipe small, the same steps."""
    every = read_captions(data_folder(TRAIN))
    counts = [count for count in (16, 50, 150, 450) if count < len(every)] + [len(every)]
    student = study.pruned("small")
    models: dict[str, Path | str] = {}
    for count in counts:
        folder = study.out / "pairs" / str(count)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [every[number * len(every) // count] for number in range(count)]
        lines = [json.dumps({"file_name": str(entry.path), "text": entry.text}) + "\n" for entry in kept]
        write_text(folder / "metadata.jsonl", "".join(lines))
        models[f"pairs-{count}"] = study.retrained(f"pairs-{count}", student, data=folder)
    found = study.scored("pairs", models)["models"]
    rows = [{"pairs": count, "scores": found[f"pairs-{count}"]["scores"]} for count in counts]
    _write("pairs", study, {"rows": rows}, ["pairs"], [[str(row["pairs"]), *_cells(row["scores"])] for row in rows])
    _plot_pairs(rows)


def sensitivity(study: Study) -> None:
    """What every unit is worth before retraining and after it, and a recipe with base's share of the parameters."""
    description = describe(TEACHER, "base")
    out = study.out / "sensitivity"
    found = measure(
        SensitivityOptions(
            teacher=TEACHER,
            data=HELD_OUT,
            out=str(out),
            params=description.student.params / description.teacher.params,
            pictures=40,
            batch_size=20,
            **DRAWING,
        )
    )
    left = damages(TEACHER, study.latents(), study.out / "units", steps=UNIT_STEPS, batch_size=BATCH)
    after = list(ranks({name: -value for name, value in left.items()}).values())
    correlations = {score: correlation(list(found.ranks(score).values()), after) for score in found.scores}
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_bytes(RESULTS / "sensitivity.png", (out / "sensitivity.png").read_bytes())
    write_bytes(RESULTS / "recipe.yaml", (out / "recipe.yaml").read_bytes())
    made_by = provenance()
    head, *rows = found.rows()
    table = [[*head[:-1], "output error after retraining (rank)"], ["---"] * len(head)]
    for (name, *cells, _), rank in zip(rows, after, strict=True):
        table.append([name, *cells, f"{left[name]:.3g} ({rank:g})"])
    lines = ["| " + " | ".join(line) + " |" for line in table] + [""]
    lines += [
        f"rank correlation of {score} and the error after retraining: {correlations[score]:.2f}  "
        for score in correlations
    ]
    lines += [
        f"rank correlation of {a} and {b}: {value:.2f}  " for (a, b), value in found.correlations().items() if value
    ]
    lines += ["", "```", found.description.text() if found.description else "", "```", ""]
    lines += [f"40 pictures a unit; {UNIT_STEPS} steps of {BATCH} pictures; {_machine(made_by)}."]
    result = found.to_dict() | {
        "error_after_retraining": left,
        "rank_correlation_with_it": correlations,
        "made_by": made_by,
    }
    write_text(RESULTS / "sensitivity.md", "\n".join(lines) + "\n")
    write_text(RESULTS / "sensitivity.json", json.dumps(result, indent=1) + "\n")
    print("\n".join(lines))


PARTS: dict[str, Callable[[Study], None]] = {
    "sensitivity": sensitivity,
    "ablation": ablation,
    "options": options,
    "start": start,
    "budget": budget,
    "pairs": pairs,
}


# Tables and plots


def _cells(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [f"{scores[name]['value']:.4g} ± {scores[name]['high'] - scores[name]['value']:.2g}" for name in SCORES]


def _machine(made_by: Mapping[str, Any]) -> str:
    return f"{made_by['processors']} cores of {made_by['processor']}, {made_by['started'][:10]}"


def _write(
    part: str,
    study: Study,
    result: Mapping[str, Any],
    heads: Sequence[str],
    lines: Iterable[list[str]],
    scores: Sequence[str] = SCORES,
) -> None:
    """`PART.json` and `PART.md`, with machine and date."""
    made_by = provenance()
    whole = {"steps": study.steps, "batch_size": BATCH, **DRAWING, **result, "made_by": made_by}
    table = [[*heads, *scores], ["---"] * (len(heads) + len(scores)), *lines]
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = "\n".join("| " + " | ".join(line) + " |" for line in table)
    write_text(RESULTS / f"{part}.md", f"{text}\n\n{study.steps} steps of {BATCH} pictures; {_machine(made_by)}.\n")
    write_text(RESULTS / f"{part}.json", json.dumps(whole, indent=1) + "\n")
    print((RESULTS / f"{part}.md").read_text())


def _write_seeds(part: str, study: Study, values: Mapping[str, Mapping[str, list[float]]], plain: str) -> None:
    """Means over the seeds of training, and what each choice gains on `plain` from the same seed."""
    scores = list(values[plain])
    gains = {
        name: {
            score: _interval([b - a for a, b in zip(values[plain][score], own[score], strict=True)]) for score in scores
        }
        for name, own in values.items()
    }
    lines = []
    for name, own in values.items():
        cells = []
        for score in scores:
            gain, half = gains[name][score]
            sure = " *" if name != plain and abs(gain) > half else ""
            difference = "" if name == plain else f" ({gain:+.2g} ± {half:.2g}{sure})"
            cells.append(f"{statistics.mean(own[score]):.4g}{difference}")
        lines.append([name, *cells])
    result = {"values": values, "differences": {name: dict(own) for name, own in gains.items()}, "seeds": study.seeds}
    _write(part, study, result, ["choice"], lines, scores)
    _plot_gains(part, gains, plain)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval from few values (Student's t)."""
    if len(values) < 2:
        return values[0], math.inf
    return statistics.mean(values), STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def _save(figure: Figure, name: str) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_png(RESULTS / f"{name}.png", figure, dpi=110)


def _plot_ablation(rows: Sequence[Mapping[str, Any]], teacher: Mapping[str, Any]) -> None:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for one, score in zip(axes, ("output_error", "frechet_distance"), strict=True):
        for number, recipe in enumerate(dict.fromkeys(row["recipe"] for row in rows)):
            for init, style in (("random", ":"), ("teacher", "-")):
                own = [row for row in rows if (row["recipe"], row["init"]) == (recipe, init)]
                values = [row["scores"][score] for row in own]
                heights = [value["value"] for value in values]
                halves = [value["high"] - value["value"] for value in values]
                label = f"{recipe}, {init} weights"
                one.errorbar(
                    range(len(own)), heights, halves, fmt=f"o{style}", color=f"C{number}", capsize=3, label=label
                )
        one.axhline(teacher[score]["value"], color="grey", linewidth=1)
        one.set_xticks(range(3), ["task", "+ output", "+ features"])
        one.set_title(score.replace("_", " "))
        one.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    _save(figure, "ablation")


def _plot_gains(part: str, gains: Mapping[str, Mapping[str, tuple[float, float]]], plain: str) -> None:
    figure = Figure(figsize=(10, 0.42 * len(gains) + 1), layout="constrained")
    scores = list(gains[plain])
    axes = figure.subplots(1, len(scores), sharey=True)
    names = [name for name in gains if name != plain]
    for one, score in zip(axes, scores, strict=True):
        values = [gains[name][score] for name in names]
        one.errorbar([v for v, _ in values], range(len(names)), xerr=[half for _, half in values], fmt="o", capsize=3)
        one.axvline(0, color="grey", linewidth=1)
        one.set_yticks(range(len(names)), names, fontsize=8)
        one.set_title(f"{score.replace('_', ' ')}, less {plain.partition(' (')[0]}", fontsize=9)
        one.grid(alpha=0.3)
    _save(figure, part)


def _plot_pairs(rows: Sequence[Mapping[str, Any]]) -> None:
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for one, score in zip(figure.subplots(1, len(SCORES)), SCORES, strict=True):
        values = [row["scores"][score] for row in rows]
        halves = [value["high"] - value["value"] for value in values]
        one.errorbar([row["pairs"] for row in rows], [value["value"] for value in values], halves, fmt="o-", capsize=3)
        one.set(xscale="log", xlabel="training pairs", title=score.replace("_", " "))
        one.grid(alpha=0.3)
    _save(figure, "pairs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    quiet_libraries()
    PARTS[arguments.part](Study(arguments.out, arguments.steps, arguments.seeds))


if __name__ == "__main__":
    main()
