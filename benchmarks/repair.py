"""What `bksdm prune --repair` closes of the gap to the teacher, and what it costs at the size of SD v1.4.

    python benchmarks/repair.py emoji runs/repair --out benchmarks/results/repair.md
    python benchmarks/repair.py stages --out benchmarks/results/repair_stages.md

`emoji` repairs students of the embedded models on the pictures that they learnt from, with three seeds, and compares
outputs on the held-out ones. `stages` measures on random numbers what the second convolution of a ResNet block asks for
at each width: its normal equations, by the picture, their solution, and their memory.
"""

import argparse
import platform
import resource
import shutil
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from bksdm.common.runs import provenance, write_text
from bksdm.data.folder import data_folder, read_captions
from bksdm.evaluate.output_error import output_error
from bksdm.models.pipelines import load_denoiser, load_pipeline, quiet_libraries
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.repair.least_squares import NormalEquations
from bksdm.pruning.run import prune
from bksdm.quickstart.run import HELD_OUT, TRAIN

CASES = (("emoji", "small"), ("emoji", "tiny"), ("emoji", "base"), ("emoji-flow", "half"))
WIDTHS = ((320, 64), (640, 32), (1280, 16))  # of SD v1.4's stages, and the side of their latents


def emoji(runs: Path, seeds: int) -> list[str]:
    """The table of what is closed."""
    held_out = read_captions(data_folder(HELD_OUT))
    lines = [
        "| teacher, recipe | output error just pruned | repaired | share closed | seconds | of CPU |",
        "|---|---|---|---|---|---|",
    ]
    for model, recipe in CASES:
        teacher = load_pipeline(model)
        plain = runs / f"{model}-{recipe}"
        prune(PruneOptions(model, recipe, str(plain)))
        before = output_error(load_denoiser(plain, torch.float32), teacher, held_out)
        found, walls, cpus = [], [], []
        for seed in range(seeds):
            out = runs / f"{model}-{recipe}-{seed}"
            shutil.rmtree(out, ignore_errors=True)
            wall, cpu = time.perf_counter(), time.process_time()
            prune(PruneOptions(model, recipe, str(out), repair=TRAIN, seed=seed))
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            found.append(output_error(load_denoiser(out, torch.float32), teacher, held_out))
        each = ", ".join(f"{error:.4f}" for error in found)
        closed = ", ".join(f"{1 - error / before:.1%}" for error in found)
        lines.append(
            f"| {model}, {recipe} | {before:.4f} | {each} | {closed} | {statistics.median(walls):.0f} | "
            f"{statistics.median(cpus):.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def stages(pictures: int) -> list[str]:
    """The table of costs."""
    lines = [
        "| width | latents | numbers in a row | matrix, GB | s a picture | s to solve | s with 192 pictures "
        "| peak, GB | difference of products in float32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for width, side in WIDTHS:
        torch.manual_seed(0)
        operation = nn.Conv2d(width, width, 3, padding=1)
        equations = NormalEquations([operation])
        given, wanted = (torch.randn(pictures, width, side, side) for _ in range(2))
        gains = torch.ones_like(wanted)
        began = time.process_time()
        for one in range(pictures):
            equations.add([given[one : one + 1]], wanted[one : one + 1], gains[one : one + 1])
        each = (time.process_time() - began) / pictures
        began = time.process_time()
        equations.changes(0.03)
        solving = time.process_time() - began
        row = 9 * width + 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        lines.append(
            f"| {width} | {side}x{side} | {row} | {8 * row**2 / 1e9:.2f} | {each:.2f} | {solving:.1f} | "
            f"{192 * each + solving:.0f} | {peak:.1f} | {_difference(width) if width == WIDTHS[0][0] else ''} |"
        )
        print(lines[-1], flush=True)
    return lines


def _difference(width: int) -> str:
    """By how much the change differs, relatively, from that of products in float64."""
    given, wanted = (torch.randn(2, width, 16, 16) for _ in range(2))
    changes = []
    for dtype in (torch.float32, torch.float64):
        operation = nn.Conv2d(width, width, 3, padding=1, dtype=dtype)
        equations = NormalEquations([operation])
        equations.add([given.to(dtype)], wanted.to(dtype), torch.ones_like(wanted, dtype=dtype))
        changes.append(equations.changes(0.03)[0]["weight"])
    return f"{float((changes[0] - changes[1]).norm() / changes[1].norm()):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("emoji", "stages"))
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/repair"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    lines = emoji(arguments.runs, arguments.seeds) if arguments.part == "emoji" else stages(arguments.pictures)
    made = provenance()
    where = f"{made['processor']}, {torch.get_num_threads()} threads of torch {torch.__version__}, {platform.system()}"
    if arguments.out:
        command = "python " + " ".join(made["command"])
        write_text(arguments.out, "\n".join([f"`{command}`", "", where, "", *lines, ""]))


if __name__ == "__main__":
    main()
