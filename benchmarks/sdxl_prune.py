"""What does `prune` take for a teacher of SDXL's size, and does ComfyUI know the single files of its students?

    python benchmarks/sdxl_prune.py runs/full_xl --out benchmarks/results/sdxl_prune.md

Makes a folder with SDXL's configs and random weights in half precision (7 GB), prunes it by each recipe in a process of
its own, and writes each student as one file, from whose names alone follows what ComfyUI takes it for. Numbers do not
matter here, so one block of random ones fills all tensors. What a recipe made goes again when it was measured.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from full_size import DATA, NOISE_SCHEDULE
from plan import TEXT_ENCODER, VAE
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bksdm.common.assets import asset
from bksdm.common.runs import provenance, write_text
from bksdm.export.ldm import write_single_file
from bksdm.models.pipelines import load_pipeline, quiet_libraries
from bksdm.pruning.told import read_recipe

sys.path.insert(0, str(DATA.parent))
comfy = importlib.import_module("comfy")

RECIPES = ("base", "small", "ssd-1b", "vega", "koala-1b", "koala-700m", "comfy")
SECOND_ENCODER = {
    **TEXT_ENCODER,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_BLOCK = 2**20
_GIB = 2**30


def write_teacher(folder: Path) -> None:
    """SDXL's folder with random weights, which are never in memory together."""
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel.from_config(json.loads((DATA / "unet_sdxl_base_1.0.json").read_text())),
            "vae": AutoencoderKL(**VAE | {"sample_size": 1024, "scaling_factor": 0.13025}),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**SECOND_ENCODER)),
        }
    parts = write_networks(folder, networks)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(asset("emoji", "model", "tokenizer"), folder / name)
    EulerDiscreteScheduler(**NOISE_SCHEDULE, timestep_spacing="leading").save_pretrained(folder / "scheduler")
    parts |= {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
    parts |= {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, **parts}
    (folder / "model_index.json").write_text(json.dumps(index))


def write_networks(folder: Path, networks: Mapping[str, Any]) -> dict[str, list[str]]:
    """Networks of the meta device with random weights; returns their libraries and classes, as an index has them."""
    for name, network in networks.items():
        (folder / name).mkdir(parents=True)
        of_diffusers = hasattr(network, "save_config")
        network.save_config(folder / name) if of_diffusers else network.config.save_pretrained(folder / name)
        stem = "diffusion_pytorch_model" if of_diffusers else "model"
        _write_random(folder / name / f"{stem}.safetensors", network.state_dict())
    kinds = {name: type(network) for name, network in networks.items()}
    return {name: [kind.__module__.partition(".")[0], kind.__name__] for name, kind in kinds.items()}


def _write_random(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file with tensors of these names and shapes in float16, written one after the other."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = (torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) / 50).half().numpy().tobytes()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for left in range(end, 0, -len(block)):
            opened.write(block[:left])


def measured(*command: object) -> tuple[float, float, float]:
    """Seconds, those of the processor, and GiB of memory at most, of a command in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / _GIB


def single_file(student: Path, file: Path) -> None:
    """The student as one file in half precision, written as `export --to ldm` does but not compared with torch."""
    quiet_libraries()
    write_single_file(load_pipeline(student, torch.float16), file, dtype=torch.float16, recipe=read_recipe(student))


def row(teacher: Path, recipe: str, runs: Path) -> str:
    """What pruning by a recipe took, and what became of it."""
    student, file = runs / recipe, runs / f"{recipe}.safetensors"
    seconds, _, memory = measured(
        sys.executable, "-m", "bksdm", "prune", "--teacher", teacher, "--recipe", recipe, "--out", student
    )
    measured(sys.executable, __file__, runs, "--single_file", student, file)
    with safe_open(file, framework="pt") as opened:
        found = comfy.taken_for(opened.keys())
    weights = sum(part.stat().st_size for part in (student / "unet").iterdir())
    line = f"| {recipe} | {memory:.2f} | {seconds:.0f} | {weights / _GIB:.2f} | {found or 'refused'} |"
    shutil.rmtree(student)
    file.unlink()
    return line


def report(runs: Path, recipes: list[str]) -> str:
    teacher = runs / "teacher"
    if not teacher.exists():
        write_teacher(teacher)
    rows = []
    for recipe in recipes:
        rows.append(row(teacher, recipe, runs))
        print(rows[-1], flush=True)
    made = provenance()
    return "\n".join(
        [
            "`bksdm prune` of a teacher of SDXL's size, with random weights in half precision (U-Net 4.78 GiB), in a "
            "fresh process; and what ComfyUI's rule takes the single file for, by its tensors' names.",
            "",
            "| recipe | most memory, GiB | seconds | student's U-Net, GiB | ComfyUI, single file |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"{made['processors']} cores of {made['processor']}, other work beside it, {made['started'][:10]}. Most "
            "memory is the largest resident set, pages of the files that are read among it.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--single_file", nargs=2, type=Path, metavar=("STUDENT", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.single_file:
        single_file(*given.single_file)
        return
    text = report(given.runs, given.recipes)
    if given.out:
        write_text(given.out, text)


if __name__ == "__main__":
    main()
