"""A teacher and its student on their device, set up to compute as fast as it can."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from bksdm.common.devices import (
    STORED,
    VAE_LAYOUT,
    channels_last_is_faster,
    choose_device,
    choose_precision,
    keep_in,
    offload,
    plain_attention_is_faster,
)
from bksdm.common.errors import InputError
from bksdm.common.processes import shard
from bksdm.distill.captions import CaptionPool, Captions
from bksdm.distill.conditions import Conditions
from bksdm.distill.losses import LossWeights
from bksdm.distill.objective import Distillation
from bksdm.distill.optimizers import optimizer_of
from bksdm.distill.state import Ema, TrainState
from bksdm.families import family_of_pipeline
from bksdm.families.family import Family, Timesteps, Told
from bksdm.families.noise import ForwardProcess
from bksdm.families.recipe import Pruning
from bksdm.models.adapters.training import add_lora, check_peft, every_layer, merged_weights
from bksdm.models.pipelines import caption_length, denoiser, text_encoders
from bksdm.options.distill import DistillOptions
from bksdm.options.training import StudentOptions
from bksdm.pruning.describe import Description, describe_config


@dataclass(frozen=True)
class Formats:
    """How a run computes.

    Attributes:
        device: Where.
        precision: Autocast type of the student.
        teacher_precision: Type of the teacher's weights.
        student_precision: Type of those of the student's that do not learn; what learns is float32.
    """

    device: torch.device
    precision: torch.dtype
    teacher_precision: torch.dtype
    student_precision: torch.dtype = torch.float32

    @classmethod
    def choose(cls, options: StudentOptions) -> "Formats":
        """What the options name; what is fast on the device where they say auto."""
        device = choose_device(options.device)
        precision = choose_precision(options.precision, device, training=True)
        own, kept = (
            precision if name == "auto" else STORED[name]
            for name in (options.teacher_precision, options.student_precision)
        )
        if options.lora_rank is not None and kept.itemsize > 1 and kept not in (precision, torch.float32):
            raise InputError(
                f"student_precision is {options.student_precision}, and the student computes in {precision}; give both "
                f"--precision and --student_precision {options.student_precision}, or leave the second out"
            )
        return cls(device, precision, own, torch.float32 if options.lora_rank is None else kept)

    def computing(self, kept: torch.dtype) -> torch.dtype:
        """The type in which weights compute that are kept in one."""
        return kept if kept.itemsize > 1 else self.precision

    def to_dict(self) -> dict[str, str]:
        return {
            "device": str(self.device),
            "precision": str(self.precision),
            "teacher_precision": str(self.teacher_precision),
            "student_precision": str(self.student_precision),
        }


@dataclass(frozen=True)
class Pair:
    """A teacher, its student, and what the recipe says of them."""

    teacher: DiffusionPipeline
    student: Any
    pruning: Pruning
    formats: Formats

    def set_up(
        self,
        *,
        gradient_checkpointing: bool = False,
        shard_teacher: bool = False,
        offload_teacher: bool = False,
        texts: bool = True,
    ) -> None:
        """Bring both to the device, in the number formats, memory layout and attention that are fast there.

        Arguments:
            gradient_checkpointing: Of the student.
            shard_teacher: Whether the teacher's weights are spread over the processes.
            offload_teacher: Whether they stay in this machine's memory.
            texts: Whether the text encoders come along.
        """
        device, precision, own = self.formats.device, self.formats.precision, self.formats.teacher_precision
        teacher = denoiser(self.teacher)
        self.keep()
        if channels_last_is_faster(device, own):
            teacher.to(memory_format=torch.channels_last)
        if shard_teacher:
            shard(teacher, device)
        for network in (self.teacher.vae, *(text_encoders(self.teacher) if texts else [])):
            network.to(device)
        if offload_teacher:
            offload(teacher, device)
        else:
            teacher.to(device)
        self.teacher.vae.to(memory_format=VAE_LAYOUT)
        self.student.to(device).train()
        if channels_last_is_faster(device, precision):
            self.student.to(memory_format=torch.channels_last)
        if plain_attention_is_faster(device, precision):
            self.family.attend(self.student, plainly=True)
        if gradient_checkpointing:
            self.student.enable_gradient_checkpointing()

    def dismiss_texts(self) -> None:
        """Take the text encoders from the device, where captions are embedded already."""
        for encoder in text_encoders(self.teacher):
            encoder.to("cpu")

    def keep(self) -> None:
        """Bring the weights of both into their number formats."""
        formats = self.formats
        keep_in(denoiser(self.teacher), formats.teacher_precision, formats.precision)
        keep_in(self.student, formats.student_precision, formats.precision, learns=True)

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
            feature_directions=options.feature_directions,
            caption_features=options.caption_features,
            teacher_inputs=options.teacher_inputs,
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

    def finished(self) -> Any:
        """The student as a stock network: itself, or a copy into which what has learnt is merged."""
        if not hasattr(self.student, "peft_config"):
            return self.student
        with init_empty_weights(include_buffers=False):
            made = self.family.build(self.student.config)
        made.load_state_dict(merged_weights(self.student, self.formats.precision), assign=True)
        return made.eval()

    def fresh_state(self, options: StudentOptions) -> TrainState:
        """The student before its first step."""
        learns, formats = learner(self.student, options), self.formats
        return TrainState(
            learns,
            optimizer_of(learns, options.optimizer, options.lr, options.weight_decay),
            ema=Ema(learns, options.ema_decay) if options.ema_decay else None,
            scaler=torch.amp.GradScaler(formats.device.type, enabled=formats.precision == torch.float16),
        )

    @property
    def description(self) -> Description:
        config = dict(denoiser(self.teacher).config)
        return describe_config(config, self.pruning.recipe, caption_length(self.teacher))


def learner(student: nn.Module, options: StudentOptions) -> nn.Module:
    """What of a student learns; the rest is frozen, and matrices beside it are added where that is asked for."""
    if options.lora_rank is None:
        return student
    part = "student"
    return add_lora({part: student}, {part: every_layer(student)}, options.lora_rank, options.seed, norms=True)


def check_formats(options: StudentOptions) -> None:
    """Refuse formats that do not go together.

    Raises:
        InputError: Naming them, or what is not installed.
    """
    if options.lora_rank is not None:
        if options.lora_rank < 1:
            raise InputError(f"lora_rank is {options.lora_rank}; give at least 1, or leave it out")
        check_peft()
    elif options.student_precision not in ("auto", "fp32"):
        raise InputError(
            f"student_precision is {options.student_precision}, and weights that learn are float32; give "
            f"--lora_rank, or leave it out"
        )
    if options.offload_teacher and options.shard_teacher:
        raise InputError("offload_teacher leaves the teacher where it is, and shard_teacher spreads it; leave one out")
    if options.shard_teacher and options.teacher_precision == "fp8":
        raise InputError("teacher_precision is fp8, which cannot be spread over processes; leave out --shard_teacher")


def changes_captions(options: DistillOptions) -> bool:
    """Whether the options ask for other captions than those of the data, the empty prompt included."""
    return bool(options.caption_dropout) or options.random_conditioning is not None or options.guided_output is not None
