"""An endless stream of micro-batches that can be entered at any position.

Micro-batch number k holds the draws k*B ... (k+1)*B - 1. Draw number d is a sample of pass
d // N, in that pass's own order: all a function of (seed, d), so a run resumes by its count alone.
"""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bksdm.errors import InputError
from bksdm.randomness import derived_seed, permutation

Batch = dict[str, Tensor]


class Samples(Protocol):
    """Captioned pictures, as tensors ready to be stacked."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng_seed: int) -> Batch:
        """Sample `index`; `rng_seed` decides crops and flips."""
        ...


@dataclass(frozen=True)
class Stream:
    """Micro-batches of `batch_size` out of `samples`, in an order given by `seed`.

    `workers` processes read ahead; 0 reads in the training process.
    """

    samples: Samples
    batch_size: int
    seed: int = 0
    workers: int = 0

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Micro-batches number `start`, `start` + 1, ... without end."""
        loader: DataLoader[Batch] = DataLoader(
            _Draws(self.samples, self.seed),
            batch_sampler=_Order(len(self.samples), self.batch_size, self.seed, start),
            num_workers=self.workers,
            worker_init_fn=_ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
        )
        return _plain_errors(loader)


def _plain_errors(loader: Iterable[Batch]) -> Iterator[Batch]:
    """An `InputError` from a worker process comes back with its traceback as text; keep only its message."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error


def _ignore_interrupts(worker: int) -> None:  # noqa: ARG001
    """Ctrl-C reaches the workers too; the step under way still needs its batches, and the trainer ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Draws(Dataset[Batch]):
    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        draw, index = key
        return self.samples.sample(index, derived_seed(self.seed, "augmentation", draw))


class _Order(Sampler[list[tuple[int, int]]]):
    def __init__(self, n: int, batch_size: int, seed: int, start: int) -> None:
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch = []
        first = self.start * self.batch_size
        order, epoch = permutation(self.n, self.seed, first // self.n), first // self.n
        for draw in count(first):
            if draw // self.n != epoch:
                epoch = draw // self.n
                order = permutation(self.n, self.seed, epoch)
            batch.append((draw, order[draw % self.n]))
            if len(batch) == self.batch_size:
                yield batch
                batch = []
