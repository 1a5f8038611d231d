"""The training loop: resuming, accumulation, pace, stopping and failing."""

import concurrent.futures
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bksdm.common.randomness import Draws
from bksdm.data.stream import Stream
from bksdm.distill.loop import Interrupted, Schedule, train
from bksdm.distill.state import Checkpoints, Ema, TrainState

SAMPLES = 20


class Points:
    """Points of a line with a bend."""

    def __init__(self) -> None:
        self.x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return SAMPLES

    def sample(self, index: int, rng_seed: int) -> dict[str, Tensor]:
        jitter = torch.rand(3, generator=torch.Generator().manual_seed(rng_seed)) / 100
        x = self.x[index] + jitter
        return {"x": x, "y": x.sum(0, keepdim=True).relu()}

    def name(self, index: int) -> str:
        return f"point {index}"


@dataclass
class Regression:
    """Least squares; `noisy` draws from both kinds of random numbers; `before` is called with the count of calls."""

    model: nn.Module
    noisy: bool = True
    before: Callable[[int], None] = lambda _: None
    calls: int = 0
    scales: dict[int, float] = field(default_factory=dict)

    def __call__(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        self.calls += 1
        self.before(self.calls)
        x = batch["x"]
        if self.noisy:
            x = F.dropout(x + 0.1 * draws.normal(x.shape), 0.2)
        error = F.mse_loss(self.model(x).float(), batch["y"])
        return {"loss": error * self.scales.get(self.calls, 1.0), "error": error}


def new_state(optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, *, seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Linear(3, 1)
    return TrainState(model, optimizer(model.parameters(), lr=1.0), Ema(model, 0.9))


def run(
    folder: Path,
    schedule: Schedule,
    state: TrainState | None = None,
    *,
    batch_size: int = 4,
    objective: Callable[[nn.Module], Regression] = Regression,
    keep: int = 2,
    **options: object,
) -> TrainState:
    """One start of the command: takes the newest checkpoint, then trains."""
    state = state or new_state()
    checkpoints = Checkpoints(folder, keep)
    checkpoints.restore(state)
    train(state, objective(state.model), Stream(Points(), batch_size), schedule, checkpoints, **options)
    return state


def assert_equal(first: TrainState, second: TrainState) -> None:
    assert first.step == second.step
    ours, theirs = first.tensors(), second.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# Training


def test_the_loss_falls(tmp_path: Path) -> None:
    records: list[dict[str, float]] = []
    run(tmp_path, Schedule(200, lr=0.02, log_every=20), report=lambda _, record: records.append(record))
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]


def test_records_come_every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    records: dict[int, dict[str, float]] = {}
    run(tmp_path, Schedule(7, lr=0.01, log_every=3), report=records.__setitem__)
    assert list(records) == [3, 6, 7]
    losses, pace = {"loss", "loss_max", "error"}, {"lr", "grad_norm", "images_per_second", "peak_memory_gib"}
    assert all(record.keys() == losses | pace for record in records.values())


def test_a_record_is_the_mean_since_the_last(tmp_path: Path) -> None:
    each: dict[int, dict[str, float]] = {}
    run(tmp_path / "each", Schedule(6, lr=0.01, log_every=1), report=each.__setitem__)
    means: dict[int, dict[str, float]] = {}
    run(tmp_path / "means", Schedule(6, lr=0.01, log_every=3), report=means.__setitem__)
    for last in (3, 6):
        for name in ("loss", "error"):
            wanted = sum(each[step][name] for step in (last - 2, last - 1, last)) / 3
            assert means[last][name] == pytest.approx(wanted, rel=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path) -> None:
    first, again, other = (
        run(tmp_path / name, Schedule(5, lr=0.01), seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert_equal(first, again)
    assert not torch.equal(first.model.weight, other.model.weight)


def test_random_numbers_outside_do_not_matter(tmp_path: Path) -> None:
    first = run(tmp_path / "a", Schedule(5, lr=0.01))
    again = run(tmp_path / "b", Schedule(5, lr=0.01), report=lambda *_: torch.manual_seed(99), sample=lambda _: None)
    assert_equal(first, again)


def test_half_precision_trains_full_precision_weights(tmp_path: Path) -> None:
    state = run(tmp_path, Schedule(5, lr=0.01), precision=torch.bfloat16)
    assert state.model.weight.dtype == torch.float32
    assert not torch.equal(state.model.weight, run(tmp_path / "exact", Schedule(5, lr=0.01)).model.weight)


def test_samples_are_drawn_at_the_start_and_every_few_steps(tmp_path: Path) -> None:
    drawn: list[int] = []
    run(tmp_path / "a", Schedule(7, sample_every=3), sample=drawn.append)
    assert drawn == [0, 3, 6]
    drawn.clear()
    run(tmp_path / "b", Schedule(7), sample=drawn.append)
    assert drawn == []


def test_the_average_is_updated_at_every_step(tmp_path: Path) -> None:
    weights = []
    state = new_state()
    follower = Ema(state.model, 0.9)

    def follow(step: int, record: dict[str, float]) -> None:
        follower.update(state.parameters, step)
        weights.append(state.model.weight.detach().clone())

    run(tmp_path, Schedule(5, lr=0.01, log_every=1), state, report=follow)
    assert len({float(weight.sum()) for weight in weights}) == 5
    assert torch.equal(state.ema.average["weight"], follower.average["weight"])


# Resuming


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("crash_at", [1, 2, 5, 8])
def test_a_run_that_crashed_goes_on_to_the_same_bits(tmp_path: Path, crash_at: int, accumulation: int) -> None:
    schedule = Schedule(8, accumulation, lr=0.05, warmup=3, cosine=True, checkpoint_every=2)

    def crash(call: int) -> None:
        if call == crash_at * accumulation:
            raise MemoryError

    with pytest.raises(MemoryError):
        run(tmp_path / "crashed", schedule, objective=lambda model: Regression(model, before=crash))
    resumed = run(tmp_path / "crashed", schedule, new_state(seed=5) if crash_at > 2 else None)
    assert_equal(resumed, run(tmp_path / "whole", schedule))


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    run(tmp_path / "longer", Schedule(3, lr=0.05))
    assert_equal(run(tmp_path / "longer", Schedule(6, lr=0.05)), run(tmp_path / "whole", Schedule(6, lr=0.05)))


def test_a_finished_run_does_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, Schedule(3, lr=0.05))
    objectives: list[Regression] = []

    def objective(model: nn.Module) -> Regression:
        objectives.append(Regression(model))
        return objectives[0]

    assert_equal(run(tmp_path, Schedule(3, lr=0.05), objective=objective), done)
    assert objectives[0].calls == 0


def test_the_first_sample_is_not_drawn_again(tmp_path: Path) -> None:
    drawn: list[int] = []
    run(tmp_path, Schedule(2, sample_every=2), sample=drawn.append)
    run(tmp_path, Schedule(4, sample_every=2), sample=drawn.append)
    assert drawn == [0, 2, 4]


def test_checkpoints_come_every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    run(tmp_path, Schedule(7, checkpoint_every=3), keep=9)
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-00000003", "step-00000006", "step-00000007"]


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    state = new_state()
    stream, checkpoints = Stream(Points(), 4, workers=2), Checkpoints(tmp_path / "workers")
    train(state, Regression(state.model), stream, Schedule(4, lr=0.05), checkpoints)
    assert_equal(state, run(tmp_path / "alone", Schedule(4, lr=0.05)))


# Accumulation


def quiet(model: nn.Module) -> Regression:
    return Regression(model, noisy=False)


def test_two_micro_batches_of_four_are_one_of_eight(tmp_path: Path) -> None:
    pace = {"lr": 0.1, "max_grad_norm": 0.0, "log_every": 1}
    records: list[dict[str, float]] = []
    states = [
        run(
            tmp_path / f"{accumulation}",
            Schedule(3, accumulation, **pace),
            new_state(torch.optim.SGD),
            batch_size=batch_size,
            objective=quiet,
            report=lambda _, record: records.append(record),
        )
        for accumulation, batch_size in ((2, 4), (1, 8), (8, 1))
    ]
    for state in states[1:]:
        assert torch.allclose(state.model.weight, states[0].model.weight, atol=1e-6)
        assert torch.allclose(state.model.bias, states[0].model.bias, atol=1e-6)
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in records[:3]] == pytest.approx([r[name] for r in records[3:6]], rel=1e-5)


# Pace


def test_the_learning_rate_stays(tmp_path: Path) -> None:
    assert {Schedule(10, lr=0.3).lr_at(step) for step in range(10)} == {0.3}
    assert rates(tmp_path, Schedule(3, lr=0.3, log_every=1)) == [0.3] * 3


def test_the_learning_rate_rises(tmp_path: Path) -> None:
    schedule = Schedule(6, lr=0.4, warmup=4, log_every=1)
    assert rates(tmp_path, schedule) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_the_learning_rate_falls_as_half_a_cosine(tmp_path: Path) -> None:
    schedule = Schedule(6, lr=0.4, warmup=2, cosine=True, log_every=1)
    fall = [0.2 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates(tmp_path, schedule) == pytest.approx([0.2, 0.4, *fall])
    assert schedule.lr_at(6) == pytest.approx(0, abs=1e-12)


def rates(folder: Path, schedule: Schedule) -> list[float]:
    found: list[float] = []
    run(folder, schedule, report=lambda _, record: found.append(record["lr"]))
    return found


def test_the_optimizer_gets_the_rate(tmp_path: Path) -> None:
    state = run(tmp_path, Schedule(4, lr=0.4, warmup=8))
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


@pytest.mark.parametrize("most", [0.001, 0.1])
def test_gradients_are_scaled_down_to_their_norm(tmp_path: Path, most: float) -> None:
    first, state = new_state(torch.optim.SGD), new_state(torch.optim.SGD)
    norms: list[float] = []
    schedule = Schedule(1, lr=1.0, max_grad_norm=most)
    run(tmp_path, schedule, state, report=lambda _, record: norms.append(record["grad_norm"]))
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(first.model.parameters(), state.model.parameters(), strict=True)]
    )
    assert norms[0] > most  # what is recorded is the norm before
    assert moved.norm().item() == pytest.approx(most, rel=1e-2)


