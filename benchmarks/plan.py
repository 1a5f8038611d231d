"""Does `distill --plan` foresee the memory of a full-size step?

    python benchmarks/plan.py                            # on this machine's CPU, batch 1
    python benchmarks/plan.py --batch-sizes 16 64        # on a GPU

For Stable Diffusion v1.4 and each recipe, in a process of its own: the plan's estimate, and the peak and the time of
real steps with random weights, which `--plan` measures by the way.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from bksdm.common.runs import provenance, write_text
from bksdm.families import derive
from bksdm.families.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = ("base", "small", "tiny")
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT_ENCODER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}


def configs(folder: Path, recipe: str) -> None:
    """Folders of teacher and student that hold configs and no weights."""
    unet = json.loads((ROOT / "tests" / "data" / "unet_sd_v1.4.json").read_text())
    made = load_recipe(recipe)
    parts = {
        "teacher/unet": unet,
        "teacher/vae": VAE,
        "teacher/text_encoder": TEXT_ENCODER,
        "student/unet": derive(made, unet).student_config,
    }
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "student" / "recipe.yaml").write_text(yaml.safe_dump(made.to_dict()))


def plan(recipe: str, batch_size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        configs(Path(folder), recipe)
        command = [sys.executable, "-m", "bksdm", "distill", "--plan", "--json", "--data", "emoji"]
        command += ["--teacher", f"{folder}/teacher", "--student", f"{folder}/student", "--out", f"{folder}/run"]
        command += ["--batch_size", str(batch_size), "--accumulation", "1"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| recipe | micro-batch | teacher, M | student, M | TFLOP a step | memory estimated, GiB | measured, GiB "
        "| estimated / measured | s a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        estimated, measured = row["chosen"]["total"], row["measured_memory"]
        cells = [
            row["recipe"],
            str(row["chosen"]["batch_size"]),
            f"{row['teacher_params'] / 1e6:.1f}",
            f"{row['student_params'] / 1e6:.1f}",
            f"{row['flops_per_step'] / 1e12:.2f}",
            f"{estimated / 2**30:.2f}",
            f"{measured / 2**30:.2f}" if measured else row["note"],
            f"{estimated / measured:.2f}" if measured else "",
            f"{row['seconds_per_step']:.3g}" if measured else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    made_by, rows = provenance(), []
    for recipe in arguments.recipes:
        for batch_size in arguments.batch_sizes:
            rows.append({"recipe": recipe, **plan(recipe, batch_size)})
            name = f"plan_{'cpu' if rows[0]['device'] == 'cpu' else 'cuda'}"
            machine = f"{rows[0]['device']}; {made_by['processors']} cores of {made_by['processor']}"
            versions = ", ".join(f"{package} {version}" for package, version in made_by["versions"].items())
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_text(arguments.out / f"{name}.json", json.dumps({**made_by, "rows": rows}, indent=2) + "\n")
            text = f"{table(rows)}\n\n{machine}, {made_by['started'][:10]}; {versions}.\n"
            write_text(arguments.out / f"{name}.md", text)
    print(table(rows))


if __name__ == "__main__":
    main()
