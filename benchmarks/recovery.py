"""How much of what pruning loses does retraining win back, by recipe and by budget?

    python benchmarks/recovery.py --out benchmarks/results

Runs the quickstart for every recipe with its own number of steps and with a multiple of it, all
scored on the same held-out prompts and seeds, and writes the table with machine and date. A row that
is measured again takes the place of the earlier one; the others stay.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bksdm.common.runs import write_text
from bksdm.models.pipelines import quiet_libraries
from bksdm.options.quickstart import QuickstartOptions
from bksdm.quickstart.run import quickstart

MADE_BY = ("versions", "python", "processor", "processors", "started")
MODELS = ("teacher", "pruned", "repaired", "retrained")
RECIPES = ("base", "small", "tiny")
KEPT = ("recipe", "steps", "scores", "gap_closed", "seconds_per_picture", "seconds", *MADE_BY)


def run(recipe: str, steps: int, runs: Path) -> dict[str, Any]:
    report = quickstart(QuickstartOptions(out=str(runs / f"{recipe}-{steps}"), recipe=recipe, steps=steps))
    results: dict[str, Any] = json.loads((report.parent / "results.json").read_text())
    return {key: results[key] for key in KEPT}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| recipe | steps | output error: pruned | repaired | retrained | closed | left by noise: repaired | retrained "
        "| Frechet: teacher | pruned | repaired | retrained | closed "
        "| R@1 among 100: teacher | pruned | repaired | retrained |",
        "|" + "---|" * 17,
    ]
    for row in rows:
        scores = [row["scores"][name] for name in MODELS]
        closed = row["gap_closed"]
        cells = [
            row["recipe"],
            str(row["steps"]),
            *(f"{one['output_error']:.4f}" for one in scores[1:]),
            f"{closed['output_error']:.1%}",
            *(f"{one['error_left']:.1%}" for one in scores[2:]),
            *(f"{one['frechet_distance']:.1f}" for one in scores),
            f"{closed['frechet_distance']:.1%}",
            *(f"{one['retrieval_r1']:.0%}" for one in scores),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machines(rows: list[dict[str, Any]]) -> str:
    """Who measured what, a line each."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        made_by = f"{row['processors']} cores of {row['processor']}, {row['started'][:10]}; {versions}"
        lines.setdefault(made_by, []).append(f"{row['recipe']} {row['steps']}")
    return "\n".join(f"{', '.join(measured)}: {made_by}." for made_by, measured in lines.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--runs", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    arguments = parser.parse_args()
    quiet_libraries()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "recovery.json"
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    if results.exists():
        rows = {(row["steps"], row["recipe"]): row for row in json.loads(results.read_text())["rows"]}
    for times in arguments.times:
        for recipe in arguments.recipes:
            steps = QuickstartOptions().steps * times
            rows[steps, recipe] = run(recipe, steps, arguments.runs)
            ordered = [rows[key] for key in sorted(rows)]
            write_text(results, json.dumps({"rows": ordered}, indent=2) + "\n")
            write_text(arguments.out / "recovery.md", f"{table(ordered)}\n\n{machines(ordered)}\n")
    print(table(ordered))


if __name__ == "__main__":
    main()
