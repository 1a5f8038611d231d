r"""Retraining a student by its teacher: a batch gives the task, output and feature losses.

$L = \lambda_{task} \|\epsilon - \epsilon_S\|^2 + \lambda_{out} \|\epsilon_T - \epsilon_S\|^2
+ \lambda_{feat} \sum_l \|f_T^l - f_S^l\|^2$, teacher and student on the same noisy latents
(BK-SDM, arXiv 2305.15798, eq. 1-4). What may differ from the paper is an argument that is off by default, and
described in docs/distillation-options.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bksdm.common.randomness import Draws
from bksdm.data.cutmix import COMPOSED
from bksdm.data.stream import Batch
from bksdm.distill.captions import Captions
from bksdm.distill.conditions import Conditions, as_type, joined, repeated
from bksdm.distill.losses import LossWeights, feature_kd_losses, guided, output_kd_loss, task_loss
from bksdm.distill.openvino import ByOpenvino
from bksdm.families.family import Told
from bksdm.families.noise import ForwardProcess
from bksdm.families.recipe import Tap
from bksdm.pruning.taps import Features, Read


@dataclass(frozen=True)
class _Question:
    """What both U-Nets are asked.

    Attributes:
        latents, timesteps, told: Their inputs: B samples with captions; under guidance, then the same with the empty
            prompt.
        target: What answers the task, for B samples.
        replaced: Which captions do not belong to their picture, with shape (B,); None where all do.
    """

    latents: Tensor
    timesteps: Tensor
    told: Told
    target: Tensor
    replaced: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The inputs in their order."""
        return (self.latents, self.timesteps, *self.told.values())


