"""How near are Core ML packages to torch, how large are they, and what does a full-size conversion take?

    python benchmarks/coreml.py                     # the embedded model, its students, small networks of both versions
    python benchmarks/coreml.py --full_size         # Tiny of Stable Diffusion v1.4 with random weights

Parity is that of a whole picture of 4 steps, by Core ML on a Mac and by the package's own evaluator elsewhere. Rows
that `coreml.json` has already are not made again; the table is written after every row.
"""

import argparse
import importlib
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

from bksdm.assets import asset
from bksdm.export.formats import Source
from bksdm.export.run import export
from bksdm.export.to_coreml import NAMES, write
from bksdm.families import derive
from bksdm.models import load_pipeline, save_pipeline
from bksdm.options import ExportOptions, PruneOptions
from bksdm.prune import prune
from bksdm.recipe import load_recipe
from bksdm.runs import provenance, write_text

ROOT = asset().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
VARIANTS = (
    ("fp16", "original"),
    ("fp16", "split_einsum"),
    ("6bit", "original"),
    ("4bit", "original"),
    ("fp32", "original"),
    ("fp32", "split_einsum"),
)
MODELS = ("emoji tiny", "emoji base", "emoji small", "emoji teacher", "v1", "v2")
FULL_SIZE = ("fp16", "6bit", "4bit")


def made_model(name: str, folder: Path) -> str:
    """A MODEL of this name; small networks come from the tests."""

    kind, _, recipe = name.partition(" ")
    if name == "emoji teacher":
        return "emoji"
    if kind == "emoji":
        prune(PruneOptions("emoji", recipe, str(folder / recipe)))
        return str(folder / recipe)
    sys.path.append(str(ROOT / "tests"))
    tiny_models = importlib.import_module("tiny_models")
    save_pipeline(tiny_models.build_pipeline(getattr(tiny_models, f"{name.upper()}_UNET")), folder / name)
    return str(folder / name)


def parity_row(name: str, precision: str, attention: Any) -> dict[str, Any]:

    with tempfile.TemporaryDirectory() as folder:
        model = made_model(name, Path(folder))
        start = time.perf_counter()
        options = ExportOptions(model, "coreml", f"{folder}/out", precision=precision, attention=attention)
        made = export(options)
        seconds = time.perf_counter() - start
    return {"model": name, "precision": precision, "attention": attention, "seconds": seconds, **made.to_dict()}


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


def table(rows: dict[str, Any]) -> str:
    lines = [
        "| model | weights | attention | largest difference of 255 | PSNR, dB | MiB | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows.values() if "model" in row):
        parity = row["parity"]
        psnr = "equal" if parity["psnr"] is None else f"{parity['psnr']:.1f}"
        cells = [row["model"], row["precision"], row["attention"], parity["largest"], psnr]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['bytes'] / 2**20:.1f} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def full_size_table(rows: dict[str, Any]) -> str:
    lines = ["| weights | s | memory before, GiB | at most, GiB | U-Net, MiB | all, MiB |", "|---|---|---|---|---|---|"]
    for row in (row for row in rows.values() if "held" in row):
        memory = f"{row['held'] / 2**30:.1f} | {row['peak'] / 2**30:.1f}"
        sizes = f"{row['bytes']['Unet'] / 2**20:.0f} | {sum(row['bytes'].values()) / 2**20:.0f}"
        lines.append(f"| {row['precision']} | {row['seconds']:.0f} | {memory} | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full_size", action="store_true")
    parser.add_argument("--full_size_child", choices=FULL_SIZE, help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options = parser.parse_args()
    if options.full_size_child:
        full_size(options.full_size_child)
    elif options.full_size:
        record("coreml_full_size", {name: (full_size_row, (name,)) for name in FULL_SIZE}, full_size_table)
    else:
        jobs = {
            f"{model} {' '.join(variant)}": (parity_row, (model, *variant))
            for variant in VARIANTS
            for model in options.models
        }
        record("coreml", jobs, table)


def record(name: str, jobs: dict[str, Any], text: Any) -> None:
    """Do what was not done before; the files are written after each."""
    file = RESULTS / f"{name}.json"
    about = provenance()
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    for key, (job, arguments) in jobs.items():
        if key in rows:
            continue
        rows[key] = job(*arguments)
        write_text(file, json.dumps({**about, "rows": rows}, indent=2) + "\n")
        machine = f"{about['processors']} cores of {about['processor']}, {about['started'][:10]}"
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        write_text(file.with_suffix(".md"), f"{text(rows)}\n\n{machine}; {versions}. Other work ran beside it.\n")
    print(text(rows))


if __name__ == "__main__":
    main()
