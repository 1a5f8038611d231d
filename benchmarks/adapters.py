"""What a LoRA of the teacher does on its students: carried over by the recipe, and loaded by name, as stock does it.

    python benchmarks/personalize.py --images runs/personal/images    # makes the LoRA and the students
    python benchmarks/adapters.py --images runs/personal/images

Each model draws the same prompts with the same seeds before and after; the change of the fidelity to the LoRA's subject
is what the LoRA does. Everything goes on where it stopped.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from export_parity import RECIPES
from personalize import models, scored

from bksdm.common.runs import provenance, write_text
from bksdm.models.adapters.lora import merge_lora
from bksdm.models.adapters.run import adapt
from bksdm.models.pipelines import load_pipeline, quiet_libraries, save_pipeline
from bksdm.options.adapt import AdaptOptions

SCORE = "clip_i"


def by_name(pipeline: StableDiffusionPipeline, lora: Path) -> StableDiffusionPipeline:
    """Stock loading: what is found by name is changed, and the rest is left out."""
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline


def variants(runs: Path, students: Path) -> dict[str, str]:
    """Name -> MODEL: every model before, with the LoRA by name, and with what was carried over."""
    lora = runs / "personal" / "teacher-lora" / "lora"
    found = {
        "teacher before": "emoji",
        "teacher with": str(saved(merge_lora(load_pipeline("emoji"), lora), runs, "teacher")),
    }
    retrained = models(students)
    for recipe in RECIPES:
        student = retrained[recipe]
        made = adapt(AdaptOptions(str(lora), student, "emoji", str(runs / "adapted" / recipe)))
        print(recipe, "kept", made.kept, "moved", len(made.moved), "dropped", len(made.dropped), flush=True)
        found[f"{recipe} before"] = student
        found[f"{recipe} with"] = str(saved(merge_lora(load_pipeline(student), made.out), runs, f"{recipe}-carried"))
        try:
            found[f"{recipe} by name"] = str(saved(by_name(load_pipeline(student), lora), runs, f"{recipe}-by-name"))
        except RuntimeError as error:  # widths that do not fit: the one case in which stock loading says something
            print(recipe, "by name:", str(error).splitlines()[0], flush=True)
    return found


def saved(pipeline: StableDiffusionPipeline, runs: Path, name: str) -> Path:
    folder = runs / "merged" / name
    save_pipeline(pipeline, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/personal"))
    parser.add_argument("--students", type=Path, default=Path("runs/export_parity"))
    parser.add_argument("--images_per_prompt", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    quiet_libraries()
    drawn = {name.replace(" ", "-"): model for name, model in variants(given.runs, given.students).items()}
    named = [f"{name}={model}" for name, model in drawn.items()]
    prompts = given.runs / "prompts.txt"
    result = scored(named, given.runs / "carried", given.images, given.images_per_prompt, prompts)
    rows = ["| model | LoRA | change of the fidelity to the subject | 95 % interval |", "|---|---|---|---|"]
    for item in result["differences"]:
        first, _, before = item["first"].partition("-")
        second, _, how = item["second"].partition("-")
        if item["score"] == SCORE and first == second and before == "before":
            half = 1.96 * item["deviation"]
            change = item["difference"]
            rows.append(f"| {first} | {how} | {change:+.3f} | {change - half:+.3f} to {change + half:+.3f} |")
    counts = [json.loads((given.runs / "adapted" / recipe / "adapted.json").read_text()) for recipe in RECIPES]
    rows += ["", "| student | layers kept | of those moved | layers dropped |", "|---|---|---|---|"]
    rows += [
        f"| {recipe} | {count['kept']} | {len(count['moved'])} | {len(count['dropped'])} |"
        for recipe, count in zip(RECIPES, counts, strict=True)
    ]
    about = provenance()
    footer = f"{about['processor']}, {torch.get_num_threads()} threads; {about['started'][:10]}."
    text = "\n".join(["# A LoRA across the pruning", "", "`python benchmarks/adapters.py`", "", *rows, "", footer, ""])
    print(text)
    write_text(given.out / "adapters.md", text)


if __name__ == "__main__":
    main()
