"""The training loop: one for retraining a student, and for everything else that is trained here.

It knows a model, an objective that turns a micro-batch into named losses, and a stream of
micro-batches; not what is learnt. To resume a run, run it again.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from bksdm.data.stream import Batch, Stream
from bksdm.distill.state import Checkpoints, TrainState
from bksdm.randomness import derived_seed, generator

Losses = Mapping[str, Tensor]


class Objective(Protocol):
    """What is learnt: a micro-batch and its random numbers give named scalar losses, `loss` the one to minimise."""

    def __call__(self, batch: Batch, rng: torch.Generator) -> Losses: ...


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop and has written a checkpoint."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.signal_number = signal_number


@dataclass(frozen=True)
class Schedule:
    """How a run is paced, in optimizer steps.

    Attributes:
        steps: Steps in all.
        accumulation: Micro-batches a step.
        lr: Highest learning rate.
        warmup: Steps of linear rise to `lr`.
        cosine: Whether the rate then falls to zero as a half cosine, or stays.
        max_grad_norm: Gradients are scaled down to this 2-norm; 0 leaves them.
        log_every: Steps between records of the losses.
        sample_every: Steps between sample grids; 0 for none.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int
    accumulation: int = 1
    lr: float = 5e-5
    warmup: int = 0
    cosine: bool = False
    max_grad_norm: float = 1.0
    log_every: int = 10
    sample_every: int = 0
    checkpoint_every: int = 500

    def lr_at(self, step: int) -> float:
        """Learning rate of step number `step`, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if not self.cosine or step < self.warmup:
            return self.lr * rise
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


def train(
    state: TrainState,
    objective: Objective,
    stream: Stream,
    schedule: Schedule,
    checkpoints: Checkpoints,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
    report: Callable[[int, dict[str, float]], None] = lambda step, record: None,
    sample: Callable[[int], None] = lambda step: None,
) -> None:
    """Bring `state` to `schedule.steps`.

    Arguments:
        state: The model and its optimizer; advanced in place.
        objective: Gives the named losses of a micro-batch.
        stream: Micro-batches from any position on.
        schedule: Steps, learning rate and intervals.
        checkpoints: Where the state is kept.
        seed: Root of all random numbers.
        device: Where the batches go.
        precision: Autocast type of the forward pass; `torch.float32` for none.
        report: Takes the step and the mean losses, learning rate, gradient norm and images/s since
            the last record.
        sample: Called every `schedule.sample_every` steps with the step.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        FloatingPointError: The loss is not finite.
    """
    device = torch.device(device)
    batches = stream.batches(start=state.step * schedule.accumulation)
    window = _Window()
    if state.step == 0 and schedule.sample_every:
        sample(0)

    with _stop_requests() as stop:
        while state.step < schedule.steps:
            # Gradients
            for micro in range(schedule.accumulation):
                batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
                torch.manual_seed(derived_seed(seed, "global", state.step, micro))  # after a loader's own draws
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    losses = objective(batch, generator(seed, "noise", state.step, micro))
                torch.autograd.backward(state.scaler.scale(losses["loss"] / schedule.accumulation))
                window.add(losses, len(next(iter(batch.values()))))

            # Optimizer
            lr = schedule.lr_at(state.step)
            grad_norm = _optimize(state, lr, schedule.max_grad_norm)
            state.step += 1
            if state.ema:
                state.ema.update(state.model, state.step)

            # Report
            done = state.step == schedule.steps
            logs = done or state.step % schedule.log_every == 0
            keeps = done or stop.asked or state.step % schedule.checkpoint_every == 0
            if logs or keeps:
                _check_finite(state, window.mean_loss(), float(grad_norm), checkpoints)
            if logs:
                report(state.step, window.close() | {"lr": lr, "grad_norm": float(grad_norm)})
            if schedule.sample_every and state.step % schedule.sample_every == 0:
                sample(state.step)

            # Checkpoint
            if keeps:
                checkpoints.save(state)
            if stop.asked and not done:
                raise Interrupted(state.step, stop.asked)


def _optimize(state: TrainState, lr: float, max_grad_norm: float) -> Tensor:
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), max_grad_norm or math.inf)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return norm


def _check_finite(state: TrainState, loss: float, grad_norm: float, checkpoints: Checkpoints) -> None:
    """Stop before a broken state is kept; a loss scaler skips steps with infinite gradients by itself."""
    good_step = math.isfinite(grad_norm) or state.scaler.is_enabled()
    if not (math.isfinite(loss) and good_step):
        raise FloatingPointError(
            f"loss is {loss} and the gradient's norm {grad_norm} at step {state.step}; the last good state is in "
            f"{checkpoints.folder}; try a lower learning rate or fp32"
        )


class _Window:
    """Means over the micro-batches since the last record."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._samples = 0
        self._began = time.perf_counter()

    def add(self, losses: Losses, samples: int) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach().float()
        self._micro_batches += 1
        self._samples += samples

    def mean_loss(self) -> float:
        return float(self._sums["loss"]) / self._micro_batches

    def close(self) -> dict[str, float]:
        record = {name: float(value) / self._micro_batches for name, value in self._sums.items()}
        record["images_per_second"] = self._samples / (time.perf_counter() - self._began)
        self._clear()
        return record


@dataclass
class _Stop:
    asked: int = 0


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """While inside, SIGINT and SIGTERM are noted instead of killing the step under way; a second SIGINT kills."""
    stop = _Stop()

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = number

    if threading.current_thread() is not threading.main_thread():  # only the main thread may take signals
        yield stop
        return
    earlier = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
