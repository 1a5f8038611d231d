"""Run every CUDA path of retraining for a few steps: bf16 and fp16, two precisions of the teacher, compiled.

    PYTHONPATH=src python3 scripts/gpu/check_cuda.py

Prints a line a case with the last losses; exits with 1 if one is not finite or a path fails.
"""

import itertools
import json
import math
import sys
import tempfile
from pathlib import Path

import torch

from bksdm.distill.run import distill
from bksdm.models import load_pipeline, quiet_libraries
from bksdm.options import DistillOptions, PruneOptions
from bksdm.prune import prune


def retrain(student: Path, out: Path, precision: str, teacher_precision: str) -> dict[str, float]:
    distill(
        DistillOptions(
            teacher="emoji",
            student=str(student),
            data="emoji/heldout",
            out=str(out),
            steps=20,
            batch_size=16,
            accumulation=1,
            precision=precision,  # type: ignore[arg-type]
            teacher_precision=teacher_precision,  # type: ignore[arg-type]
            device="cuda",
        )
    )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    values: dict[str, float] = json.loads(lines[-1])
    return values


def compiled_difference() -> float:
    """Largest difference between the compiled and the eager U-Net."""
    unet = load_pipeline("emoji").unet.to("cuda")
    inputs = (torch.randn(2, 4, 16, 16, device="cuda"), torch.tensor([10, 500], device="cuda"))
    context = torch.randn(2, 16, unet.config.cross_attention_dim, device="cuda")
    with torch.inference_mode():
        eager, fast = (run(*inputs, context).sample for run in (unet, torch.compile(unet)))
    return float((eager - fast).abs().max())


def main() -> int:
    quiet_libraries()
    failed = False
    with tempfile.TemporaryDirectory() as root:
        student = Path(root, "student")
        prune(PruneOptions("emoji", "small", str(student)))
        for number, (own, taught) in enumerate(itertools.product(("fp32", "bf16", "fp16"), ("fp32", "bf16", "fp16"))):
            values = retrain(student, Path(root, str(number)), own, taught)
            fine = math.isfinite(values["loss"])
            failed |= not fine
            print(f"student {own}, teacher {taught}: loss {values['loss']:.4f} {'ok' if fine else 'NOT FINITE'}")
    difference = compiled_difference()
    print(f"torch.compile: largest difference {difference:.2e}")
    return int(failed or difference > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
