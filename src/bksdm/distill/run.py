"""`bksdm distill`: from a teacher, a student and captioned pictures to a retrained student."""

import dataclasses
import json
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

from bksdm.card import model_card
from bksdm.data.folder import read_prompts
from bksdm.data.stream import Samples, Stream
from bksdm.describe import Description, describe_config
from bksdm.devices import (
    PRECISIONS,
    channels_last_is_faster,
    choose_device,
    choose_precision,
    plain_attention_is_faster,
)
from bksdm.distill.conditions import Conditions
from bksdm.distill.data import Latents, Pictures, open_data
from bksdm.distill.loop import Schedule, replicate, train
from bksdm.distill.noise import NoiseSchedule
from bksdm.distill.objective import Distillation
from bksdm.distill.record import Record
from bksdm.distill.report import write_run_report
from bksdm.distill.state import Checkpoints, Ema, TrainState, averaged
from bksdm.errors import InputError
from bksdm.families import derive
from bksdm.losses import LossWeights
from bksdm.models import check_resolution, check_text_to_image, fingerprint, load_pipeline
from bksdm.options import DistillOptions
from bksdm.processes import processes, shard
from bksdm.progress import bar, say
from bksdm.prune import read_recipe, save_student, with_unet
from bksdm.randomness import Draws
from bksdm.recipe import Config, Pruning
from bksdm.runs import check_free, open_run
from bksdm.sampling import Request, sample, side_by_side

STEPS_FILE = "retraining.json"
_GRID_PROMPTS = 4
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
    may_change = _MAY_CHANGE if options.cosine else (*_MAY_CHANGE, "steps")  # steps decide how a cosine falls
    group = processes()
    check_free(run, "distill", settings, may_change)
    checkpoints = Checkpoints(run / "checkpoints", options.keep_checkpoints)
    _check_steps(options, checkpoints)

    pair = _Pair.load(options)
    data.check(pair.teacher)
    grid_prompts = _grid_prompts(options, data)
    group.wait()  # until all have looked at the folder as it was
    if group.main:
        open_run(run, "distill", settings, may_change, pair.chosen())

    state = _new_state(options, pair)
    if checkpoints.restore(state):
        _note_another_batch(options, state)
    if state.step < options.steps:
        _train(options, pair, state, checkpoints, data, grid_prompts)
    if group.main and _student_steps(run / "student") != state.step:
        _save_student(run / "student", pair, state, options)
    group.wait()
    return run / "student"


@dataclass(frozen=True)
class _Pair:
    """A teacher and its student on their device, and how they compute."""

    teacher: StableDiffusionPipeline
    student: UNet2DConditionModel
    pruning: Pruning
    device: torch.device
    precision: torch.dtype

    @classmethod
    def load(cls, options: DistillOptions) -> "_Pair":
        device = choose_device(options.device)
        precision = choose_precision(options.precision, device, training=True)
        teacher, student = load_pipeline(options.teacher), load_pipeline(options.student).unet
        check_text_to_image(teacher, options.teacher)
        pruning = _pruning(options, teacher.unet.config, student.config)
        own = precision if options.teacher_precision == "auto" else PRECISIONS[options.teacher_precision]
        if options.shard_teacher:
            shard(teacher.unet.to(own), device)
        teacher.to(device)
        teacher.unet.to(own)
        student.to(device).train()
        if channels_last_is_faster(device, precision):
            student.to(memory_format=torch.channels_last)
        if channels_last_is_faster(device, own):
            teacher.unet.to(memory_format=torch.channels_last)
        if plain_attention_is_faster(device, precision):
            student.set_attn_processor(AttnProcessor())
        if options.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        return cls(teacher, student, pruning, device, precision)

    def chosen(self) -> dict[str, str]:
        """What was chosen where the options say auto."""
        chosen = {"device": self.device, "precision": self.precision, "teacher_precision": self.teacher.unet.dtype}
        return {name: str(value) for name, value in chosen.items()}


def _settings(options: DistillOptions, data: Pictures | Latents) -> dict[str, Any]:
    """What the run is known by: its options, and what is in the models and the data that they name."""
    return dataclasses.asdict(options) | {
        "teacher_content": fingerprint(options.teacher),
        "student_content": fingerprint(options.student),
        "data_content": data.digest,
    }


def _new_state(options: DistillOptions, pair: _Pair) -> TrainState:
    return TrainState(
        pair.student,
        torch.optim.AdamW(pair.student.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True),
        ema=Ema(pair.student, options.ema_decay) if options.ema_decay else None,
        scaler=torch.amp.GradScaler(pair.device.type, enabled=pair.precision == torch.float16),
    )


def _note_another_batch(options: DistillOptions, state: TrainState) -> None:
    before, now = state.samples / state.step, options.batch_size * options.accumulation * processes().count
    if before != now:
        say(f"a step has {now} samples from here on, and had {before:g}: the learning rate may want to follow")


