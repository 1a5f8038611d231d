"""Whether a repaired student ends nearer to its teacher when it is retrained as the quickstart does.

    python benchmarks/repair_retrain.py runs/repair_retrain

The embedded model by recipe small: just pruned and repaired, retrained for 100 steps of 32 at several learning rates.
Printed are output errors on the held-out pictures.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from bksdm.data.folder import data_folder, read_captions
from bksdm.distill.run import distill
from bksdm.evaluate.output_error import output_error
from bksdm.models.pipelines import load_denoiser, load_pipeline, quiet_libraries
from bksdm.options.pruning import PruneOptions
from bksdm.options.quickstart import QuickstartOptions
from bksdm.pruning.run import prune
from bksdm.quickstart.run import HELD_OUT, TRAIN, distillation

RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {}),
    ("repaired", {}),
    ("repaired", {"lr": 5e-4}),
    ("repaired", {"lr": 2.5e-4}),
    ("repaired", {"warmup": 30}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    runs: Path = parser.parse_args().runs
    quiet_libraries()
    teacher, held_out = load_pipeline("emoji"), read_captions(data_folder(HELD_OUT))

    def error(student: Path) -> float:
        return output_error(load_denoiser(student, torch.float32), teacher, held_out)

    prune(PruneOptions("emoji", "small", str(runs / "plain")))
    prune(PruneOptions("emoji", "small", str(runs / "repaired"), repair=TRAIN))
    for student in ("plain", "repaired"):
        print(f"{student}: {error(runs / student):.4f}", flush=True)
    usual = distillation(QuickstartOptions(str(runs), "small", 100, 0, "emoji"), runs)
    for number, (student, more) in enumerate(RUNS):
        out = runs / f"{number}-{student}"
        options = dataclasses.replace(usual, student=str(runs / student), out=str(out), sample_every=0, **more)
        began = time.process_time()
        made = distill(options)
        print(f"{student} {more}: {error(Path(made)):.4f}, {time.process_time() - began:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
