"""What does a LoRA step take at the full size of Stable Diffusion v1.4? Random weights; memory does not depend on them.

    python benchmarks/personalize_full_size.py --images FOLDER

A step of one picture of a subject and one of its kind at 512 px, in float32 on a CPU, with and without gradient
checkpointing, each in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from full_size import stable_diffusion

from bksdm.common.runs import provenance, write_text
from bksdm.models.pipelines import quiet_libraries, save_pipeline

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "personalize_full_size.md"
WAYS = {"as it is": [], "gradient checkpointing": ["--gradient_checkpointing"]}


def step(model: Path, images: str, out: Path, words: list[str]) -> dict[str, float]:
    """The record of one step."""
    given = ["--images", images, "--prompt", "a photo of sks dog", "--out", str(out), "--lora", "--precision", "fp32"]
    few = ["--steps", "1", "--log_every", "1", "--class_images", "1", "--class_steps", "1", "--views", "1"]
    subprocess.run([sys.executable, "-m", "bksdm", "personalize", str(model), *given, *few, *words], check=True)
    line: dict[str, float] = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--model", type=Path, help="a pipeline of that size that is there already")
    given = parser.parse_args()
    quiet_libraries()
    rows = ["| LoRA step, rank 8 | seconds | peak memory of the process, GiB |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or Path(folder) / "teacher"
        if given.model is None:
            save_pipeline(stable_diffusion(), model)
        for name, words in WAYS.items():
            line = step(model, given.images, Path(folder) / name.replace(" ", "-"), words)
            rows.append(f"| {name} | {1 / line['images_per_second']:.0f} | {line['peak_memory_gib']:.1f} |")
    about = provenance()
    footer = f"{about['processor']}, {about['processors']} cores; {about['started'][:10]}. Other work ran beside it."
    text = "\n".join(["# Personalisation at full size", "", "`python benchmarks/personalize_full_size.py`", "", *rows])
    print(text)
    write_text(RESULT, f"{text}\n\n{footer}\n")


if __name__ == "__main__":
    main()
