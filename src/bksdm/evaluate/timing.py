"""Fair clocks for a busy machine: what is compared takes turns, and is compared within a round.

A disturbance that lasts longer than a round meets all alike, so that the ratio of two times of one round stands
still where the times themselves do not. The interval around the median of the ratios assumes nothing about how
they are distributed: between the k-th smallest and the k-th largest of n lies the true median with
probability 1 - 2 sum_{i<k} C(n, i) / 2^n (David and Nagaraja, Order Statistics, 2003).
"""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from bksdm.common.devices import synchronize
from bksdm.common.progress import bar

K = TypeVar("K", bound=Hashable)

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in their unit."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of one value or more; quartiles lie between neighbours as numpy's do by default."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Interval:
    """A median, and where the true one lies with a probability of `confidence`."""

    median: float
    low: float
    high: float
    confidence: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """The narrowest interval between values that holds with 95 % or more; of five values or fewer, their range."""
        n, ordered = len(values), sorted(values)

        def holds(k: int) -> float:
            return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / float(2**n)

        rank = max((k for k in range(1, n // 2 + 1) if holds(k) >= _CONFIDENCE), default=1)
        return cls(statistics.median(ordered), ordered[rank - 1], ordered[-rank], max(0.0, holds(rank)))


def take_turns(
    works: Mapping[K, Sequence[Callable[[], object]]], *, rounds: int, warmup: int, device: torch.device
) -> dict[K, list[list[float]]]:
    """Seconds that each rival took for each work, in every round: `seconds[work][rival][round]`.

    Arguments:
        works: For every work, what does it, a call for each rival. Rivals follow one another, and who comes first
            goes round: what runs before, and what it leaves in the caches, favours nobody.
        rounds: How many rounds count.
        warmup: Rounds before those, whose times are thrown away.
        device: Where all of it computes; the clock is read when it has nothing left to do.
    """
    seconds: dict[K, list[list[float]]] = {work: [[] for _ in rivals] for work, rivals in works.items()}
    total = (warmup + rounds) * sum(map(len, works.values()))
    with bar(total, "timings") as progress, torch.inference_mode():
        for turn in range(-warmup, rounds):
            for work, rivals in works.items():
                for place in range(len(rivals)):
                    rival = (turn + place) % len(rivals)
                    synchronize(device)
                    began = time.perf_counter()
                    rivals[rival]()
                    synchronize(device)
                    spent = time.perf_counter() - began
                    if turn >= 0:
                        seconds[work][rival].append(spent)
                    progress.advance()
    return seconds
