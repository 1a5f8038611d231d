"""The quickstart of teachers of several families side by side: what pruning takes, and what retraining wins back.

python examples/emoji/sdxl.py --out runs/sdxl/teacher
for recipe in base small; do
    bksdm quickstart runs/sdxl/$recipe --teacher runs/sdxl/teacher --recipe $recipe
    bksdm quickstart runs/sdxl/emoji-$recipe --recipe $recipe
done
python benchmarks/families.py runs/sdxl/emoji-base runs/sdxl/emoji-small runs/sdxl/base runs/sdxl/small \\
        --picture docs/images/sdxl_small.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bksdm.data.folder import data_folder, read_captions
from bksdm.data.pictures import open_picture
from bksdm.generate.sampling import side_by_side
from bksdm.pruning.describe import describe

_SCORES = {"output_error": ".4f", "frechet_distance": ".1f", "clip_score": ".3f", "retrieval_r1": ".1%"}
_MODELS = ("teacher", "pruned", "retrained")
_EVERY = 7  # of the held-out prompts


def rows(run: Path) -> list[str]:
    """The lines of the table about one quickstart."""
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    made = describe(results["teacher"], results["recipe"])
    params = {"teacher": made.teacher.params, "pruned": made.student.params, "retrained": made.student.params}
    teacher = "embedded" if results["teacher"] == "emoji" else Path(results["teacher"]).parent.name
    found = []
    for model in _MODELS:
        scores = " | ".join(f"{results['scores'][model][name]:{form}}" for name, form in _SCORES.items())
        closed = [f"{results['gap_closed'][name]:.0%}" for name in ("output_error", "frechet_distance")]
        won = " | ".join(closed) if model == "retrained" else " | "
        name = f"{results['recipe']}, {model}" if model != "teacher" else "teacher"
        found.append(f"| {teacher} | {name} | {params[model] / 1e6:.1f} M | {scores} | {won} |")
    return found


def draw(run: Path, file: Path) -> None:
    """Rows of pictures: real, the teacher's, the just pruned student's and the retrained one's; a column a prompt."""
    steps = json.loads((run / "results.json").read_text())["steps"]
    real = [entry.path for entry in read_captions(data_folder("emoji/heldout"))]
    models = [run / "evaluate" / "models" / name for name in ("teacher", "pruned", f"retrained-{steps}")]
    pictures = [real, *(sorted((model / "pictures").glob("*.png")) for model in models)]
    side_by_side([[open_picture(row[n]) for n in range(0, len(real), _EVERY)] for row in pictures]).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path, help="of the last run")
    arguments = parser.parse_args()
    runs = arguments.runs
    if arguments.picture:
        draw(runs[-1], arguments.picture)
    about = json.loads((runs[0] / "results.json").read_text())
    titles = ("teacher", "model", "U-Net", "output error", "Fréchet distance", "CLIP score", "R@1", "closed", "Fréchet")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    print("\n".join(dict.fromkeys(line for run in runs for line in rows(run))))
    print(
        f"\n75 held-out prompts, {about['steps']} steps of 32, seed 0. {about['processor']}, {about['started'][:10]}."
    )


if __name__ == "__main__":
    main()
