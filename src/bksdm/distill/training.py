"""A run of a verb that trains a student by its teacher: what the verbs share, and what each of them fills in.

Models, data, state, checkpoints, records, page and sample grids are the same for all; what is learnt, and what
becomes of the student at the end, is a `Lesson`.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from bksdm.common.devices import processors
from bksdm.common.errors import InputError
from bksdm.common.processes import processes
from bksdm.common.progress import say
from bksdm.common.prompts import cut_line
from bksdm.common.runs import check_free, open_run
from bksdm.data.cache import CachedSamples
from bksdm.data.cutmix import CutMix
from bksdm.data.pictures import PictureSamples
from bksdm.data.prompts import read_prompts
from bksdm.data.stream import Samples
from bksdm.distill.data import Latents, Pictures, open_data
from bksdm.distill.follow import check_steps, end_of, ended, follow, losses_of
from bksdm.distill.grids import SampleGrids
from bksdm.distill.loop import Objective, replicate
from bksdm.distill.pair import Formats, Pair
from bksdm.distill.report import write_run_report
from bksdm.distill.state import Checkpoints, TrainState, averaged
from bksdm.models.card import drawing_call, model_card
from bksdm.models.folders import fingerprint
from bksdm.models.pipelines import (
    Origin,
    check_text_to_image,
    cutting,
    denoiser,
    load_denoiser,
    load_pipeline,
    pixels_a_side,
    remark_on,
)
from bksdm.options.training import StudentOptions
from bksdm.pruning.inherit import save_student
from bksdm.pruning.told import checked_pruning
from bksdm.runtime.defaults import Defaults, as_files

STEPS_FILE = "retraining.json"
_GRID_PROMPTS = 4
_MOST_CAPTIONS = 10_000  # of which the length is looked at
_MOST_WORKERS = 8
_PAGE_EVERY = 600  # seconds
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


@dataclass(frozen=True)
class Parts:
    """What an objective is made of; `replica` is what it calls in the student's place."""

    pair: Pair
    state: TrainState
    data: Pictures | Latents
    samples: Samples
    replica: nn.Module

    @property
    def average(self) -> dict[str, Tensor] | None:
        """The averaged weights by their names in the student; None where there are none."""
        if self.state.ema is None:
            return None
        names = {id(parameter): name for name, parameter in self.pair.student.named_parameters()}
        learnt = self.state.model.named_parameters()
        return {names[id(parameter)]: self.state.ema.average[name] for name, parameter in learnt}


@dataclass(frozen=True)
class Lesson:
    """What a verb teaches.

    Attributes:
        verb: Its name.
        objective: What is learnt.
        pipeline: The student's pipeline as it is drawn from and saved.
        check: Refuses a pair that cannot be trained so, before anything is written.
        shown: Losses beside the bar.
        on_card: What the student's card says of its making.
        teacher_drawing, student_drawing: How the pictures of the sample grids are made.
        changed: Names of the parts of that pipeline, besides the student, that are not the teacher's.
        own: What the student draws best with, where that is known.
        contents: Digests of what the options name besides models and data.
        cutmix: Share of the pictures that show a part of another.
        embeds: Whether it embeds captions as it goes.
        fixed_steps: Whether the number of steps decides more than where the run ends.
    """

    verb: str
    objective: Callable[[Parts], Objective]
    pipeline: Callable[[Pair], DiffusionPipeline]
    check: Callable[[Pair], None]
    shown: tuple[str, ...]
    on_card: Mapping[str, Any]
    teacher_drawing: Defaults
    student_drawing: Defaults
    changed: tuple[str, ...] = ()
    own: Defaults | None = None
    contents: Mapping[str, Any] = field(default_factory=dict)
    cutmix: float = 0.0
    embeds: bool = False
    fixed_steps: bool = False


def asked_for_on_card(options: StudentOptions) -> tuple[str, ...]:
    """Options that the card of a student has besides, where they were asked for."""
    optimizer = () if options.optimizer == "adamw" else ("optimizer",)
    lora = () if options.lora_rank is None else ("lora_rank", "teacher_precision", "student_precision")
    return (*optimizer, *lora)


def teach(options: StudentOptions, lesson: Lesson) -> Path:
    """Train a student; the same options again go on where the run stopped.

    Returns:
        The folder of the trained student, `OUT/student`.

    Raises:
        InputError: An option, the models or the data are unfit; see the message.
        Interrupted: The run was asked to stop and can go on.
    """
    run = Path(options.out)
    data = open_data(options.data, options.resolution, options.flip, options.cache_gb)
    settings = _settings(options, data) | dict(lesson.contents)
    may_change = _MAY_CHANGE if lesson.fixed_steps else (*_MAY_CHANGE, "steps")
    group = processes()
    check_free(run, lesson.verb, settings, may_change)
    checkpoints = Checkpoints(run / "checkpoints", options.keep_checkpoints)
    check_steps(options, checkpoints)

    pair = _load_pair(options, lesson, texts=not data.embedded or lesson.embeds)
    data.check(pair.teacher)
    grid_prompts = _grid_prompts(options, data)
    group.wait()  # until all have looked at the folder as it was
    if group.main:
        open_run(run, lesson.verb, settings, may_change, pair.formats.to_dict())
        _say_what_is_cut(data, pair)

    state = pair.fresh_state(options)
    if checkpoints.restore(state):
        _note_another_batch(options, state)
    if state.step < options.steps:
        _train(options, lesson, pair, state, checkpoints, data, grid_prompts)
    if group.main and end_of(run / "student" / STEPS_FILE) != state.step:
        _save_student(run / "student", pair, state, options, lesson)
    group.wait()
    return run / "student"


