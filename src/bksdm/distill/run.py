"""`bksdm distill`: from a teacher, a student and captioned pictures to a retrained student."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from bksdm.card import model_card
from bksdm.data.folder import read_prompts
from bksdm.data.pictures import PictureSamples
from bksdm.data.stream import Samples, Stream
from bksdm.distill.captions import Captions
from bksdm.distill.data import Latents, Pictures, open_data
from bksdm.distill.grids import SampleGrids
from bksdm.distill.loop import Schedule, replicate, train
from bksdm.distill.objective import Distillation
from bksdm.distill.pair import Formats, Pair, changes_captions
from bksdm.distill.plan import Plan, plan
from bksdm.distill.record import Record
from bksdm.distill.report import write_run_report
from bksdm.distill.state import Checkpoints, TrainState, averaged
from bksdm.errors import InputError
from bksdm.families import derive
from bksdm.models import check_resolution, check_text_to_image, fingerprint, load_pipeline, load_unet_config, tokenizing
from bksdm.options import DistillOptions
from bksdm.processes import processes
from bksdm.progress import bar, say
from bksdm.prune import read_recipe, save_student, with_unet
from bksdm.randomness import Draws
from bksdm.recipe import Config, Pruning
from bksdm.runs import check_free, digest, open_run

STEPS_FILE = "retraining.json"
_GRID_PROMPTS = 4
_MOST_WORKERS = 8
_PAGE_EVERY = 600  # seconds
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
    "guided_output",
    "caption_dropout",
    "random_conditioning",
    "caption_pool",
)
_MOST_CAPTIONS = 10_000  # of the data's own that make a pool
# Samples follow from their position in the run, so how a step's samples are split does not matter.
_MAY_CHANGE = (
    "batch_size",
    "accumulation",
    "device",
    "workers",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "plan",
    "peak_tflops",
    "json",
)


def distill(options: DistillOptions) -> Path:
    """Retrain a student; the same options again go on where the run stopped.

    Returns:
        The folder of the retrained student, `OUT/student`.

    Raises:
        InputError: An option, the models or the data are unfit; see the message.
        Interrupted: The run was asked to stop and can go on.
    """
    _check(options)
    run = Path(options.out)
    data = open_data(options.data, options.resolution, options.flip, options.cache_gb)
    settings = _settings(options, data)
    falls = options.cosine or options.feature_decay  # by the number of steps, which then may not change
    may_change = _MAY_CHANGE if falls else (*_MAY_CHANGE, "steps")
    group = processes()
    check_free(run, "distill", settings, may_change)
    checkpoints = Checkpoints(run / "checkpoints", options.keep_checkpoints)
    _check_steps(options, checkpoints)

    pair = _load_pair(options)
    data.check(pair.teacher)
    grid_prompts = _grid_prompts(options, data)
    group.wait()  # until all have looked at the folder as it was
    if group.main:
        open_run(run, "distill", settings, may_change, pair.formats.to_dict())

    state = pair.fresh_state(options)
    if checkpoints.restore(state):
        _note_another_batch(options, state)
    if state.step < options.steps:
        _train(options, pair, state, checkpoints, data, grid_prompts)
    if group.main and _student_steps(run / "student") != state.step:
        _save_student(run / "student", pair, state, options)
    group.wait()
    return run / "student"


def foresee(options: DistillOptions) -> Plan:
    """What the run that these options ask for will take; nothing is written, and no weights are read.

    Raises:
        InputError: An option, the models or the data are unfit; see the message.
    """
    _check(options)
    data = open_data(options.data, options.resolution, options.flip, options.cache_gb)
    pruning = _pruning(options, load_unet_config(options.teacher), load_unet_config(options.student))
    return plan(options, pruning, data)


def _load_pair(options: DistillOptions) -> Pair:
    teacher, student = load_pipeline(options.teacher), load_pipeline(options.student).unet
    check_text_to_image(teacher, options.teacher)
    pruning = _pruning(options, teacher.unet.config, student.config)
    pair = Pair(teacher, student, pruning, Formats.choose(options))
    pair.set_up(gradient_checkpointing=options.gradient_checkpointing, shard_teacher=options.shard_teacher)
    return pair


def _settings(options: DistillOptions, data: Pictures | Latents) -> dict[str, Any]:
    """What the run is known by: its options, and what is in the models and the data that they name."""
    return dataclasses.asdict(options) | {
        "teacher_content": fingerprint(options.teacher),
        "student_content": fingerprint(options.student),
        "data_content": data.digest,
        "pool_content": None if options.caption_pool is None else digest(read_prompts(options.caption_pool)),
    }


def _workers(options: DistillOptions, samples: Samples) -> int:
    """How many processes read ahead: decoding pictures takes longer than a step, reading latents does not."""
    if options.workers is not None:
        return options.workers
    spare = (os.cpu_count() or 1) // processes().count - 1
    return min(_MOST_WORKERS, max(0, spare)) if isinstance(samples, PictureSamples) else 0


def _note_another_batch(options: DistillOptions, state: TrainState) -> None:
    before, now = state.samples / state.step, options.batch_size * options.accumulation * processes().count
    if before != now:
        say(f"a step has {now} samples from here on, and had {before:g}: the learning rate may want to follow")


def _train(
    options: DistillOptions,
    pair: Pair,
    state: TrainState,
    checkpoints: Checkpoints,
    data: Pictures | Latents,
    grid_prompts: list[str],
) -> None:
    """Bring `state` to the last step, with a bar, records and sample grids."""
    run, main = Path(options.out), processes().main
    replica = replicate(pair.student)
    objective = pair.objective(options, _captions(options, pair, data), replica, _remaining(options, state))
    samples = data.samples(pair.teacher)
    if options.compile_teacher:
        _compile_teacher(objective, samples, options, pair)
    grids = SampleGrids(pair, state, grid_prompts, options.sample_guidance, run / "samples")
    page = _Page(options, pair, state, len(data))
    record = Record(run / "metrics.jsonl", run / "tensorboard", state.step) if main else None
    with bar(options.steps, "retraining", state.step) as progress, closing(record) if record else nullcontext():

        def report(step: int, values: dict[str, float]) -> None:
            if record:
                record(step, values)
                page.now_and_then()
            progress.reach(step, "  ".join(f"{name} {values[name]:.3g}" for name in _SHOWN))

        try:
            train(
                state,
                objective,
                Stream(samples, options.batch_size, options.seed, _workers(options, samples)),
                _schedule(options),
                checkpoints,
                replica=replica,
                seed=options.seed,
                device=pair.formats.device,
                precision=pair.formats.precision,
                report=report,
                sample=grids if main or options.shard_teacher else lambda step: None,
            )
        finally:  # also of a run that was stopped or went wrong
            if main:
                page.write()


def _captions(options: DistillOptions, pair: Pair, data: Pictures | Latents) -> Captions | None:
    """What becomes of the captions; None where they stay as they are."""
    if not changes_captions(options):
        return None
    pool: list[str] = []
    if options.caption_pool is not None:
        pool = read_prompts(options.caption_pool)
    elif options.random_conditioning is not None:
        pool = data.captions(min(len(data), _MOST_CAPTIONS))
    tokenize = tokenizing(pair.teacher.tokenizer)
    return pair.captions(options, torch.stack([tokenize(text) for text in ("", *dict.fromkeys(pool))]))


def _remaining(options: DistillOptions, state: TrainState) -> Callable[[], float]:
    """The share of the weight of the feature loss that the step under way has."""
    return lambda: 1 - state.step / options.steps if options.feature_decay else 1.0


class _Page:
    """Writes the report of a run, at most every few minutes while it goes on."""

    def __init__(self, options: DistillOptions, pair: Pair, state: TrainState, pictures: int) -> None:
        self._options = options
        self._description = pair.description
        self._state = state
        self._pictures = pictures
        self._written = time.monotonic()

    def now_and_then(self) -> None:
        if time.monotonic() - self._written > _PAGE_EVERY:
            self.write()

    def write(self) -> None:
        options = self._options
        write_run_report(
            Path(options.out),
            self._description,
            teacher=options.teacher,
            data=options.data,
            pictures=self._pictures,
            samples=self._state.samples,
            steps=options.steps,
        )
        self._written = time.monotonic()


def _compile_teacher(objective: Distillation, samples: Samples, options: DistillOptions, pair: Pair) -> None:
    """Compiled networks are checked on the first batch: compilers have been wrong without a word (docs/log.md)."""
    say("compiling the teacher, which takes minutes")
    batch = next(Stream(samples, options.batch_size, options.seed).batches())
    on_device = {name: value.to(pair.formats.device) for name, value in batch.items()}
    difference = objective.compile_teacher(on_device, Draws(options.seed, "compile"))
    most = _ROUNDING[pair.teacher.unet.dtype]
    if not difference <= most:
        objective.uncompile_teacher()
        say(f"the compiled teacher differs by {difference:.1g}, more than {most:g}, from itself; it stays uncompiled")


def _check(options: DistillOptions) -> None:
    for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; give at least 1")
    for name in ("lr", "task_weight", "output_weight", "feature_weight", "weight_decay", "max_grad_norm", "cache_gb"):
        if not getattr(options, name) >= 0:
            raise InputError(f"{name} is {getattr(options, name)}; give 0 or more")
    for name in ("warmup", "workers", "sample_every"):
        if (getattr(options, name) or 0) < 0:
            raise InputError(f"{name} is {getattr(options, name)}; give 0 or more")
    if options.peak_tflops is not None and not options.peak_tflops > 0:
        raise InputError(f"peak_tflops is {options.peak_tflops}; give more than 0")
    if not 0 <= options.ema_decay < 1:
        raise InputError(f"ema_decay is {options.ema_decay}; give a number from 0 to below 1")
    check_resolution(options.resolution)
    _check_choices(options)


def _check_choices(options: DistillOptions) -> None:
    if options.mask_features is not None and not options.mask_features >= 1:
        raise InputError(f"mask_features is {options.mask_features}; give 1 or more standard deviations")
    if options.guided_output is not None and not options.guided_output > 1:
        raise InputError(f"guided_output is {options.guided_output}; give more than 1, or leave it out")
    if not 0 <= options.caption_dropout < 1:
        raise InputError(f"caption_dropout is {options.caption_dropout}; give a number from 0 to below 1")
    if options.random_conditioning is not None and not options.random_conditioning >= 0:
        raise InputError(f"random_conditioning is {options.random_conditioning}; give 0 or more")
    if options.caption_pool is not None:
        if options.random_conditioning is None:
            raise InputError(
                f"caption_pool is {options.caption_pool}, and nothing draws from it; give --random_conditioning too"
            )
        read_prompts(options.caption_pool)


def _check_steps(options: DistillOptions, checkpoints: Checkpoints) -> None:
    done = checkpoints.steps_done()
    if done > options.steps:
        raise InputError(
            f"steps is {options.steps}, and the run in {options.out} has done {done}; "
            f"give as many or more, or choose another --out"
        )


def _pruning(options: DistillOptions, teacher: Config, student: Config) -> Pruning:
    """What the student's recipe says, held against what the student is."""
    pruning = derive(read_recipe(options.student), teacher)
    for key, expected in pruning.student_config.items():
        actual = student.get(key, expected)
        if not key.startswith("_") and _as_list(actual) != _as_list(expected):
            raise InputError(
                f"student {options.student} was not made from teacher {options.teacher}: "
                f"its {key} is {actual}, and its recipe gives {expected}"
            )
    pruning.chosen_taps(options.taps)  # says where there are none
    return pruning


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _schedule(options: DistillOptions) -> Schedule:
    names = [field.name for field in dataclasses.fields(Schedule)]
    return Schedule(**{name: getattr(options, name) for name in names})


