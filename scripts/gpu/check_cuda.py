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

from bksdm.distill.run import distill
from bksdm.models.pipelines import quiet_libraries
from bksdm.options.distill import DistillOptions
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.run import prune


def retrain(
    student: Path, out: Path, precision: str, teacher_precision: str, *, compiled: bool = False
) -> dict[str, float]:
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
            compile_teacher=compiled,
            device="cuda",
        )
    )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    values: dict[str, float] = json.loads(lines[-1])
    return values


def main() -> int:
    quiet_libraries()
    failed = False
    with tempfile.TemporaryDirectory() as root:
        student = Path(root, "student")
        prune(PruneOptions("emoji", "small", str(student)))
        types = ("fp32", "bf16", "fp16")
        cases = [(own, taught, False) for own, taught in itertools.product(types, types)]
        for number, (own, taught, compiled) in enumerate([*cases, ("bf16", "bf16", True), ("fp32", "fp32", True)]):
            values = retrain(student, Path(root, str(number)), own, taught, compiled=compiled)
            fine = math.isfinite(values["loss"])
            failed |= not fine
            how = f"student {own}, teacher {taught}{', compiled' if compiled else ''}"
            print(f"{how}: loss {values['loss']:.4f} {'ok' if fine else 'NOT FINITE'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
