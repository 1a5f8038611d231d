"""What each unit's absence costs after retraining, held against what it costs before: does a score foresee it?

The teacher runs without one unit, in memory, and what is left is retrained for a few steps as a student is: the
same losses, the outputs of all stages as taps.
"""

import copy
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from bksdm.common.runs import write_text
from bksdm.data.folder import data_folder, read_captions
from bksdm.data.stream import Stream
from bksdm.distill.conditions import Conditions
from bksdm.distill.data import open_data
from bksdm.distill.loop import Schedule, train
from bksdm.distill.objective import Distillation
from bksdm.distill.state import Checkpoints, Ema, TrainState, averaged
from bksdm.evaluate.output_error import output_errors
from bksdm.families import bypassed, units
from bksdm.families.noise import NoiseSchedule
from bksdm.families.recipe import Tap
from bksdm.families.units import Unit
from bksdm.models.pipelines import load_pipeline


def taps(student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> list[Tap]:
    """The outputs of all stages that both have; the innermost that remains after a cut has lost its downsampler."""
    left = len(student.down_blocks)
    dropped = len(teacher.down_blocks) - left
    down = [f"down_blocks.{stage}" for stage in range(left - 1 if dropped else left)]
    up = [Tap(f"up_blocks.{stage + dropped}", f"up_blocks.{stage}") for stage in range(left)]
    return [*(Tap(path, path) for path in down), *up]


def damage(unit: Unit, teacher_name: str, latents: Path, out: Path, *, steps: int, batch_size: int, seed: int) -> float:
    """Output error on held-out pictures of the teacher without a unit, after retraining what is left."""
    file = out / f"{unit.name}-{steps}.json"
    if file.is_file():
        return float(json.loads(file.read_text()))
    teacher = load_pipeline(teacher_name)
    student = copy.deepcopy(teacher.unet).train()
    samples = open_data(str(latents), None, False, 0).samples(teacher)
    conditions = Conditions.of(teacher)
    with bypassed(student, [unit]):
        left = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(left, lr=1e-3, weight_decay=1e-2, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        state = TrainState(student, optimizer, ema=Ema(student, 0.9), scaler=scaler)
        objective = Distillation(
            student,
            teacher.unet,
            taps(student, teacher.unet),
            conditions,
            NoiseSchedule.from_scheduler(teacher.scheduler),
        )
        schedule = Schedule(steps, lr=1e-3, warmup=max(1, steps // 10), cosine=True, checkpoint_every=10**9)
        train(
            state, objective, Stream(samples, batch_size, seed), schedule, Checkpoints(out / "state", keep=1), seed=seed
        )
        with averaged(state):
            error = float(output_errors(student.eval(), teacher, read_captions(data_folder("emoji/heldout"))).mean())
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(error) + "\n")
    return error


def damages(teacher: str, latents: Path, out: Path, *, steps: int, batch_size: int, seed: int = 0) -> dict[str, float]:
    """The same of every unit, by name."""
    found = units(load_pipeline(teacher).unet.config)
    return {
        unit.name: damage(unit, teacher, latents, out, steps=steps, batch_size=batch_size, seed=seed) for unit in found
    }
