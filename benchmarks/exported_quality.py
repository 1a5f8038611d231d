"""What do pictures lose to arithmetic of 8 bits and to the ways of drawing with less work, together?

    python benchmarks/exported_quality.py --out benchmarks/results

Exports the embedded model for OpenVINO in w8a8, calibrated on a few captions of its training pictures, once as it is
and once with pooled keys, draws the held-out prompts by several ways beside torch's float32, and scores all at once.
What was exported or drawn stays, and the same command goes on.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from quality_speed import FAST, SCORES, Way, cell, machine

from bksdm.common.runs import provenance, write_text
from bksdm.data.prompts import read_prompts
from bksdm.evaluate.run import evaluate
from bksdm.export.run import export
from bksdm.generate.run import generate
from bksdm.models.pipelines import quiet_libraries
from bksdm.options.evaluate import EvaluateOptions
from bksdm.options.export import ExportOptions
from bksdm.options.generate import GenerateOptions

MODEL, HELD_OUT, TRAINING = "emoji", "emoji/heldout", "emoji/train"
CALIBRATION = 16  # captions, of each of which eight steps are looked at
WAYS = (
    Way(25),
    Way(10, FAST, reuse=3),
    Way(10, FAST, (0.3, 5.0), 3),
    Way(10, FAST, (0.3, 5.0), 4),
    Way(6, FAST, reuse=2),
    Way(6, FAST, (0.3, 5.0), 2),
)


def exported(pool_keys: int | None, runs: Path) -> str:
    """Its folder."""
    folder = runs / f"w8a8-keys{pool_keys or 1}"
    if not folder.exists():
        captions = read_prompts(TRAINING, "calibration")
        file = runs / "calibration.txt"
        write_text(file, "".join(f"{text}\n" for text in captions[:: len(captions) // CALIBRATION][:CALIBRATION]))
        options = ExportOptions(MODEL, "openvino", str(folder), "w8a8", calibration=str(file))
        export(dataclasses.replace(options, pool_keys=pool_keys))
    return str(folder)


def drawn(model: str, runtime: Any, way: Way, pool_keys: int | None, out: Path) -> None:
    """Pictures of the held-out prompts, one a prompt, with seeds from 0."""
    prompts = out.parent / "prompts.txt"
    write_text(prompts, "".join(f"{prompt}\n" for prompt in read_prompts(HELD_OUT, "prompts")))
    generate(
        GenerateOptions(
            model,
            str(out),
            prompts=str(prompts),
            runtime=runtime,
            steps=way.steps,
            scheduler=way.scheduler,
            guidance_interval=None if way.interval is None else list(way.interval),
            reuse=way.reuse,
            pool_keys=pool_keys,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--runs", type=Path, default=Path("runs/exported_quality"))
    given = parser.parse_args()
    quiet_libraries()
    given.runs.mkdir(parents=True, exist_ok=True)
    folders: dict[str, Path] = {}
    for pool_keys in (None, 2):
        for runtime, model in (("torch", MODEL), ("auto", exported(pool_keys, given.runs))):
            for way in WAYS:
                arithmetic = "fp32" if model == MODEL else "w8a8"
                name = f"{arithmetic}, {way}{', keys pooled' if pool_keys else ''}"
                folders[name] = given.runs / "".join(c if c.isalnum() else "-" for c in name)
                drawn(model, runtime, way, pool_keys, folders[name])
    options = EvaluateOptions(
        [f"{folder.name}={folder}" for folder in folders.values()],
        str(given.runs / "scores"),
        HELD_OUT,
        encoder=MODEL,
        distractors=TRAINING,
        scores=list(SCORES),
        latency=0,
    )
    found = evaluate(options)
    ways = {name: found["models"][folder.name]["scores"] for name, folder in folders.items()}
    first = next(iter(folders.values())).name
    others = {(one["second"], one["score"]) for one in found["differences"] if one["first"] == first and one["real"]}
    lines = ["| pictures | Fréchet distance | CLIP score | R@1 |", "|---|---|---|---|"]
    for name, scores in ways.items():
        marks = ["*" if (folders[name].name, score) in others else "" for score in SCORES]
        cells = (cell(scores[score]) + mark for score, mark in zip(SCORES, marks, strict=True))
        lines.append("| " + " | ".join((name, *cells)) + " |")
    made_by = provenance()
    about = (
        f"{MODEL}, the 75 held-out prompts, 95 % intervals; w8a8 calibrated on {CALIBRATION} captions. A star: differs "
        "from the first line, prompt by prompt, by more than 95 of 100 such samples of prompts would by chance."
    )
    given.out.mkdir(parents=True, exist_ok=True)
    write_text(given.out / "exported_quality.md", "\n".join([*lines, "", about, "", machine(made_by)]) + "\n")
    write_text(given.out / "exported_quality.json", json.dumps({"ways": ways, **made_by}, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
