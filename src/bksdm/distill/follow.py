"""The training loop as verbs run it: options that are checked, a bar, records on the disk, and what a run ends in.

`distill`, `lcm`, `decoder` and `personalize` differ in what they learn, and share this.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch import nn

from bksdm.common.errors import InputError
from bksdm.common.processes import processes
from bksdm.common.progress import bar
from bksdm.data.stream import Samples, Stream
from bksdm.distill.loop import Objective, Schedule, train
from bksdm.distill.record import Record
from bksdm.distill.state import Checkpoints, TrainState
from bksdm.models.pipelines import check_resolution
from bksdm.options.training import TrainingOptions

_AT_LEAST_ONE = ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints")
_NOT_NEGATIVE = ("lr", "warmup", "weight_decay", "max_grad_norm", "cache_gb", "workers", "sample_every")


def check_training(options: TrainingOptions) -> None:
    """Refuse options that no run could have.

    Raises:
        InputError: Naming the option and its value.
    """
    for name in _AT_LEAST_ONE:
        if getattr(options, name, 1) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; give at least 1")
    for name in _NOT_NEGATIVE:
        check_not_negative(options, name)
    if not 0 <= getattr(options, "ema_decay", 0.0) < 1:
        raise InputError(f"ema_decay is {getattr(options, 'ema_decay', None)}; give a number from 0 to below 1")
    check_resolution(options.resolution)


def check_not_negative(options: TrainingOptions, name: str) -> None:
    """Refuse an option below 0, or one that is not a number; an option that a verb has not, or leaves open, is none.

    Raises:
        InputError: Naming it.
    """
    value = getattr(options, name, None)
    if value is not None and not value >= 0:
        raise InputError(f"{name} is {value}; give 0 or more")


def check_steps(options: TrainingOptions, checkpoints: Checkpoints) -> None:
    """Refuse fewer steps than a run has done.

    Raises:
        InputError: Naming both.
    """
    done = checkpoints.steps_done()
    if done > options.steps:
        raise InputError(
            f"steps is {options.steps}, and the run in {options.out} has done {done}; "
            f"give as many or more, or choose another --out"
        )


def follow(
    options: TrainingOptions,
    state: TrainState,
    objective: Objective,
    samples: Samples,
    checkpoints: Checkpoints,
    *,
    title: str,
    told: Callable[[dict[str, float]], str],
    device: torch.device,
    precision: torch.dtype,
    workers: int = 0,
    replica: nn.Module | None = None,
    sample: Callable[[int], None] = lambda step: None,
    recorded: Callable[[], None] = lambda: None,
) -> None:
    """Bring `state` to the last step, with a bar, and records in the folder of the run.

    Arguments:
        options: Of the verb; its pace, and where the run lies.
        state: Advanced in place.
        objective: What is learnt.
        samples: From what.
        checkpoints: Where the state is kept.
        title: Of the bar.
        told: What is said beside the bar of a record of the losses; it may change the record.
        device, precision, replica, sample: As `train` takes them.
        workers: Processes that read ahead.
        recorded: Called after every record.
    """
    run, main = Path(options.out), processes().main
    record = Record(run / "metrics.jsonl", run / "tensorboard", state.step) if main else None
    with bar(options.steps, title, state.step) as progress, closing(record) if record else nullcontext():

        def report(step: int, values: dict[str, float]) -> None:
            text = told(values)
            if record:
                record(step, values)
                recorded()
            progress.reach(step, text)

        train(
            state,
            objective,
            Stream(samples, options.batch_size, options.seed, workers),
            _schedule(options),
            checkpoints,
            replica=replica,
            seed=options.seed,
            device=device,
            precision=precision,
            report=report,
            sample=sample,
        )


def losses_of(values: dict[str, float], names: Sequence[str]) -> str:
    """Losses beside a bar."""
    return "  ".join(f"{name} {values[name]:.3g}" for name in names)


def ended(steps: int) -> str:
    """What a finished artefact says of the run that made it, as JSON; see `end_of`."""
    return json.dumps({"steps": steps}) + "\n"


def end_of(file: Path) -> int | None:
    """After how many steps the artefact beside this file was written; None where there is none."""
    return int(json.loads(file.read_text())["steps"]) if file.is_file() else None


def _schedule(options: TrainingOptions) -> Schedule:
    names = [field.name for field in dataclasses.fields(Schedule) if hasattr(options, field.name)]
    return Schedule(**{name: getattr(options, name) for name in names})