def test_a_norm_of_zero_leaves_gradients(tmp_path: Path) -> None:
    first, state = new_state(torch.optim.SGD), new_state(torch.optim.SGD)
    norms: list[float] = []
    schedule = Schedule(1, lr=1.0, max_grad_norm=0)
    run(tmp_path, schedule, state, report=lambda _, record: norms.append(record["grad_norm"]))
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(first.model.parameters(), state.model.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(norms[0], rel=1e-5)


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_ends_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    schedule = Schedule(8, accumulation=2, lr=0.05)

    def interrupt(call: int) -> None:
        if call == 5:  # the first micro-batch of step 3
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="stopped at step 3; the same command goes on from there") as stopped:
        run(tmp_path / "stopped", schedule, objective=lambda model: Regression(model, before=interrupt))
    assert stopped.value.signal_number == number
    assert [path.name for path in Checkpoints(tmp_path / "stopped").all()] == ["step-00000003"]
    assert_equal(run(tmp_path / "stopped", schedule, new_state(seed=5)), run(tmp_path / "whole", schedule))


def test_a_request_in_the_last_step_ends_the_run_as_usual(tmp_path: Path) -> None:
    def interrupt(call: int) -> None:
        if call == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    state = run(tmp_path, Schedule(3), objective=lambda model: Regression(model, before=interrupt))
    assert state.step == 3


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    def interrupt(call: int) -> None:
        if call == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Schedule(8), objective=lambda model: Regression(model, before=interrupt))


