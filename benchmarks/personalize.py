"""How well a teacher and its students learn a subject, by all weights and by a LoRA.

    python examples/emoji/personal.py --out runs/personal/images
    python benchmarks/personalize.py --images runs/personal/images

Prunes and retrains the three students of the embedded model, personalises all four, and compares them with the teacher
before it learnt anything: fidelity to the subject and to the prompt with intervals, minutes and peak memory. Each run
is in a process of its own. Everything goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from export_parity import RECIPES, RETRAINING
from export_parity import models as students

from bksdm.common.runs import provenance, write_text
from bksdm.models.pipelines import quiet_libraries
from bksdm.options.personalize import FidelityOptions, PersonalizeOptions
from bksdm.personalize.fidelity import TITLES, fidelity
from bksdm.personalize.run import personalize

TEACHER, GUIDANCE = "emoji", 2.5
PROMPT = "sks star, noto style"
PROMPTS = (
    "{subject}, noto style",
    "{subject}, flat style",
    "{subject}, twemoji style",
    "{subject}, fluent style",
    "red {subject}, noto style",
    "blue {subject}, noto style",
    "{subject} with hat, noto style",
    "green {subject}, flat style",
)
MODES = {"full": {"lora": False, "lr": 3e-4}, "lora": {"lora": True, "lr": 3e-3, "rank": 16}}


def models(folder: Path) -> dict[str, str]:
    """The teacher and its students, retrained as the quickstart does."""
    made = students(folder)
    return {"teacher": TEACHER} | {recipe: made[f"emoji {recipe}"] for recipe in RECIPES}


def learn(model: str, out: str, images: str, steps: int, mode: str) -> None:
    """One run, whose metrics have its time and its memory."""
    personalize(
        PersonalizeOptions(
            model,
            images,
            PROMPT,
            out,
            class_images=16,
            class_guidance=GUIDANCE,
            steps=steps,
            batch_size=4,
            flip=True,
            log_every=20,
            **MODES[mode],  # type: ignore[arg-type]
        )
    )


def scored(drawn: list[str], out: Path, images: str, images_per_prompt: int, prompts: Path) -> dict[str, Any]:
    """Fidelity of models, NAME=MODEL, to the subject and to the prompts of a file."""
    return fidelity(
        FidelityOptions(
            drawn,
            str(out),
            str(prompts),
            images=images,
            subject="sks star",
            kind="star",
            encoder="emoji",
            images_per_prompt=images_per_prompt,
            guidance=GUIDANCE,
            batch_size=16,
        )
    )


def cost(run: Path) -> tuple[float, float]:
    """Minutes of training and peak memory in GiB, by its records."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pictures = 4 * 20
    return sum(pictures / line["images_per_second"] for line in lines) / 60, max(
        line["peak_memory_gib"] for line in lines
    )


def table(result: dict[str, Any], runs: Path) -> str:
    rows = [
        f"| model | {' | '.join(TITLES[key] for key in ('clip_i', 'clip_t'))} | minutes | peak memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for name, model in result["models"].items():
        cells = [
            f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
            for value in (model["scores"][key] for key in ("clip_i", "clip_t"))
        ]
        run = runs / "personal" / name
        taken = "{:.1f} | {:.2f}".format(*cost(run)) if run.is_dir() else " | "
        rows.append(f"| {name} | {' | '.join(cells)} | {taken} |")
    rows += ["", "| student less teacher | score | difference | 95 % interval |", "|---|---|---|---|"]
    for item in result["differences"]:
        first, second = item["first"].split("-"), item["second"].split("-")
        if first[0] == "teacher" and len(first) == 2 and first[1] == second[-1]:
            half = 1.96 * item["deviation"]
            rows.append(
                f"| {item['second']} | {TITLES[item['score']]} | {item['difference']:+.3f} "
                f"| {item['difference'] - half:+.3f} to {item['difference'] + half:+.3f} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/personal"))
    parser.add_argument("--students", type=Path, default=Path("runs/export_parity"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images_per_prompt", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "OUT", "MODE"), help="a run, in this process")
    given = parser.parse_args()
    quiet_libraries()
    if given.one:
        model, out, mode = given.one
        learn(model, out, given.images, given.steps, mode)
        return
    runs: Path = given.runs
    drawn = ["before=emoji"]
    for name, model in models(given.students).items():
        for mode in MODES:
            out = runs / "personal" / f"{name}-{mode}"
            command = [sys.executable, __file__, "--images", given.images, "--steps", str(given.steps)]
            subprocess.run([*command, "--one", model, str(out), mode], check=True)
            drawn.append(f"{name}-{mode}={out}")
    prompts = runs / "prompts.txt"
    write_text(prompts, "\n".join(PROMPTS) + "\n")
    result = scored(drawn, runs / "fidelity", given.images, given.images_per_prompt, prompts)
    about = provenance()
    footer = (
        f"{given.steps} steps of 4 views and 4 pictures of the kind; students retrained for {RETRAINING.steps} steps; "
        f"{given.images_per_prompt} pictures of each of {len(PROMPTS)} prompts. {about['processor']}, "
        f"{torch.get_num_threads()} threads; {about['started'][:10]}; torch {about['versions']['torch']}."
    )
    text = f"# Personalisation\n\n`python benchmarks/personalize.py`\n\n{table(result, runs)}\n\n{footer}\n"
    print(text)
    write_text(given.out / "personalize.md", text)
    (given.out / "personalize.png").write_bytes((runs / "fidelity" / "grid.png").read_bytes())


if __name__ == "__main__":
    main()