def _grid_prompts(options: DistillOptions, data: Pictures | Latents) -> list[str]:
    if options.sample_prompts is None:
        return list(dict.fromkeys(data.captions(_GRID_PROMPTS)))
    return read_prompts(Path(options.sample_prompts))[:_GRID_PROMPTS]


def _save_student(folder: Path, pair: Pair, state: TrainState, options: DistillOptions) -> None:
    """The averaged weights in the teacher's own pipeline, in float32, with recipe and card."""
    teacher, recipe = pair.teacher, pair.pruning.recipe
    unet = pair.student.eval()
    unet.set_default_attn_processor()
    usual = {field.name: field.default for field in dataclasses.fields(options)}
    shown = (*_ON_CARD, *(name for name in _CHOICES if getattr(options, name) != usual[name]))
    card = model_card(pair.description, options.teacher, {name: getattr(options, name) for name in shown})
    with averaged(state):
        files = {STEPS_FILE: json.dumps({"steps": state.step}) + "\n"}
        save_student(with_unet(teacher, unet), recipe, card, folder, files)


def _student_steps(folder: Path) -> int | None:
    """After how many steps the student in `folder` was written; None where there is none."""
    file = folder / STEPS_FILE
    return int(json.loads(file.read_text())["steps"]) if file.is_file() else None
