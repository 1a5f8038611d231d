"""Which layouts of LoRAs count exactly, on a teacher and on its students, and what does stock diffusers make of them?

    python benchmarks/lora_layouts.py

Small models of Stable Diffusion 1's shape with random weights, and a LoRA of random numbers in each layout of
`tests/lora_layouts.py`, which has the formats' definitions written out. The table gives the largest relative 2-norm of
the difference between the change of a weight and its definition, over layers of every kind.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from bksdm.common.runs import provenance, write_text
from bksdm.families import derive
from bksdm.families.recipe import load_recipe
from bksdm.models.adapters.lora import merge_lora
from bksdm.models.adapters.run import adapt
from bksdm.models.pipelines import load_pipeline, quiet_libraries, save_pipeline
from bksdm.options.adapt import AdaptOptions
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.run import prune

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
layouts, shapes = map(importlib.import_module, ("lora_layouts", "tiny_models"))

RECIPES = ("base", "small", "tiny")


def copies(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in layouts.parameters(pipeline).items()}


def apart(was: Mapping[str, Tensor], now: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a change, infinite where something else changed."""
    if any(not torch.equal(now[name], was[name]) for name in now if name not in wanted):
        return float("inf")
    return max(float((now[name] - was[name] - delta).norm() / delta.norm()) for name, delta in wanted.items())


def by_diffusers(model: Path, lora: Path, wanted: Mapping[str, Tensor]) -> str:
    """What stock diffusers makes of a carried file."""
    pipeline = load_pipeline(model, torch.float64)
    was = copies(pipeline)
    try:
        pipeline.load_lora_weights(lora)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except (ValueError, RuntimeError, KeyError) as error:
        return f"refuses it ({type(error).__name__})"
    far = apart(was, layouts.parameters(pipeline), wanted)
    return f"{far:.0e}" if far < 1e-4 else f"reads it wrongly ({far:.0e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "lora_layouts.md")
    arguments = parser.parse_args()
    quiet_libraries()
    lines = [
        "| layout | a name in the file | teacher | base | small | tiny | small, carried, by stock diffusers |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as root:
        teacher = shapes.build_pipeline(shapes.V1_UNET)
        folders = {"teacher": Path(root, "teacher")}
        save_pipeline(teacher, folders["teacher"])
        for recipe in RECIPES:
            folders[recipe] = Path(root, recipe)
            prune(PruneOptions(str(folders["teacher"]), recipe, str(folders[recipe])))
        for number, (layout, make) in enumerate(layouts.LAYOUTS.items()):
            torch.manual_seed(number)
            lora = make(teacher)
            file, cells = lora.write(Path(root, f"lora{number}")), []
            for name, folder in folders.items():
                wanted, source = lora.changes, file
                if name != "teacher":
                    source = Path(root, f"{number}-{name}")
                    adapt(AdaptOptions(str(file), str(folder), str(folders["teacher"]), str(source)))
                    wanted = layouts.kept(wanted, derive(load_recipe(name), teacher.unet.config))
                pipeline = load_pipeline(folder, torch.float64)
                was = copies(pipeline)
                cells.append(f"{apart(was, layouts.parameters(merge_lora(pipeline, source)), wanted):.0e}")
            wanted = layouts.kept(lora.changes, derive(load_recipe("small"), teacher.unet.config))
            cells.append(by_diffusers(folders["small"], Path(root, f"{number}-small"), wanted))
            key = next((name for name in lora.tensors if "to_q" in name or "conv1" in name), next(iter(lora.tensors)))
            lines.append(f"| {layout} | `{key}` | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    by = provenance()
    versions = ", ".join(f"{package} {version}" for package, version in by["versions"].items())
    write_text(arguments.out, "\n".join(lines) + f"\n\n{by['processor']}, {by['started'][:10]}; {versions}.\n")


if __name__ == "__main__":
    main()
