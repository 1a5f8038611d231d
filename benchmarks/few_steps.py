"""What does a student that draws in few steps keep of one that draws in many, and how much faster is it?

    python benchmarks/few_steps.py --out benchmarks/results

Prunes the embedded model, retrains the student, teaches it latent consistency, and scores it at a few numbers of
steps without guidance beside itself before that, with guidance, on the held-out art. Times of all take turns in one
process, each model with its own steps. Everything goes on where it stopped; another
recipe or another retraining needs another `--runs`.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bksdm.common.runs import provenance, write_text
from bksdm.distill.few_steps import lcm
from bksdm.distill.run import distill
from bksdm.evaluate.run import evaluate
from bksdm.evaluate.timing import Interval, take_turns
from bksdm.generate.requests import Request
from bksdm.generate.sampling import sample, scheduler_named
from bksdm.models.pipelines import load_pipeline, quiet_libraries
from bksdm.options.distill import LcmOptions
from bksdm.options.evaluate import EvaluateOptions
from bksdm.options.pruning import PruneOptions
from bksdm.options.quickstart import QuickstartOptions
from bksdm.pruning.run import prune
from bksdm.quickstart.run import distillation

TEACHER, GUIDANCE, MANY = "emoji", 2.5, 25
SCORES = ("frechet_distance", "retrieval_r1")
FAST = "DPMSolverMultistepScheduler"
Way = tuple[str, int, float, str | None]  # of drawing: model, steps, guidance, scheduler


def students(recipe: str, steps: int, options: LcmOptions, runs: Path) -> tuple[str, str, str]:
    """The folders of the retrained student, of the same with the scheduler for few steps, and of the one taught it."""
    pruned = runs / recipe
    prune(PruneOptions(TEACHER, recipe, str(pruned)))
    paced = distillation(QuickstartOptions(steps=steps), runs)
    retrained = distill(dataclasses.replace(paced, student=str(pruned), out=str(runs / "retrained"), sample_every=0))
    taught = dataclasses.replace(options, student=str(retrained))
    untaught = dataclasses.replace(taught, out=f"{options.out}-untaught", steps=1, lr=0.0, warmup=0)
    return str(retrained), str(lcm(untaught)), str(lcm(taught))


def ways(retrained: str, untaught: str, few: str, counts: Sequence[int]) -> dict[str, Way]:
    named: dict[str, Way] = {
        f"retrained, {steps} steps, guidance {GUIDANCE}": (retrained, steps, GUIDANCE, None) for steps in (MANY, 4)
    }
    named |= {
        f"retrained, {steps} steps of DPM-Solver++, guidance {GUIDANCE}": (retrained, steps, GUIDANCE, FAST)
        for steps in (4, 8)
    }
    named["retrained, 4 steps of the few-step scheduler, untaught"] = (untaught, 4, 1.0, None)
    return named | {f"few steps, {steps}": (few, steps, 1.0, None) for steps in counts}


def scores(found: dict[str, Way], runs: Path, limit: int) -> dict[str, dict[str, Any]]:
    """Name -> what `evaluate` says of pictures drawn that way; prompts and seeds are the same for all."""
    results = {}
    for name, (model, steps, guidance, scheduler) in found.items():
        out = runs / "evaluate" / "-".join([Path(model).parent.name, str(steps), *([scheduler] if scheduler else [])])
        options = EvaluateOptions(
            [f"student={model}"],
            str(out),
            "emoji/heldout",
            limit=limit,
            scores=list(SCORES),
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            latency=0,
        )
        results[name] = evaluate(options)["models"]["student"]
    return results


def times(found: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Name -> seconds of one picture in every round."""

    def drawing(model: str, steps: int, guidance: float, scheduler: str | None) -> Callable[[], object]:
        pipeline = load_pipeline(model)
        if scheduler:
            pipeline.scheduler = scheduler_named(scheduler, pipeline.scheduler)
        return lambda: list(sample(pipeline, [Request("red apple", 0)], steps=steps, guidance=guidance))

    calls = [drawing(*way) for way in found.values()]
    seconds = take_turns({"picture": calls}, rounds=rounds, warmup=1, device=torch.device("cpu"))["picture"]
    return dict(zip(found, seconds, strict=True))


def table(scored: dict[str, dict[str, Any]], seconds: dict[str, list[float]]) -> str:
    lines = [
        "| pictures | Fréchet distance (95 % interval) | R@1 (95 % interval) | seconds a picture | times as fast |",
        "|---|---|---|---|---|",
    ]
    first = next(iter(seconds.values()))
    for name, found in scored.items():
        frechet, r1 = (found["scores"][score] for score in SCORES)
        faster = Interval.of([many / own for many, own in zip(first, seconds[name], strict=True)])
        cells = [
            name,
            f"{frechet['value']:.1f} ({frechet['low']:.1f} to {frechet['high']:.1f})",
            f"{r1['value']:.0%} ({r1['low']:.0%} to {r1['high']:.0%})",
            f"{Interval.of(seconds[name]).median:.3f}",
            f"{faster.median:.2f} ({faster.low:.2f} to {faster.high:.2f})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--runs", type=Path, default=Path("runs/few_steps"))
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--retraining_steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--solver_steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--ema_decay", type=float, default=0.95)
    parser.add_argument("--loss", choices=["huber", "l2"], default="huber")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--limit", type=int, default=100, help="prompts that are drawn for the scores")
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    quiet_libraries()
    name = f"lcm-{given.steps}-{given.lr:g}-{given.solver_steps}-{given.guidance:g}-{given.ema_decay:g}-{given.loss}"
    options = LcmOptions(
        TEACHER,
        "",
        "emoji/train",
        str(given.runs / name),
        steps=given.steps,
        solver_steps=given.solver_steps,
        guidance=given.guidance,
        loss=given.loss,
        batch_size=given.batch_size,
        lr=given.lr,
        warmup=min(10, given.steps),
        ema_decay=given.ema_decay,
        flip=False,
        sample_every=0,
        checkpoint_every=50,
    )
    found = ways(*students(given.recipe, given.retraining_steps, options, given.runs), given.counts)
    scored, seconds, made_by = scores(found, given.runs, given.limit), times(found, given.rounds), provenance()
    settings = (
        f"Recipe {given.recipe}, retrained for {given.retraining_steps} steps of 32; then {given.steps} steps of "
        f"{given.batch_size} of lcm, learning rate {given.lr:g}, {given.solver_steps} solver steps, guidance "
        f"{given.guidance:g}, average {given.ema_decay:g}, loss {given.loss}. "
        f"{next(iter(scored.values()))['pictures']} held-out prompts; times of one picture, {given.rounds} rounds "
        "in turns."
    )
    versions = ", ".join(f"{package} {version}" for package, version in made_by["versions"].items())
    machine = f"{made_by['processors']} cores of {made_by['processor']}, {made_by['started'][:10]}; {versions}."
    given.out.mkdir(parents=True, exist_ok=True)
    write_text(given.out / "few_steps.md", f"{table(scored, seconds)}\n\n{settings}\n\n{machine}\n")
    write_text(
        given.out / "few_steps.json", json.dumps({"scores": scored, "seconds": seconds, **made_by}, indent=2) + "\n"
    )
    print(table(scored, seconds))


if __name__ == "__main__":
    main()
