"""Turns, medians and intervals."""

import math
import time

import numpy as np
import pytest
import torch

from bksdm.evaluate.timing import Interval, Spread, take_turns

CPU = torch.device("cpu")


def calls(rivals: int, rounds: int, warmup: int = 0, works: str = "ab") -> list[str]:
    """What is done in which order, as the work and the number of the rival."""
    done: list[str] = []
    tasks = {work: [lambda name=f"{work}{n}": done.append(name) for n in range(rivals)] for work in works}
    seconds = take_turns(tasks, rounds=rounds, warmup=warmup, device=CPU)
    assert list(seconds) == list(works)
    assert all(len(of_rival) == rounds for of_work in seconds.values() for of_rival in of_work)
    return done


def test_rivals_follow_one_another_and_take_turns_in_being_first() -> None:
    assert " ".join(calls(2, 2)) == "a0 a1 b0 b1 a1 a0 b1 b0"
    assert " ".join(calls(3, 3, works="a")) == "a0 a1 a2 a1 a2 a0 a2 a0 a1"


@pytest.mark.parametrize("rivals", [1, 2, 3, 4])
def test_every_rival_is_in_every_place_equally_often(rivals: int) -> None:
    order = calls(rivals, rounds=rivals, works="a")
    for place in range(rivals):
        assert sorted(order[place::rivals]) == [f"a{rival}" for rival in range(rivals)]


def test_rounds_to_warm_up_are_done_and_do_not_count() -> None:
    assert len(calls(2, rounds=3, warmup=2)) == 2 * 2 * 5


def test_seconds_are_those_of_the_task() -> None:
    (quick, slow) = take_turns({"": [lambda: None, lambda: time.sleep(0.02)]}, rounds=2, warmup=0, device=CPU)[""]
    assert min(slow) >= 0.02 > max(quick)


def test_nothing_is_kept_for_a_backward_pass() -> None:
    weight, made = torch.ones(1, requires_grad=True), []
    take_turns({"": [lambda: made.append(2 * weight)]}, rounds=1, warmup=0, device=CPU)
    assert not made[0].requires_grad


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_quartiles_are_those_of_numpy(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    spread = Spread.of(values.tolist())
    wanted = np.quantile(values, [0.5, 0.25, 0.75])
    assert [spread.median, spread.lower, spread.upper] == pytest.approx(wanted.tolist())


@pytest.mark.parametrize(
    ("count", "low", "high", "confidence"),
    [
        (1, 1, 1, 0.0),
        (2, 1, 2, 0.5),
        (5, 1, 5, 0.9375),
        (6, 1, 6, 0.96875),
        (7, 1, 7, 0.984375),
        (8, 1, 8, 0.9921875),
        (9, 2, 8, 0.9609375),
        (15, 4, 12, 1 - 2 * sum(math.comb(15, i) for i in range(4)) / 2**15),
    ],
)
def test_the_interval_of_ordered_values(count: int, low: int, high: int, confidence: float) -> None:
    found = Interval.of([float(value) for value in range(count, 0, -1)])
    assert found == Interval((count + 1) / 2, low, high, confidence)


@pytest.mark.parametrize("count", [5, 7, 15])
def test_the_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    draws = np.random.default_rng(0).exponential(size=(4000, count))
    found = [Interval.of(row.tolist()) for row in draws]
    share = np.mean([interval.low <= math.log(2) <= interval.high for interval in found])
    assert share == pytest.approx(found[0].confidence, abs=0.015)