def _train(
    options: DistillOptions,
    pair: _Pair,
    state: TrainState,
    checkpoints: Checkpoints,
    data: Pictures | Latents,
    grid_prompts: list[str],
) -> None:
    """Bring `state` to the last step, with a bar, records and sample grids."""
    run, teacher = Path(options.out), pair.teacher
    conditions = Conditions(teacher.vae, teacher.text_encoder)
    noise_schedule = NoiseSchedule.from_scheduler(teacher.scheduler)
    weights = LossWeights(options.task_weight, options.output_weight, options.feature_weight)
    replica = replicate(pair.student)
    objective = Distillation(
        pair.student, teacher.unet, pair.pruning.taps, conditions, noise_schedule, weights, replica
    )
    samples = data.samples(teacher)
    if options.compile_teacher:
        _compile_teacher(objective, samples, options, pair)
    grids = _SampleGrids(teacher, state, grid_prompts, options.sample_guidance, run / "samples", pair.precision)
    main = processes().main
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
                Stream(samples, options.batch_size, options.seed, options.workers),
                _schedule(options),
                checkpoints,
                replica=replica,
                seed=options.seed,
                device=pair.device,
                precision=pair.precision,
                report=report,
                sample=grids if main or options.shard_teacher else lambda step: None,
            )
        finally:  # also of a run that was stopped or went wrong
            if main:
                page.write()


class _Page:
    """Writes the report of a run, at most every few minutes while it goes on."""

    def __init__(self, options: DistillOptions, pair: _Pair, state: TrainState, pictures: int) -> None:
        self._options = options
        self._description = _description(pair)
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


def _description(pair: _Pair) -> Description:
    tokens = pair.teacher.text_encoder.config.max_position_embeddings
    return describe_config(dict(pair.teacher.unet.config), pair.pruning.recipe, tokens)


def _compile_teacher(objective: Distillation, samples: Samples, options: DistillOptions, pair: _Pair) -> None:
    """Compiled networks are checked on the first batch: compilers have been wrong without a word (docs/log.md)."""
    say("compiling the teacher, which takes minutes")
    batch = next(Stream(samples, options.batch_size, options.seed).batches())
    on_device = {name: value.to(pair.device) for name, value in batch.items()}
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
        if getattr(options, name) < 0:
            raise InputError(f"{name} is {getattr(options, name)}; give 0 or more")
    if not 0 <= options.ema_decay < 1:
        raise InputError(f"ema_decay is {options.ema_decay}; give a number from 0 to below 1")
    check_resolution(options.resolution)


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


class _SampleGrids:
    """Writes `samples/step-N.png`: a row a prompt, the teacher's picture and the student's from the same seed."""

    def __init__(
        self,
        teacher: StableDiffusionPipeline,
        state: TrainState,
        prompts: list[str],
        guidance: float,
        folder: Path,
        precision: torch.dtype,
    ) -> None:
        self._teacher = teacher
        self._student = with_unet(teacher, state.model)
        self._state = state
        self._requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
        self._guidance = guidance
        self._folder = folder
        self._precision = precision
        self._wanted: list[Image.Image] = []

    def __call__(self, step: int) -> None:
        self._wanted = self._wanted or self._pictures(self._teacher)
        with averaged(self._state):
            got = self._pictures(self._student)
        if not processes().main:  # a teacher that is spread over the processes needs them all
            return
        self._folder.mkdir(exist_ok=True)
        side_by_side(list(zip(self._wanted, got, strict=True))).save(self._folder / f"step-{step:08d}.png")

    def _pictures(self, pipeline: StableDiffusionPipeline) -> list[Image.Image]:
        own = pipeline.unet.dtype
        precision = self._precision if own == torch.float32 else own
        with (
            torch.compiler.set_stance("force_eager"),  # other batch sizes would be compiled anew
            torch.autocast(pipeline.vae.device.type, precision, enabled=precision != torch.float32),
        ):
            return [picture for batch in sample(pipeline, self._requests, guidance=self._guidance) for picture in batch]


def _save_student(folder: Path, pair: _Pair, state: TrainState, options: DistillOptions) -> None:
    """The averaged weights in the teacher's own pipeline, in float32, with recipe and card."""
    teacher, recipe = pair.teacher, pair.pruning.recipe
    unet = pair.student.eval()
    unet.set_default_attn_processor()
    card = model_card(_description(pair), options.teacher, {name: getattr(options, name) for name in _ON_CARD})
    with averaged(state):
        files = {STEPS_FILE: json.dumps({"steps": state.step}) + "\n"}
        save_student(with_unet(teacher, unet), recipe, card, folder, files)


def _student_steps(folder: Path) -> int | None:
    """After how many steps the student in `folder` was written; None where there is none."""
    file = folder / STEPS_FILE
    return int(json.loads(file.read_text())["steps"]) if file.is_file() else None