class Distillation:
    """The objective of retraining. It owns the frozen teacher and watches the student.

    Called with a batch (see `Conditions`) and random numbers, it returns `loss`, `task`,
    `output_kd`, `feature_kd`, and `tap/PATH` for every tap by its student path, unweighted; and
    `guided_kd` where outputs are compared under guidance.

    Arguments:
        student: The student.
        teacher: The teacher; frozen here.
        taps: Features to match.
        conditions: What turns a batch into latents and what the networks are told.
        noise_schedule: The forward process.
        weights: Weights of the terms.
        replica: Where several processes train, what wraps the student and is called in its place.
        normalize_features: See `feature_kd_losses`.
        mask_features: Likewise.
        feature_directions: Likewise.
        caption_features: Whether features are those of the caption's tokens too, where there are any.
        teacher_inputs: Whether what comes after a tap of the student is given the teacher's feature in the place of the
            student's, once that is read; not after the last, whose block learns from the output too.
        captions: What becomes of the captions. Where one is replaced by another, the task loss leaves its sample out.
        guided_output: Guidance scale at which the outputs are compared as well, with the weight of the output loss; it
            takes two forward passes of each U-Net, and `captions` for the empty prompt.
        remaining: The share of its weight that the feature loss has left, asked at every call.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        taps: Sequence[Tap],
        conditions: Conditions,
        noise_schedule: ForwardProcess,
        weights: LossWeights | None = None,
        replica: nn.Module | None = None,
        *,
        normalize_features: bool = False,
        mask_features: float | None = None,
        feature_directions: bool = False,
        caption_features: bool = False,
        teacher_inputs: bool = False,
        captions: Captions | None = None,
        guided_output: float | None = None,
        remaining: Callable[[], float] = lambda: 1.0,
    ) -> None:
        if guided_output is not None and captions is None:
            raise ValueError("guided_output needs captions, for the empty prompt")
        self.student = student
        self._call_student = replica or student
        self.teacher = teacher.eval().requires_grad_(False)
        self.conditions = conditions
        self.noise_schedule = noise_schedule
        self.weights = weights or LossWeights()
        self.taps = tuple(taps)
        self.normalize_features = normalize_features
        self.mask_features = mask_features
        self.feature_directions = feature_directions
        self.caption_features = caption_features
        self._replaced = self.taps[:-1] if teacher_inputs else ()
        self.captions = captions
        self.guided_output = guided_output
        self._remaining = remaining
        self._student_features = Features(student, [tap.student for tap in taps])
        self._tapped = tuple(dict.fromkeys(tap.teacher for tap in taps))
        self._teacher_features = Features(teacher, self._tapped)
        self._by_openvino: ByOpenvino | None = None

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        asked = self._question(batch, draws)
        read, whole = self._reader(asked), dict[nn.Module, Any]()

        def kept(module: nn.Module, output: Any) -> Tensor:
            whole[module] = output
            return read(module, output)

        taught, wanted = self._taught(asked, kept if self._replaced else read)
        instead = {tap.student: whole[self.teacher.get_submodule(tap.teacher)] for tap in self._replaced}
        with self._student_features.recording(read, instead) as learnt:
            told = as_type(asked.told, torch.float32)
            predicted = self.conditions.family.answer(self._call_student, asked.latents, asked.timesteps, told)

        per_tap = feature_kd_losses(
            {tap.student: self._captioned(learnt[tap.student]) for tap in self.taps},
            {tap.teacher: self._captioned(wanted[tap.teacher]) for tap in self.taps},
            normalize=self.normalize_features,
            mask=self.mask_features,
            directions=self.feature_directions,
        )
        task = task_loss(self._captioned(predicted), asked.target, asked.replaced)
        output_kd = output_kd_loss(self._captioned(predicted), self._captioned(taught))
        feature_kd = torch.stack(list(per_tap.values())).sum()
        weights, feature_weight = self.weights, self.weights.feature_kd * self._remaining()
        loss = weights.task * task + weights.output_kd * output_kd + feature_weight * feature_kd
        terms = {"loss": loss, "task": task, "output_kd": output_kd, "feature_kd": feature_kd}
        if self.guided_output is not None:
            terms["guided_kd"] = output_kd_loss(*(guided(out, self.guided_output) for out in (predicted, taught)))
            terms["loss"] = loss + weights.output_kd * terms["guided_kd"]
        return terms | {f"tap/{path}": value for path, value in per_tap.items()}

    def _question(self, batch: Batch, draws: Draws) -> _Question:
        noisy = self.noise_schedule.corrupt(self.conditions.latents(batch, draws), draws)
        latents, timesteps, told, replaced = noisy.latents, noisy.timesteps, self.conditions.captions(batch), None
        of_pictures = self.conditions.of_pictures(batch)
        if self.captions:
            told, replaced = self.captions(told, timesteps, draws)
        if COMPOSED in batch:
            replaced = batch[COMPOSED] if replaced is None else replaced | batch[COMPOSED]
        told = told | of_pictures
        if self.captions and self.guided_output is not None:
            told = joined(told, repeated(self.captions.empty, len(latents)))
            latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
        return _Question(latents, timesteps, told, noisy.target, replaced)

    def _reader(self, asked: _Question) -> Read:
        """What takes a feature out of what a module returns when this is asked."""
        return partial(self.conditions.family.feature, latents=asked.latents, captions=self.caption_features)

    def _captioned(self, answers: Tensor) -> Tensor:
        """Those of the samples with captions."""
        return answers if self.guided_output is None else answers.chunk(2)[0]

    def compile_teacher(self, batch: Batch, draws: Draws, *, by_openvino: bool = False) -> float:
        """Compile the teacher for batches like `batch`.

        Arguments:
            batch: Such a batch.
            draws: Random numbers for it.
            by_openvino: Whether OpenVINO computes the teacher from here on, for this objective alone, where the student
                is not given what the teacher has; else it is compiled by torch.

        Returns:
            How far its output and its features then are from what they were: the largest relative 2-norm of a
            difference. Where that is more than rounding, call `uncompile_teacher`.

        Raises:
            NotConverted: OpenVINO does not know an operation of the teacher.
        """
        asked = self._question(batch, draws)
        before = self._all_taught(asked)
        if by_openvino and not self._replaced:
            self._by_openvino = ByOpenvino(_Traced(self, asked), asked.tensors)
        else:
            self.teacher.compile(dynamic=False)
        after = self._all_taught(asked)
        return max(
            float((now - then).norm() / then.norm().clamp(min=1e-12)) for then, now in zip(before, after, strict=True)
        )

    def uncompile_teacher(self) -> None:
        """Take `compile_teacher` back."""
        self._by_openvino, self.teacher._compiled_call_impl = None, None

    def _all_taught(self, asked: _Question) -> list[Tensor]:
        """The teacher's output and its features."""
        output, features = self._taught(asked, self._reader(asked))
        return [value.float() for value in (output, *(features[path] for path in self._tapped))]

    @torch.no_grad()
    def _taught(self, asked: _Question, read: Read) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's output and what is read of its taps, computed in the teacher's own number format."""
        if self._by_openvino:
            output, *features = self._by_openvino(asked.tensors)
            return output, dict(zip(self._tapped, features, strict=True))
        own: Any = self.teacher.dtype
        with (
            torch.autocast(asked.latents.device.type, enabled=False),
            self._teacher_features.recording(read) as wanted,
        ):
            output = self.conditions.family.answer(
                self.teacher, asked.latents.to(own), asked.timesteps, as_type(asked.told, own)
            )
        return output, wanted


class _Traced(nn.Module):
    """The teacher as a tracer takes it: the tensors of a question to its output and then its features."""

    def __init__(self, objective: Distillation, asked: _Question) -> None:
        super().__init__()
        self.teacher = objective.teacher
        self._objective, self._asked = objective, asked

    def forward(self, latents: Tensor, timesteps: Tensor, *told: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self._asked.told, told, strict=True))
        asked = replace(self._asked, latents=latents, timesteps=timesteps, told=named)
        output, features = self._objective._taught(asked, self._objective._reader(asked))
        return (output, *(features[path] for path in self._objective._tapped))