def _load_pair(options: StudentOptions, lesson: Lesson, *, texts: bool) -> Pair:
    formats = Formats.choose(options)
    if options.offload_teacher and formats.device.type == "cpu":
        raise InputError("offload_teacher is for a teacher beside a GPU, and device is cpu; leave it out")
    teacher = load_pipeline(options.teacher, denoiser_dtype=formats.computing(formats.teacher_precision))
    student = load_denoiser(options.student, formats.computing(formats.student_precision))
    check_text_to_image(teacher, options.teacher)
    remark_on(teacher)
    pruning = checked_pruning(options.teacher, options.student, denoiser(teacher).config, student.config)
    pair = Pair(teacher, student, pruning, formats)
    lesson.check(pair)
    pair.set_up(
        gradient_checkpointing=options.gradient_checkpointing,
        shard_teacher=options.shard_teacher,
        offload_teacher=options.offload_teacher,
        texts=texts,
    )
    return pair


def _say_what_is_cut(data: Pictures | Latents, pair: Pair) -> None:
    what = "captions" if len(data) <= _MOST_CAPTIONS else "captions that were looked at"
    if line := cut_line(data.captions(_MOST_CAPTIONS), cutting(pair.teacher), what):
        say(line)


def _settings(options: StudentOptions, data: Pictures | Latents) -> dict[str, Any]:
    """What the run is known by: its options, and what is in the models and the data that they name."""
    return dataclasses.asdict(options) | {
        "teacher_content": fingerprint(options.teacher),
        "student_content": fingerprint(options.student),
        "data_content": data.digest,
    }


def _workers(options: StudentOptions, samples: Samples) -> int:
    """How many processes read ahead: decoding pictures takes longer than a step, reading latents does not."""
    if options.workers is not None:
        return options.workers
    spare = processors() // processes().count - 1
    return min(_MOST_WORKERS, max(0, spare)) if isinstance(samples, PictureSamples) else 0


def _note_another_batch(options: StudentOptions, state: TrainState) -> None:
    before, now = state.samples / state.step, options.batch_size * options.accumulation * processes().count
    if before != now:
        say(f"a step has {now} samples from here on, and had {before:g}: the learning rate may want to follow")


def _train(
    options: StudentOptions,
    lesson: Lesson,
    pair: Pair,
    state: TrainState,
    checkpoints: Checkpoints,
    data: Pictures | Latents,
    grid_prompts: list[str],
) -> None:
    """Bring `state` to the last step, with a bar, records and sample grids."""
    run, main = Path(options.out), processes().main
    replica = replicate(pair.student)
    samples = data.samples(pair.teacher)
    asked = CutMix(samples, lesson.cutmix) if lesson.cutmix else samples
    objective = lesson.objective(Parts(pair, state, data, asked, replica))
    grids = SampleGrids(
        pair,
        lesson.pipeline(pair),
        state,
        grid_prompts,
        run / "samples",
        teacher_drawing=lesson.teacher_drawing,
        student_drawing=lesson.student_drawing,
    )
    page = _Page(options, pair, state, len(data))
    if isinstance(samples, CachedSamples) and not lesson.embeds:  # captions are embedded by now
        pair.dismiss_texts()
    try:
        follow(
            options,
            state,
            objective,
            asked,
            checkpoints,
            title="retraining",
            told=lambda values: losses_of(values, lesson.shown),
            device=pair.formats.device,
            precision=pair.formats.precision,
            workers=_workers(options, samples),
            replica=replica,
            sample=grids if main or options.shard_teacher else lambda step: None,
            recorded=page.now_and_then,
        )
    finally:  # also of a run that was stopped or went wrong
        if main:
            page.write()


class _Page:
    """Writes the report of a run, at most every few minutes while it goes on."""

    def __init__(self, options: StudentOptions, pair: Pair, state: TrainState, pictures: int) -> None:
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


def _grid_prompts(options: StudentOptions, data: Pictures | Latents) -> list[str]:
    if options.sample_prompts is None:
        return list(dict.fromkeys(data.captions(_GRID_PROMPTS)))
    return read_prompts(options.sample_prompts, "sample_prompts")[:_GRID_PROMPTS]


def _save_student(folder: Path, pair: Pair, state: TrainState, options: StudentOptions, lesson: Lesson) -> None:
    """The averaged weights in the pipeline of the lesson, in float32, with recipe and card; the rest as it came."""
    pair.family.attend(pair.student.eval(), plainly=False)
    call = drawing_call(pair.family, denoiser(pair.teacher).config, pixels_a_side(pair.teacher), lesson.own)
    card = model_card(pair.description, options.teacher, lesson.on_card, call)
    with averaged(state):
        files = {STEPS_FILE: ended(state.step), **as_files(lesson.own)}
        save_student(
            lesson.pipeline(dataclasses.replace(pair, student=pair.finished())),
            pair.pruning.recipe,
            card,
            folder,
            files,
            Origin.of(pair.teacher, (pair.family.denoiser, *lesson.changed)),
        )
