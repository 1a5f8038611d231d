"""How large are Core ML packages of a full-size Tiny, and what does the conversion take?

    python benchmarks/coreml.py

Tiny of Stable Diffusion v1.4 with random weights, half precision and palettes. Rows that `coreml_full_size.json` has
already are not made again; the table is written after every row. How near packages are to torch: `export_parity.py`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from plan import TEXT_ENCODER, VAE
from transformers import CLIPTextConfig, CLIPTextModel

from bksdm.common.runs import provenance, write_text
from bksdm.export.formats import Source
from bksdm.export.to_coreml import NAMES, write
from bksdm.families import derive
from bksdm.families.recipe import load_recipe
from bksdm.models.pipelines import load_pipeline

ROOT = Path(__file__).parents[1]
FULL_SIZE = ("fp16", "6bit", "4bit")


def full_size_row(precision: str) -> dict[str, Any]:
    """Write the packages in a process of its own, which says how much memory it took."""
    done = subprocess.run(
        [sys.executable, __file__, "--full_size_child", precision], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def full_size(precision: str) -> None:

    torch.manual_seed(0)
    teacher = json.loads((ROOT / "tests" / "data" / "unet_sd_v1.4.json").read_text())
    recipe = load_recipe("tiny")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE).eval(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)).eval(),
        tokenizer=load_pipeline("emoji").tokenizer,
        unet=UNet2DConditionModel(**derive(recipe, teacher).student_config).eval(),
        scheduler=PNDMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write(Source("tiny", pipeline, recipe, precision, 512, 512), Path(folder))
        seconds = time.perf_counter() - start
        packages = {name: _size(Path(folder) / f"{name}.mlpackage") for name in NAMES.values()}
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {"precision": precision, "seconds": seconds, "held": before, "peak": peak, "bytes": packages}
    print(json.dumps(row))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def full_size_table(rows: dict[str, Any]) -> str:
    lines = ["| weights | s | memory before, GiB | at most, GiB | U-Net, MiB | all, MiB |", "|---|---|---|---|---|---|"]
    for row in (row for row in rows.values() if "held" in row):
        memory = f"{row['held'] / 2**30:.1f} | {row['peak'] / 2**30:.1f}"
        sizes = f"{row['bytes']['Unet'] / 2**20:.0f} | {sum(row['bytes'].values()) / 2**20:.0f}"
        lines.append(f"| {row['precision']} | {row['seconds']:.0f} | {memory} | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full_size_child", choices=FULL_SIZE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.full_size_child:
        full_size(options.full_size_child)
    else:
        record()


def record() -> None:
    """Do what was not done before; the files are written after each row."""
    file = ROOT / "benchmarks" / "results" / "coreml_full_size.json"
    about = provenance()
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    for precision in FULL_SIZE:
        if precision in rows:
            continue
        rows[precision] = full_size_row(precision)
        write_text(file, json.dumps({**about, "rows": rows}, indent=2) + "\n")
        machine = f"{about['processors']} cores of {about['processor']}, {about['started'][:10]}"
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        text = f"{full_size_table(rows)}\n\n{machine}; {versions}. Other work ran beside it.\n"
        write_text(file.with_suffix(".md"), text)
    print(full_size_table(rows))


if __name__ == "__main__":
    main()
