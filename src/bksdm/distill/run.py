"""`bksdm distill`: from a teacher, a student and captioned pictures to a retrained student."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.common.randomness import Draws
from bksdm.common.runs import digest
from bksdm.data.prompts import read_prompts
from bksdm.data.stream import Samples, Stream
from bksdm.distill.captions import Captions
from bksdm.distill.data import Latents, Pictures, open_data
from bksdm.distill.follow import check_not_negative, check_training
from bksdm.distill.objective import Distillation
from bksdm.distill.openvino import NotConverted, openvino_is_faster
from bksdm.distill.pair import Pair, changes_captions, check_formats
from bksdm.distill.plan import Plan, plan
from bksdm.distill.state import TrainState
from bksdm.distill.training import Lesson, Parts, asked_for_on_card, teach
from bksdm.models.configs import check_ready, load_denoiser_config
from bksdm.models.drawing import drawing, drawing_defaults
from bksdm.models.pipelines import denoiser, tokenizing
from bksdm.options.distill import DistillOptions
from bksdm.pruning.inherit import with_denoiser
from bksdm.pruning.told import checked_pruning
from bksdm.runtime.defaults import Defaults

# Largest relative difference of a compiled network from itself that is rounding.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_SHOWN = ("task", "output_kd", "feature_kd")
_ON_CARD = (
    "steps",
    "batch_size",
    "accumulation",
    "lr",
    "warmup",
    "cosine",
    "task_weight",
    "output_weight",
    "feature_weight",
    "weight_decay",
    "max_grad_norm",
    "ema_decay",
    "seed",
)
# On the card where they are not the paper's.
_CHOICES = (
    "feature_decay",
    "taps",
    "normalize_features",
    "mask_features",
    "feature_directions",
    "caption_features",
    "teacher_inputs",
    "timesteps",
    "guided_output",
    "caption_dropout",
    "random_conditioning",
    "caption_pool",
    "cutmix",
)
_MOST_CAPTIONS = 10_000  # of the data's own that make a pool


def distill(options: DistillOptions) -> Path:
    """Retrain a student; the same options again go on where the run stopped.

    Returns:
        The folder of the retrained student, `OUT/student`.

    Raises:
        InputError: An option, the models or the data are unfit; see the message.
        Interrupted: The run was asked to stop and can go on.
    """
    check_ready("distill", options.teacher, options=dataclasses.asdict(options))
    _check(options)
    own = drawing_defaults(options.teacher)
    how = drawing(options.teacher, guidance=options.sample_guidance)
    options = dataclasses.replace(options, sample_guidance=how.guidance)
    return teach(options, _lesson(options, how, own))


def _lesson(options: DistillOptions, how: Defaults, own: Defaults | None) -> Lesson:
    pool = options.caption_pool
    usual = {field.name: field.default for field in dataclasses.fields(options)}
    on_card = (
        *_ON_CARD,
        *(name for name in _CHOICES if getattr(options, name) != usual[name]),
        *asked_for_on_card(options),
    )
    return Lesson(
        "distill",
        objective=lambda parts: _objective(options, parts),
        pipeline=lambda pair: with_denoiser(pair.teacher, pair.student),
        check=lambda pair: _check_pair(options, pair),
        shown=_SHOWN,
        on_card={name: getattr(options, name) for name in on_card},
        teacher_drawing=how,
        student_drawing=how,
        own=own,
        embeds=options.random_conditioning is not None,
        contents={"pool_content": None if pool is None else digest(read_prompts(pool, "caption_pool"))},
        cutmix=options.cutmix,
        fixed_steps=options.cosine or options.feature_decay,  # these fall by the number of steps
    )


def _check_pair(options: DistillOptions, pair: Pair) -> None:
    """Let what does not go with these models say so."""
    pair.pruning.chosen_taps(options.taps)
    pair.schedule(options.timesteps)


def _objective(options: DistillOptions, parts: Parts) -> Distillation:
    captions = _captions(options, parts.pair, parts.data)
    objective = parts.pair.objective(options, captions, parts.replica, _remaining(options, parts.state))
    if options.compile_teacher:
        _compile_teacher(objective, parts.samples, options, parts.pair)
    return objective


def foresee(options: DistillOptions) -> Plan:
    """What the run that these options ask for will take; nothing is written, and no weights are read.

    Raises:
        InputError: An option, the models or the data are unfit; see the message.
    """
    _check(options)
    check_ready("distill", options.teacher, options={"plan": True})
    data = open_data(options.data, options.resolution, options.flip, options.cache_gb)
    pruning = checked_pruning(
        options.teacher, options.student, load_denoiser_config(options.teacher), load_denoiser_config(options.student)
    )
    pruning.chosen_taps(options.taps)  # says where there are none
    return plan(options, pruning, data)


def _captions(options: DistillOptions, pair: Pair, data: Pictures | Latents) -> Captions | None:
    """What becomes of the captions; None where they stay as they are."""
    if not changes_captions(options):
        return None
    pool: list[str] = []
    if options.caption_pool is not None:
        pool = read_prompts(options.caption_pool, "caption_pool")
    elif options.random_conditioning is not None:
        pool = data.captions(min(len(data), _MOST_CAPTIONS))
    tokenize = tokenizing(pair.teacher)
    return pair.captions(options, torch.stack([tokenize(text) for text in ("", *dict.fromkeys(pool))]))


def _remaining(options: DistillOptions, state: TrainState) -> Callable[[], float]:
    """The share of the weight of the feature loss that the step under way has."""
    return lambda: 1 - state.step / options.steps if options.feature_decay else 1.0


def _compile_teacher(objective: Distillation, samples: Samples, options: DistillOptions, pair: Pair) -> None:
    """Compiled networks are checked on the first batch: compilers have been wrong without a word (docs/log.md)."""
    say("compiling the teacher, which takes minutes")
    batch = next(Stream(samples, options.batch_size, options.seed).batches())
    on_device = {name: value.to(pair.formats.device) for name, value in batch.items()}
    draws, formats = Draws(options.seed, "compile"), pair.formats
    by_openvino = not options.shard_teacher and openvino_is_faster(formats.device, formats.teacher_precision)
    try:
        difference = objective.compile_teacher(on_device, draws, by_openvino=by_openvino)
    except NotConverted:
        say("OpenVINO does not know an operation of this teacher, so torch compiles it")
        difference = objective.compile_teacher(on_device, Draws(options.seed, "compile"))
    most = _ROUNDING[denoiser(pair.teacher).dtype]
    if not difference <= most:
        objective.uncompile_teacher()
        say(f"the compiled teacher differs by {difference:.1g}, more than {most:g}, from itself; it stays uncompiled")


def _check(options: DistillOptions) -> None:
    check_training(options)
    check_formats(options)
    for name in ("task_weight", "output_weight", "feature_weight"):
        check_not_negative(options, name)
    if options.peak_tflops is not None and not options.peak_tflops > 0:
        raise InputError(f"peak_tflops is {options.peak_tflops}; give more than 0")
    _check_choices(options)


def _check_choices(options: DistillOptions) -> None:
    if options.mask_features is not None and not options.mask_features >= 1:
        raise InputError(f"mask_features is {options.mask_features}; give 1 or more standard deviations")
    if options.feature_directions and (options.normalize_features or options.mask_features is not None):
        raise InputError(
            "feature_directions compares vectors of length 1, and goes with neither normalize_features nor "
            "mask_features; leave one out"
        )
    if options.teacher_inputs and options.taps != "stages":
        raise InputError(
            f"teacher_inputs gives what the teacher has between stages, and taps is {options.taps}; leave one out"
        )
    if options.teacher_inputs and not options.feature_weight:
        raise InputError(
            "teacher_inputs leaves features alone to teach all blocks but the last, and feature_weight is 0; give more"
        )
    if options.guided_output is not None and not options.guided_output > 1:
        raise InputError(f"guided_output is {options.guided_output}; give more than 1, or leave it out")
    if not 0 <= options.caption_dropout < 1:
        raise InputError(f"caption_dropout is {options.caption_dropout}; give a number from 0 to below 1")
    if options.random_conditioning is not None and not options.random_conditioning >= 0:
        raise InputError(f"random_conditioning is {options.random_conditioning}; give 0 or more")
    if not 0 <= options.cutmix <= 1:
        raise InputError(f"cutmix is {options.cutmix}; give a number from 0 to 1")
    if options.caption_pool is not None:
        if options.random_conditioning is None:
            raise InputError(
                f"caption_pool is {options.caption_pool}, and nothing draws from it; give --random_conditioning too"
            )
        read_prompts(options.caption_pool, "caption_pool")
