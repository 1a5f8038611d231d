"""`bksdm lcm`: from a teacher, a retrained student and captioned pictures to a student that draws in few steps."""

import dataclasses
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from bksdm.common.errors import InputError
from bksdm.distill.conditions import without_caption
from bksdm.distill.consistency import Consistency, Distance, few_step_scheduler, unmoving_scheduler
from bksdm.distill.consistency_functions import ConsistencyFunction, ToPhaseEnd, ToPicture, phase_ends
from bksdm.distill.data import latent_sides
from bksdm.distill.follow import check_training
from bksdm.distill.losses import output_kd_loss, pseudo_huber
from bksdm.distill.pair import Pair, check_formats
from bksdm.distill.training import Lesson, Parts, asked_for_on_card, teach
from bksdm.families.flow import FlowSchedule
from bksdm.models.configs import check_ready, family_of_model, load_denoiser_config, load_index
from bksdm.models.drawing import drawing
from bksdm.models.pipelines import denoiser
from bksdm.options.distill import LcmOptions
from bksdm.pruning.inherit import with_denoiser
from bksdm.runtime.defaults import Defaults

_ON_CARD = (
    "student",
    "steps",
    "solver_steps",
    "guidance",
    "loss",
    "batch_size",
    "accumulation",
    "lr",
    "warmup",
    "cosine",
    "weight_decay",
    "max_grad_norm",
    "ema_decay",
    "seed",
)
_DISTANCES: dict[str, Distance] = {"huber": pseudo_huber, "l2": output_kd_loss}


def lcm(options: LcmOptions) -> Path:
    """Teach a student to draw in few steps; the same options again go on where the run stopped.

    Returns:
        The folder of the student, `OUT/student`, which says that it draws in `sample_steps` steps without guidance. It
        has an `LCMScheduler`, or in flow matching the list of noise levels that it was taught.

    Raises:
        InputError: An option, the models or the data are unfit; see the message.
        Interrupted: The run was asked to stop and can go on.
    """
    check_ready("lcm", options.teacher)
    how = drawing(options.teacher, guidance=options.guidance)
    _check(options, how)
    if not _takes_guidance(options):
        how = dataclasses.replace(how, guidance=family_of_model(options.teacher).unguided)
    options = dataclasses.replace(options, guidance=how.guidance)
    return teach(options, _lesson(options, how))


def _lesson(options: LcmOptions, how: Defaults) -> Lesson:
    few = _drawing(options)
    return Lesson(
        "lcm",
        objective=lambda parts: _objective(options, parts, how.guidance),
        pipeline=lambda pair: _pipeline(options, pair),
        check=lambda pair: _check_solver(options, pair),
        shown=("loss",),
        on_card={name: getattr(options, name) for name in (*_ON_CARD, *asked_for_on_card(options))},
        changed=("scheduler",),
        teacher_drawing=how,
        student_drawing=few,
        own=few,
        fixed_steps=options.cosine,  # it falls by the number of steps
    )


def _drawing(options: LcmOptions) -> Defaults:
    """How the student draws."""
    family, steps = family_of_model(options.teacher), options.sample_steps
    taught = family.taught_guidance(load_denoiser_config(options.teacher))
    ends = phase_ends(options.solver_steps, steps)
    levels = tuple(end / options.solver_steps for end in reversed(ends[1:])) if family.by_flow else None
    return Defaults(steps, family.usual.guidance if taught else family.unguided, levels)


def _objective(options: LcmOptions, parts: Parts, guidance: float) -> Consistency:
    pair = parts.pair
    conditions, teacher = pair.conditions, denoiser(pair.teacher)
    return Consistency(
        pair.student,
        teacher,
        conditions,
        _consistency_function(options, pair),
        without_caption(pair.teacher, conditions),
        guidance=pair.family.second_call(pair.teacher.config, teacher.config, guidance),
        average=parts.average,
        replica=parts.replica,
        distance=_DISTANCES[options.loss],
    )


def _consistency_function(options: LcmOptions, pair: Pair) -> ConsistencyFunction:
    schedule = pair.schedule()
    if isinstance(schedule, FlowSchedule):
        size = latent_sides(pair.teacher, options.data, options.resolution)
        ends = torch.tensor(phase_ends(options.solver_steps, options.sample_steps))
        return ToPhaseEnd(schedule, schedule.grid(options.solver_steps, *size), ends)
    return ToPicture(schedule, few_step_scheduler(pair.teacher.scheduler, options.solver_steps))


def _pipeline(options: LcmOptions, pair: Pair) -> DiffusionPipeline:
    pipeline, schedule = with_denoiser(pair.teacher, pair.student), pair.schedule()
    if isinstance(schedule, FlowSchedule):
        shift = schedule.shift(*latent_sides(pair.teacher, options.data, options.resolution))
        pipeline.scheduler = unmoving_scheduler(pair.teacher.scheduler, shift)
    else:
        pipeline.scheduler = few_step_scheduler(pair.teacher.scheduler, options.solver_steps)
    return pipeline


def _check_solver(options: LcmOptions, pair: Pair) -> None:
    if not pair.family.by_flow:
        few_step_scheduler(pair.teacher.scheduler, options.solver_steps)  # says where they do not divide


def _check(options: LcmOptions, how: Defaults) -> None:
    check_training(options)
    check_formats(options)
    for name in ("solver_steps", "sample_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; give at least 1")
    if options.sample_steps > options.solver_steps:
        raise InputError(
            f"sample_steps is {options.sample_steps}; give at most {options.solver_steps}, as solver_steps"
        )
    family, config = family_of_model(options.teacher), load_denoiser_config(options.teacher)
    if options.guidance is not None and not _takes_guidance(options):
        raise InputError(f"guidance is {options.guidance}, and pipelines of this teacher use none; leave it out")
    if family.taught_guidance(config) and how.guidance != family.usual.guidance:
        raise InputError(
            f"guidance is {how.guidance}, and models of {family.name} learn by being told {family.usual.guidance:g}; "
            f"give --guidance {family.usual.guidance:g}"
        )
    if not how.guidance >= family.unguided:
        raise InputError(f"guidance is {how.guidance}; give {family.unguided:g} for none, or more")


def _takes_guidance(options: LcmOptions) -> bool:
    """Whether the teacher's pipelines are guided, by a second call or by telling its denoiser."""
    family, config = family_of_model(options.teacher), load_denoiser_config(options.teacher)
    return family.guides(load_index(options.teacher), config) or family.taught_guidance(config)
