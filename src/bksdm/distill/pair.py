"""A teacher and its student on their device, set up to compute as fast as it can."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from bksdm.common.devices import (
    PRECISIONS,
    VAE_LAYOUT,
    channels_last_is_faster,
    choose_device,
    choose_precision,
    plain_attention_is_faster,
)
from bksdm.common.processes import shard
from bksdm.distill.captions import CaptionPool, Captions
from bksdm.distill.conditions import Conditions
from bksdm.distill.losses import LossWeights
from bksdm.distill.objective import Distillation
from bksdm.distill.state import Ema, TrainState
from bksdm.families import family_of_pipeline
from bksdm.families.family import Family, Timesteps, Told
from bksdm.families.noise import ForwardProcess
from bksdm.families.recipe import Pruning
from bksdm.models.pipelines import caption_length, denoiser
from bksdm.options import DistillOptions, StudentOptions
from bksdm.pruning.describe import Description, describe_config


@dataclass(frozen=True)
class Formats:
    """How a run computes.

    Attributes:
        device: Where.
        precision: Autocast type of the student, whose weights are float32.
        teacher_precision: Type of the teacher's weights.
    """

    device: torch.device
    precision: torch.dtype
    teacher_precision: torch.dtype

    @classmethod
    def choose(cls, options: StudentOptions) -> "Formats":
        """What the options name; what is fast on the device where they say auto."""
        device = choose_device(options.device)
        precision = choose_precision(options.precision, device, training=True)
        own = precision if options.teacher_precision == "auto" else PRECISIONS[options.teacher_precision]
        return cls(device, precision, own)

    def to_dict(self) -> dict[str, str]:
        return {
            "device": str(self.device),
            "precision": str(self.precision),
            "teacher_precision": str(self.teacher_precision),
        }


@dataclass(frozen=True)
class Pair:
    """A teacher, its student, and what the recipe says of them."""

    teacher: DiffusionPipeline
    student: Any
    pruning: Pruning
    formats: Formats

    def set_up(self, *, gradient_checkpointing: bool, shard_teacher: bool) -> None:
        """Bring both to the device, in the number formats, memory layout and attention that are fast there."""
        device, precision, own = self.formats.device, self.formats.precision, self.formats.teacher_precision
        denoiser(self.teacher).to(own)
        if shard_teacher:
            shard(denoiser(self.teacher), device)
        self.teacher.to(device)
        denoiser(self.teacher).to(own)
        self.teacher.vae.to(memory_format=VAE_LAYOUT)
        self.student.to(device).train()
        if channels_last_is_faster(device, precision):
            self.student.to(memory_format=torch.channels_last)
        if channels_last_is_faster(device, own):
            denoiser(self.teacher).to(memory_format=torch.channels_last)
        if plain_attention_is_faster(device, precision):
            self.family.attend(self.student, plainly=True)
        if gradient_checkpointing:
            self.student.enable_gradient_checkpointing()

    def objective(
        self,
        options: DistillOptions,
        captions: Captions | None = None,
        replica: nn.Module | None = None,
        remaining: Callable[[], float] = lambda: 1.0,
    ) -> Distillation:
        """The objective that the options ask for; the other arguments are those of `Distillation`."""
        return Distillation(
            self.student,
            denoiser(self.teacher),
            self.pruning.chosen_taps(options.taps),
            self.conditions,
            self.schedule(options.timesteps),
            LossWeights(options.task_weight, options.output_weight, options.feature_weight),
            replica,
            normalize_features=options.normalize_features,
            mask_features=options.mask_features,
            captions=captions,
            guided_output=options.guided_output,
            remaining=remaining,
        )

    def captions(self, options: DistillOptions, tokens: Tensor) -> Captions:
        """What the options make of captions, from the tokens of the empty prompt and then of a pool of N."""
        device, conditions = self.formats.device, self.conditions

        def embed(tokens: Tensor) -> Told:
            return conditions.embedded(tokens.to(device))

        rate = options.random_conditioning
        return Captions(
            self.family.without_caption(self.teacher, embed(tokens[:1])),
            dropout=options.caption_dropout,
            pool=None if rate is None else CaptionPool(tokens[1:], embed, options.cache_gb * 2**30),
            rate=rate or 0.0,
            timesteps=len(self.schedule()),
        )

    @property
    def conditions(self) -> Conditions:
        """The teacher's VAE encoder and text encoders."""
        return Conditions.of(self.teacher)

    @property
    def family(self) -> Family:
        """What both are of."""
        return family_of_pipeline(self.teacher)

    def schedule(self, timesteps: Timesteps = "even") -> ForwardProcess:
        """The forward process that the teacher was trained on, its timesteps drawn so."""
        return self.family.noise_schedule(self.teacher.scheduler, timesteps)

    def fresh_state(self, options: StudentOptions) -> TrainState:
        """The student before its first step."""
        student, formats = self.student, self.formats
        return TrainState(
            student,
            torch.optim.AdamW(student.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True),
            ema=Ema(student, options.ema_decay) if options.ema_decay else None,
            scaler=torch.amp.GradScaler(formats.device.type, enabled=formats.precision == torch.float16),
        )

    @property
    def description(self) -> Description:
        config = dict(denoiser(self.teacher).config)
        return describe_config(config, self.pruning.recipe, caption_length(self.teacher))


def changes_captions(options: DistillOptions) -> bool:
    """Whether the options ask for other captions than those of the data, the empty prompt included."""
    return bool(options.caption_dropout) or options.random_conditioning is not None or options.guided_output is not None
