"""How much of what pruning loses does retraining win back, by recipe and by budget?

    python benchmarks/recovery.py --out benchmarks/results

Runs the quickstart for every recipe with its own number of steps and with a multiple of it, all
scored on the same held-out prompts and seeds, and writes the table with machine and date.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bksdm.models import quiet_libraries
from bksdm.options import QuickstartOptions
from bksdm.quickstart import quickstart
from bksdm.runs import provenance, write_text

RECIPES = ("base", "small", "tiny")


def run(recipe: str, steps: int, runs: Path) -> dict[str, Any]:
    report = quickstart(QuickstartOptions(out=str(runs / f"{recipe}-{steps}"), recipe=recipe, steps=steps))
    results: dict[str, Any] = json.loads((report.parent / "results.json").read_text())
    return {key: results[key] for key in ("recipe", "steps", "scores", "gap_closed", "seconds_per_picture", "seconds")}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| recipe | steps | output error: pruned | retrained | closed | Frechet: teacher | pruned | retrained | closed "
        "| R@1 among 100: teacher | pruned | retrained |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        teacher, pruned, retrained = (row["scores"][name] for name in ("teacher", "pruned", "retrained"))
        closed = row["gap_closed"]
        cells = [
            row["recipe"],
            str(row["steps"]),
            f"{pruned['output_error']:.4f}",
            f"{retrained['output_error']:.4f}",
            f"{closed['output_error']:.1%}",
            f"{teacher['frechet_distance']:.1f}",
            f"{pruned['frechet_distance']:.1f}",
            f"{retrained['frechet_distance']:.1f}",
            f"{closed['frechet_distance']:.1%}",
            *(f"{scores['retrieval_r1']:.0%}" for scores in (teacher, pruned, retrained)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine(made_by: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made_by["versions"].items())
    return f"{made_by['processors']} cores of {made_by['processor']}, {made_by['started'][:10]}; {versions}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--runs", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10])
    arguments = parser.parse_args()
    quiet_libraries()
    rows, made_by = [], provenance()
    for times in arguments.times:
        for recipe in RECIPES:
            rows.append(run(recipe, QuickstartOptions().steps * times, arguments.runs))
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_text(arguments.out / "recovery.json", json.dumps({**made_by, "rows": rows}, indent=2) + "\n")
            write_text(arguments.out / "recovery.md", f"{table(rows)}\n\n{machine(made_by)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
