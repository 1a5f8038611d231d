"""Is a run that is killed at random moments, and run again, the run that nobody stopped?

    python benchmarks/kill_and_resume.py --runs 20

Each run is killed by SIGKILL at a random moment, every second one while a checkpoint is being written, then the same
command is run until it ends. Its weights, average and moments must be those of an unbroken run to the bit, and
every file that it left must be readable.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from bksdm.common.runs import provenance, write_text
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.run import prune

STEPS = 24
LAST = Path("checkpoints", f"step-{STEPS:08d}", "tensors.safetensors")
UNET = Path("student", "unet", "diffusion_pytorch_model.safetensors")


def command(student: Path, out: Path) -> list[str]:
    options = {
        "teacher": "emoji", "student": student, "data": "emoji/heldout", "out": out, "steps": STEPS, "batch_size": 2,
        "accumulation": 2, "lr": 1e-3, "log_every": 1, "sample_every": 0, "checkpoint_every": 2, "workers": 1,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "bksdm", "distill", *words]


def start(words: list[str]) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill(words: list[str], out: Path, rng: random.Random, while_writing: bool) -> str:
    """Start the run, and kill it; says at which step it was, and whether a checkpoint was being written."""
    process = start(words)
    metrics, checkpoints = out / "metrics.jsonl", out / "checkpoints"
    begun = 1 + rng.randrange(STEPS - 4)
    while process.poll() is None and _lines(metrics) < begun:
        time.sleep(0.005)
    while while_writing and process.poll() is None and not list(checkpoints.glob(".*.partial")):
        time.sleep(0.0002)
    time.sleep(rng.random() * (0.03 if while_writing else 0.5))
    caught = bool(list(checkpoints.glob(".*.partial")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return f"step {_lines(metrics)}{', while a checkpoint was written' if caught else ''}"


def _lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def unreadable(out: Path) -> list[str]:
    """Files of a finished run that cannot be read."""
    bad = []
    for file in out.rglob("*"):
        try:
            if file.suffix == ".safetensors":
                load_file(file)
            elif file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".jsonl":
                [json.loads(line) for line in file.read_text().splitlines()]
        except Exception as error:  # whatever a reader may say of a damaged file
            bad.append(f"{file}: {error}")
    return bad


def same(first: Path, second: Path) -> bool:
    for part in (LAST, UNET):
        ours, theirs = load_file(first / part), load_file(second / part)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/kill_and_resume"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    rng, student, whole = random.Random(arguments.seed), arguments.work / "student", arguments.work / "whole"
    prune(PruneOptions("emoji", "small", str(student)))
    assert start(command(student, whole)).wait() == 0
    identical, writing = 0, 0
    damaged: list[str] = []
    lines: list[str] = []
    for number in range(arguments.runs):
        out = arguments.work / f"{number:02d}"
        where = kill(command(student, out), out, rng, while_writing=number % 2 == 1)
        ended = start(command(student, out)).wait() == 0
        equal, bad = ended and same(out, whole), unreadable(out)
        identical, writing, damaged = identical + equal, writing + ("written" in where), damaged + bad
        lines.append(f"run {number}: killed at {where}; {'same bits' if equal else 'ANOTHER RESULT'}")
        print(lines[-1], flush=True)
        shutil.rmtree(out)
    summary = (
        f"{identical} of {arguments.runs} killed runs ended with the bits of the unbroken one; {writing} were killed "
        f"while a checkpoint was written; {len(damaged)} unreadable files."
    )
    made_by = provenance()
    machine = f"{made_by['processors']} cores of {made_by['processor']}, {made_by['started'][:10]}."
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / "kill_and_resume.md", "\n\n".join([summary, "\n".join(lines), machine]) + "\n")
    print(summary)
    sys.exit(int(identical < arguments.runs or bool(damaged)))


if __name__ == "__main__":
    main()
