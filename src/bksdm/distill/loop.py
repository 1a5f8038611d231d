"""The training loop: one for retraining a student, and for everything else that is trained here.

It knows a model, an objective that turns a micro-batch into named losses, and a stream of
samples; not what is learnt. To resume a run, run it again. Several processes share the stream:
what a step learns from depends on its position alone, not on how it is split.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bksdm.common.devices import peak_memory
from bksdm.common.processes import Processes, processes
from bksdm.common.randomness import Draws, derived_seed
from bksdm.data.stream import Batch, Stream
from bksdm.distill.state import Checkpoints, TrainState

Losses = Mapping[str, Tensor]


class Objective(Protocol):
    """What is learnt: a micro-batch and its random numbers give named scalar losses, `loss` the one to minimise."""

    def __call__(self, batch: Batch, draws: Draws) -> Losses: ...


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
    replica: nn.Module | None = None,
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
        replica: What the objective calls, where several processes train: see `replicate`.
        seed: Root of all random numbers.
        device: Where the batches go.
        precision: Autocast type of the forward pass; `torch.float32` for none.
        report: Takes the step and, since the last record, the mean losses, the highest loss of a micro-batch
            (`loss_max`), learning rate, gradient norm, images/s and peak memory in GiB.
        sample: Called every `schedule.sample_every` steps with the step.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        FloatingPointError: The loss is not finite.
    """
    device, group = torch.device(device), processes()
    own, together = group.rank * stream.batch_size, group.count * stream.batch_size
    batches = stream.batches(state.samples + own, together)
    window, watch = _Window(device, group), _Watch(device, group)
    if state.step == 0 and schedule.sample_every:
        sample(0)

    with _stop_requests() as stop:
        while state.step < schedule.steps:
            # Gradients
            for micro in range(schedule.accumulation):
                first = state.samples + micro * together + own
                batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
                torch.manual_seed(derived_seed(seed, "global", first))  # after a loader's own draws
                with _exchange(replica, micro == schedule.accumulation - 1):
                    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                        losses = objective(batch, Draws(seed, "noise", first))
                    torch.autograd.backward(state.scaler.scale(losses["loss"] / schedule.accumulation))
                window.add(losses, together)
                watch.loss(losses["loss"], first)

            # Optimizer
            lr = schedule.lr_at(state.step)
            grad_norm = optimize(state, lr, schedule.max_grad_norm)
            state.step += 1
            state.samples += schedule.accumulation * together
            if not state.scaler.is_enabled():  # a loss scaler skips steps with infinite gradients by itself
                watch.gradient(grad_norm, state.samples - 1)
            if state.ema:
                state.ema.update(state.parameters, state.step)

            # Report
            done, asked = state.step == schedule.steps, group.highest(stop.asked)
            logs = done or state.step % schedule.log_every == 0
            keeps = done or asked or state.step % schedule.checkpoint_every == 0
            if logs or keeps:
                watch.check(state, stream, schedule, checkpoints)
            if logs:
                report(state.step, window.close() | {"lr": lr, "grad_norm": float(grad_norm)})
            with window.paused():
                if schedule.sample_every and state.step % schedule.sample_every == 0:
                    sample(state.step)

                # Checkpoint
                if keeps and group.main:
                    checkpoints.save(state)
            if asked and not done:
                raise Interrupted(state.step, asked)


def replicate(model: nn.Module) -> nn.Module:
    """A wrapper around `model` that averages its gradients over the processes; the model itself where there is one."""
    if processes().count == 1:
        return model
    return _Replica(model, broadcast_buffers=False, gradient_as_bucket_view=True)


class _Replica(DistributedDataParallel):
    """One whose config can be asked for, as of any network of diffusers."""

    @property
    def config(self) -> Any:
        return self.module.config


def _exchange(replica: nn.Module | None, now: bool) -> AbstractContextManager[None]:
    """Gradients meet those of the other processes in the last micro-batch of a step only."""
    if now or not isinstance(replica, DistributedDataParallel):
        return nullcontext()
    return replica.no_sync()


def optimize(state: TrainState, lr: float, max_grad_norm: float) -> Tensor:
    """One optimizer step on the gradients that are there; returns their 2-norm from before it was limited."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.parameters, max_grad_norm or math.inf)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return norm


_NEVER = 2**62


class _Watch:
    """Looks out for numbers that are not finite.

    What it sees stays on the device until it is asked, so that no step waits for it; a broken state is
    found out before it can be kept.
    """

    def __init__(self, device: torch.device, group: Processes) -> None:
        self._group = group
        self._loss = torch.full((), _NEVER, device=device)  # the first draw of the first bad micro-batch
        self._gradient = self._loss.clone()  # the last draw of the first bad step

    def loss(self, value: Tensor, first: int) -> None:
        self._loss = torch.where(value.detach().isfinite(), self._loss, self._loss.clamp(max=first))

    def gradient(self, norm: Tensor, last: int) -> None:
        self._gradient = torch.where(norm.isfinite(), self._gradient, self._gradient.clamp(max=last))

    def check(self, state: TrainState, stream: Stream, schedule: Schedule, checkpoints: Checkpoints) -> None:
        """Raise if anything was bad, naming the step and the samples."""
        loss, gradient = (-self._group.highest(-int(draw)) for draw in (self._loss, self._gradient))
        draw = min(loss, gradient)
        if draw == _NEVER:
            return
        a_step = schedule.accumulation * stream.batch_size * self._group.count
        step = state.step - (state.samples - 1 - draw) // a_step
        what = f"loss of {stream.described(loss)}" if loss <= gradient else "gradient"
        raise FloatingPointError(
            f"the {what} is not finite at step {step}; the last good state is in {checkpoints.folder}; "
            f"try a lower learning rate or fp32, and look at these pictures"
        )


class _Window:
    """Means over the micro-batches of all processes since the last record."""

    def __init__(self, device: torch.device, group: Processes) -> None:
        self._device = device
        self._group = group
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._highest = torch.full((), -math.inf, device=self._device)
        self._micro_batches = 0
        self._samples = 0
        self._began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as training."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def add(self, losses: Losses, samples: int) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach().float()
        self._highest = torch.maximum(self._highest, losses["loss"].detach().float())
        self._micro_batches += 1
        self._samples += samples

    def close(self) -> dict[str, float]:
        means = self._group.mean(torch.stack(list(self._sums.values())) / self._micro_batches)
        record = dict(zip(self._sums, means.tolist(), strict=True))
        record["loss_max"] = float(self._group.largest(self._highest))
        record["images_per_second"] = self._samples / (time.perf_counter() - self._began)
        record["peak_memory_gib"] = peak_memory(self._device) / 2**30
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
