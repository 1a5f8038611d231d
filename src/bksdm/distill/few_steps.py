"""`bksdm lcm`: from a teacher, a retrained student and captioned pictures to a student that draws in few steps."""

import dataclasses
from pathlib import Path

from diffusers import DiffusionPipeline

from bksdm.common.errors import InputError
from bksdm.distill.conditions import without_caption
from bksdm.distill.consistency import Consistency, Distance, few_step_scheduler
from bksdm.distill.follow import check_training
from bksdm.distill.losses import output_kd_loss, pseudo_huber
from bksdm.distill.pair import Pair
from bksdm.distill.training import Lesson, Parts, teach
from bksdm.models.pipelines import check_ready, denoiser, drawing
from bksdm.options import LcmOptions
from bksdm.pruning.run import with_denoiser
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
        The folder of the student, `OUT/student`, which has an `LCMScheduler` and says that it draws in `sample_steps`
        steps without guidance.

    Raises:
        InputError: An option, the models or the data are unfit; see the message.
        Interrupted: The run was asked to stop and can go on.
    """
    check_ready("lcm", options.teacher)
    how = drawing(options.teacher, guidance=options.guidance)
    options = dataclasses.replace(options, guidance=how.guidance)
    _check(options, how)
    return teach(options, _lesson(options, how))


def _lesson(options: LcmOptions, how: Defaults) -> Lesson:
    few = Defaults(options.sample_steps, guidance=1.0)
    return Lesson(
        "lcm",
        objective=lambda parts: _objective(options, parts, how.guidance),
        pipeline=lambda pair: _pipeline(options, pair),
        check=lambda pair: _check_solver(options, pair),
        shown=("loss",),
        on_card={name: getattr(options, name) for name in _ON_CARD},
        changed=("scheduler",),
        teacher_drawing=how,
        student_drawing=few,
        own=few,
        fixed_steps=options.cosine,  # it falls by the number of steps
    )


def _objective(options: LcmOptions, parts: Parts, guidance: float) -> Consistency:
    pair, ema = parts.pair, parts.state.ema
    conditions = pair.conditions
    return Consistency(
        pair.student,
        denoiser(pair.teacher),
        conditions,
        pair.schedule(),
        few_step_scheduler(pair.teacher.scheduler, options.solver_steps),
        without_caption(pair.teacher, conditions),
        guidance=guidance,
        average=ema.average if ema else None,
        replica=parts.replica,
        distance=_DISTANCES[options.loss],
    )


def _pipeline(options: LcmOptions, pair: Pair) -> DiffusionPipeline:
    pipeline = with_denoiser(pair.teacher, pair.student)
    pipeline.scheduler = few_step_scheduler(pair.teacher.scheduler, options.solver_steps)
    return pipeline


def _check_solver(options: LcmOptions, pair: Pair) -> None:
    few_step_scheduler(pair.teacher.scheduler, options.solver_steps)  # says where they do not divide


def _check(options: LcmOptions, how: Defaults) -> None:
    check_training(options)
    for name in ("solver_steps", "sample_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; give at least 1")
    if options.sample_steps > options.solver_steps:
        raise InputError(
            f"sample_steps is {options.sample_steps}; give at most {options.solver_steps}, as solver_steps"
        )
    if not how.guidance >= 1:
        raise InputError(f"guidance is {how.guidance}; give 1 for none, or more")
