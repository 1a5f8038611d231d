"""What does each way of drawing with less work cost in quality, and what does it save in time?

    python benchmarks/quality_speed.py --out benchmarks/results
    python benchmarks/quality_speed.py --plot docs/images/quality_speed.png     # of the results that are there

Draws the held-out prompts of the embedded art by a model with several schedulers, numbers of steps, intervals of
guidance and reuses, and scores all of them beside its usual way. Times of all take turns in one process. A way is on
the Pareto line where none that is faster has a smaller Fréchet distance. Everything goes on where it stopped.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bksdm.common.page import style, write_png
from bksdm.common.runs import provenance, write_text
from bksdm.evaluate.run import evaluate
from bksdm.evaluate.timing import Interval, take_turns
from bksdm.generate.requests import Request
from bksdm.generate.sampling import sample, scheduler_named
from bksdm.models.drawing import drawing
from bksdm.models.pipelines import load_pipeline, quiet_libraries
from bksdm.options.evaluate import EvaluateOptions
from bksdm.runtime.spared import Spared

SCORES = ("frechet_distance", "clip_score", "retrieval_r1")
FAST = "DPMSolverMultistepScheduler"


@dataclasses.dataclass(frozen=True)
class Way:
    """One of drawing."""

    steps: int
    scheduler: str | None = None
    interval: tuple[float, float] | None = None
    reuse: int | None = None

    def __str__(self) -> str:
        words = [f"{self.steps} steps{' of DPM-Solver++' if self.scheduler else ''}"]
        words += [f"guidance at {self.interval[0]:g} to {self.interval[1]:g}"] if self.interval else []
        words += [f"inside every {self.reuse} steps"] if self.reuse else []
        return ", ".join(words)


def ways(usual: int, interval: tuple[float, float]) -> list[Way]:
    few = [Way(usual), *(Way(steps, FAST) for steps in (10, 6))]
    return [
        dataclasses.replace(way, interval=within, reuse=reuse)
        for way, within, reuse in itertools.product(few, (None, interval), (None, 2, 3))
    ]


def scores(model: str, way: Way, runs: Path) -> dict[str, Any]:
    """What `evaluate` says of pictures drawn that way; prompts and seeds are the same for all."""
    words = (way.steps, way.scheduler, *(way.interval or ()), way.reuse)
    options = EvaluateOptions(
        [f"model={model}"],
        str(runs / "-".join(map(str, words))),
        "emoji/heldout",
        scores=list(SCORES),
        steps=way.steps,
        scheduler=way.scheduler,
        guidance_interval=None if way.interval is None else list(way.interval),
        reuse=way.reuse,
        latency=0,
    )
    found: dict[str, Any] = evaluate(options)["models"]["model"]["scores"]
    return found


def times(model: str, guidance: float, found: list[Way], rounds: int) -> list[list[float]]:
    """Seconds of one picture in every round, for each way."""

    def call(way: Way) -> Callable[[], object]:
        pipeline = load_pipeline(model)
        if way.scheduler:
            pipeline.scheduler = scheduler_named(way.scheduler, pipeline.scheduler)
        spared, asked = Spared(way.interval, way.reuse), [Request("red apple", 0)]
        return lambda: list(sample(pipeline, asked, steps=way.steps, guidance=guidance, spared=spared))

    works = {"picture": [call(way) for way in found]}
    return take_turns(works, rounds=rounds, warmup=1, device=torch.device("cpu"))["picture"]


def table(found: list[Way], scored: list[dict[str, Any]], seconds: list[list[float]]) -> str:
    lines = [
        "| pictures | Fréchet distance | CLIP score | R@1 | seconds a picture | times as fast | Pareto |",
        "|---|---|---|---|---|---|---|",
    ]
    medians = [Interval.of(own).median for own in seconds]
    values = [one["frechet_distance"]["value"] for one in scored]
    for number, (way, one) in enumerate(zip(found, scored, strict=True)):
        faster = Interval.of([many / own for many, own in zip(seconds[0], seconds[number], strict=True)])
        beaten = any(medians[k] < medians[number] and values[k] <= values[number] for k in range(len(found)))
        cells = [str(way), *(cell(one[score]) for score in SCORES), f"{medians[number]:.3f}"]
        cells += [f"{faster.median:.2f} ({faster.low:.2f} to {faster.high:.2f})", "" if beaten else "yes"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(score: dict[str, Any]) -> str:
    return f"{score['value']:.3g} ({score['low']:.3g} to {score['high']:.3g})"


def machine(made_by: dict[str, Any]) -> str:
    """What computed, when, and with which packages."""
    versions = ", ".join(f"{package} {version}" for package, version in made_by["versions"].items())
    return f"{made_by['processors']} cores of {made_by['processor']}, {made_by['started'][:10]}; {versions}."


def plot(ways: dict[str, Any], file: Path) -> None:
    """Fréchet distance against seconds, a line for each number of steps, filled where a way is on the Pareto line."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - nothing else here draws

    with style():
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        medians = {name: Interval.of(way["seconds"]).median for name, way in ways.items()}
        values = {name: way["scores"]["frechet_distance"] for name, way in ways.items()}
        colours: dict[str, str] = {}
        for name in ways:
            group = name.partition(",")[0]
            new = group not in colours
            colour = colours.setdefault(group, f"C{len(colours)}")
            beaten = any(
                medians[other] < medians[name] and values[other]["value"] <= values[name]["value"] for other in ways
            )
            value = values[name]["value"]
            axes.errorbar(
                medians[name],
                value,
                [[value - values[name]["low"]], [values[name]["high"] - value]],
                color=colour,
                marker="s" if "guidance" in name else "o",
                markerfacecolor="white" if beaten else colour,
                elinewidth=0.5,
                label=group if new else None,
            )
            axes.annotate(
                name.rpartition("every ")[2][:1] if "every" in name else "",
                (medians[name], value),
                (4, 4),
                textcoords="offset points",
                fontsize=7,
            )
        axes.set(xlabel="seconds a picture", ylabel="Fréchet distance, 95 % interval")
        axes.grid(alpha=0.3)
        axes.legend(
            title="squares: guidance at 0.3 to 5; numbers: --reuse; filled: Pareto", fontsize=7, title_fontsize=7
        )
        write_png(file, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality_speed"))
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--interval", type=float, nargs=2, default=(0.3, 5.0))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what --out holds, and nothing else")
    given = parser.parse_args()
    if given.plot:
        plot(json.loads((given.out / "quality_speed.json").read_text())["ways"], given.plot)
        return
    quiet_libraries()
    how, made_by = drawing(given.model), provenance()
    found = ways(how.steps, tuple(given.interval))
    scored = [scores(given.model, way, given.runs) for way in found]
    seconds = times(given.model, how.guidance, found, given.rounds)
    shown = table(found, scored, seconds)
    settings = (
        f"{given.model}, guidance {how.guidance:g}, the 75 held-out prompts with 95 % intervals; times of one picture, "
        f"{given.rounds} rounds in turns, {torch.get_num_threads()} threads."
    )
    given.out.mkdir(parents=True, exist_ok=True)
    write_text(given.out / "quality_speed.md", f"{shown}\n\n{settings}\n\n{machine(made_by)}\n")
    record = {str(way): {"scores": one, "seconds": own} for way, one, own in zip(found, scored, seconds, strict=True)}
    write_text(given.out / "quality_speed.json", json.dumps({"ways": record, **made_by}, indent=2) + "\n")
    print(shown)


if __name__ == "__main__":
    main()
