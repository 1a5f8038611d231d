"""What does `prune` take for Stable Diffusion v1.4 in half precision, beside copying the teacher's folder, and before?

    python benchmarks/sd_prune.py runs/full_sd --before f5f04d2 --out benchmarks/results/sd_prune.md

Makes a folder with the published configs and random weights in half precision (2 GB); each command is a process of its
own, and all take turns. An earlier commit is checked out beside this one.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from full_size import DATA, NOISE_SCHEDULE
from plan import TEXT_ENCODER, VAE
from sdxl_prune import measured, write_networks
from transformers import CLIPTextConfig, CLIPTextModel

from bksdm.common.assets import asset
from bksdm.common.runs import provenance, write_text

_GIB = 2**30
_HERE = Path(__file__).parents[1]


def write_teacher(folder: Path) -> None:
    """A folder as diffusers saves it with `variant` left out."""
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel.from_config(json.loads((DATA / "unet_sd_v1.4.json").read_text())),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
        }
    parts = write_networks(folder, networks)
    shutil.copytree(asset("emoji", "model", "tokenizer"), folder / "tokenizer")
    PNDMScheduler(**NOISE_SCHEDULE, skip_prk_steps=True).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        **parts,
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def rows(runs: Path, commits: Sequence[str], recipe: str, rounds: int) -> list[str]:
    teacher, student = runs / "teacher", runs / "student"
    if not teacher.exists():
        write_teacher(teacher)
    trees = {"now": _HERE}
    for commit in commits:
        trees[commit] = runs / commit
        if not trees[commit].exists():
            subprocess.run(
                ["git", "-C", _HERE, "worktree", "add", "--detach", trees[commit].resolve(), commit], check=True
            )
    prune = ["-m", "bksdm", "prune", "--teacher", teacher, "--recipe", recipe, "--out", student]
    commands = {"cp -r": (_HERE, ["cp", "-r", teacher, student])}
    commands |= {f"prune, {name}": (tree, [sys.executable, *prune]) for name, tree in trees.items()}
    commands["python -c 'import diffusers'"] = (
        _HERE,
        [sys.executable, "-c", "from diffusers import DiffusionPipeline"],
    )
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    sizes: dict[str, float] = {}
    for _ in range(rounds):
        for name, (tree, words) in commands.items():
            os.environ["PYTHONPATH"] = str(tree / "src")
            taken[name].append(measured(*words))
            if student.exists():
                sizes[name] = sum(file.stat().st_size for file in student.rglob("*") if file.is_file()) / _GIB
                shutil.rmtree(student)
    whole = sum(file.stat().st_size for file in teacher.rglob("*") if file.is_file()) / _GIB
    found = [f"| teacher | | | | {whole:.2f} |"]
    for name, values in taken.items():
        seconds, busy, memory = (statistics.median(column) for column in zip(*values, strict=True))
        size = f"{sizes[name]:.2f}" if name in sizes else ""
        held = f"{memory:.2f}" if name.startswith("prune") else ""
        found.append(f"| `{name}` | {seconds:.1f} | {busy:.1f} | {held} | {size} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--before", nargs="*", default=[])
    parser.add_argument("--recipe", default="base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    made = provenance()
    lines = [
        f"`bksdm prune --recipe {given.recipe}` of a teacher of SD v1.4's size, random weights in half precision. "
        f"Medians of {given.rounds} rounds in turns, each in a fresh process; most memory is the largest resident "
        "set, pages of the files that are read among it.",
        "",
        "| command | seconds | of the processor | most memory, GiB | folder, GiB |",
        "|---|---|---|---|---|",
        *rows(given.runs, given.before, given.recipe, given.rounds),
        "",
        f"{made['processors']} cores of {made['processor']}, {made['started'][:10]}.",
        "",
    ]
    print("\n".join(lines))
    if given.out:
        write_text(given.out, "\n".join(lines))


if __name__ == "__main__":
    main()
