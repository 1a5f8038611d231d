r"""Retraining a student by its teacher: a batch gives the task, output and feature losses.

$L = \lambda_{task} \|\epsilon - \epsilon_S\|^2 + \lambda_{out} \|\epsilon_T - \epsilon_S\|^2
+ \lambda_{feat} \sum_l \|f_T^l - f_S^l\|^2$, teacher and student on the same noisy latents
(BK-SDM, arXiv 2305.15798, eq. 1-4).
"""

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bksdm.data.stream import Batch
from bksdm.distill.conditions import Conditions
from bksdm.distill.noise import NoiseSchedule
from bksdm.losses import LossWeights, feature_kd_losses, output_kd_loss, task_loss
from bksdm.randomness import Draws
from bksdm.recipe import Tap
from bksdm.taps import Features


class Distillation:
    """The objective of retraining. It owns the frozen teacher and watches the student.

    Where several processes train, `replica` wraps the student and is called in its place.

    Called with a batch (see `Conditions`) and random numbers, it returns `loss`, `task`,
    `output_kd`, `feature_kd`, and `tap/PATH` for every tap by its student path, unweighted.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        taps: Sequence[Tap],
        conditions: Conditions,
        noise_schedule: NoiseSchedule,
        weights: LossWeights | None = None,
        replica: nn.Module | None = None,
    ) -> None:
        self.student = student
        self._call_student = replica or student
        self.teacher = teacher.eval().requires_grad_(False)
        self.conditions = conditions
        self.noise_schedule = noise_schedule
        self.weights = weights or LossWeights()
        self.taps = tuple(taps)
        self._student_features = Features(student, [tap.student for tap in taps])
        self._teacher_features = Features(teacher, [tap.teacher for tap in taps])

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        noisy = self.noise_schedule.corrupt(self.conditions.latents(batch, draws), draws)
        context = self.conditions.context(batch)
        with torch.no_grad(), self._teacher_features.recording() as wanted:
            taught = self._taught(noisy.latents, noisy.timesteps, context)
        with self._student_features.recording() as learnt:
            predicted = self._call_student(noisy.latents, noisy.timesteps, context.float()).sample

        per_tap = feature_kd_losses(
            {tap.student: learnt[tap.student] for tap in self.taps},
            {tap.teacher: wanted[tap.teacher] for tap in self.taps},
        )
        task, output_kd = task_loss(predicted, noisy.target), output_kd_loss(predicted, taught)
        feature_kd = torch.stack(list(per_tap.values())).sum()
        loss = self.weights.task * task + self.weights.output_kd * output_kd + self.weights.feature_kd * feature_kd
        terms = {"loss": loss, "task": task, "output_kd": output_kd, "feature_kd": feature_kd}
        return terms | {f"tap/{path}": value for path, value in per_tap.items()}

    def compile_teacher(self, batch: Batch, draws: Draws) -> float:
        """Compile the teacher for batches like `batch`.

        Returns:
            How far its output and its features then are from what they were: the largest relative 2-norm of a
            difference. Where that is more than rounding, call `uncompile_teacher`.
        """
        noisy = self.noise_schedule.corrupt(self.conditions.latents(batch, draws), draws)
        inputs = (noisy.latents, noisy.timesteps, self.conditions.context(batch))
        before = self._teacher_answers(*inputs)
        self.teacher.compile(dynamic=False)
        after = self._teacher_answers(*inputs)
        return max(
            float((now - then).norm() / then.norm().clamp(min=1e-12)) for then, now in zip(before, after, strict=True)
        )

    def uncompile_teacher(self) -> None:
        """Take `compile_teacher` back."""
        self.teacher._compiled_call_impl = None

    @torch.no_grad()
    def _teacher_answers(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor]:
        with self._teacher_features.recording() as features:
            output = self._taught(latents, timesteps, context)
        return [value.float() for value in (output, *features.values())]

    def _taught(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """The teacher's output, computed in the teacher's own number format."""
        own = self.teacher.dtype
        with torch.autocast(latents.device.type, enabled=False):
            output: Tensor = self.teacher(latents.to(own), timesteps, context.to(own)).sample
        return output