def test_signals_mean_what_they_did_before(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(tmp_path, Schedule(2))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# Failing


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path, bad: float) -> None:
    stream = Stream(Points(), 4)
    shown = ", ".join(f"point {stream.index_of(draw)}" for draw in range(20, 24))
    with pytest.raises(FloatingPointError) as failure:
        run(tmp_path, Schedule(8, 2, log_every=8), objective=lambda model: Regression(model, scales={6: bad}))
    assert str(failure.value) == (
        f"the loss of draws 20 to 23 ({shown}) is not finite at step 3; the last good state is in {tmp_path}; "
        f"try a lower learning rate or fp32, and look at these pictures"
    )


def test_a_gradient_that_is_not_finite_is_not_kept_either(tmp_path: Path) -> None:
    class Poisoned(Regression):
        def __call__(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
            losses = super().__call__(batch, draws)
            nothing = (0 * self.model.weight.sum()).sqrt()  # its value is 0, its gradient is not a number
            return losses | {"loss": losses["loss"] + nothing} if self.calls == 4 else losses

    with pytest.raises(FloatingPointError, match="at step 4"):
        run(tmp_path, Schedule(8, lr=0.01, checkpoint_every=1), objective=Poisoned)
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("checkpoint_every", [1, 2, 3])
def test_a_state_that_is_not_finite_is_never_kept(tmp_path: Path, checkpoint_every: int) -> None:
    schedule = Schedule(20, lr=0.01, log_every=10, checkpoint_every=checkpoint_every)
    with pytest.raises(FloatingPointError, match=f"the last good state is in {tmp_path}"):
        run(tmp_path, schedule, objective=lambda model: Regression(model, scales={5: math.nan}))
    good = new_state(seed=5)
    assert Checkpoints(tmp_path).restore(good)
    assert good.step in (3, 4)
    assert all(tensor.isfinite().all() for tensor in good.tensors().values())


def test_a_run_in_a_thread_trains_without_taking_signals(tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        state = pool.submit(run, tmp_path / "thread", Schedule(2, lr=0.05)).result()
    assert_equal(state, run(tmp_path / "main", Schedule(2, lr=0.05)))
