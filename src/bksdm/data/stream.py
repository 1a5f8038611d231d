"""An endless stream of samples that can be entered at any position, in micro-batches.

Draw number d is a sample of pass d // N, in that pass's own order, mirrored or not by chance: all a
function of (seed, d), so a run resumes by the number of draws it has made, and how the draws are
split into batches and over processes does not matter.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bksdm.common.errors import InputError
from bksdm.common.randomness import derived_seed, permutation

Batch = dict[str, Tensor]

_SHOWN = 8


def together(chunks: Sequence[Batch]) -> Batch:
    """Batches one after the other, kept on the CPU in float32."""
    return {name: torch.cat([chunk[name].float().cpu() for chunk in chunks]) for name in chunks[0]}


class Samples(Protocol):
    """Captioned pictures, as tensors ready to be stacked."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng_seed: int) -> Batch:
        """Sample `index`; `rng_seed` decides crops and flips."""
        ...

    def name(self, index: int) -> str:
        """What a person finds sample `index` by."""
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

    def index_of(self, draw: int) -> int:
        """Which sample draw number `draw` is."""
        epoch, position = divmod(draw, len(self.samples))
        return _order(len(self.samples), self.seed, epoch)[position]

    def described(self, first: int) -> str:
        """The micro-batch that begins with draw `first`, for people."""
        names = [self.samples.name(self.index_of(draw)) for draw in range(first, first + self.batch_size)]
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        return f"draws {first} to {first + self.batch_size - 1} ({shown})"

    def batches(self, first: int = 0, stride: int | None = None) -> Iterator[Batch]:
        """Micro-batches without end: of the draws from `first` on, then from `first` + `stride` on, and so forth.

        `stride` is the batch size by default, so that no draw is left out; n processes that share a
        stream begin a batch apart and take n times that.
        """
        loader: DataLoader[Batch] = DataLoader(
            _Drawn(self.samples, self.seed),
            batch_sampler=_Order(self, first, stride or self.batch_size),
            num_workers=self.workers,
            worker_init_fn=_ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
        )
        return _plain_errors(loader)


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    return permutation(n, seed, epoch)


def _plain_errors(loader: Iterable[Batch]) -> Iterator[Batch]:
    """An `InputError` from a worker process comes back with its traceback as text; keep only its message."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error


def _ignore_interrupts(worker: int) -> None:  # noqa: ARG001
    """Ctrl-C reaches the workers too; the step under way still needs its batches, and the trainer ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the trainer's handler, which a fork takes along


class _Drawn(Dataset[Batch]):
    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        draw, index = key
        return self.samples.sample(index, derived_seed(self.seed, "augmentation", draw))


class _Order(Sampler[list[tuple[int, int]]]):
    """Pairs (draw, index of its sample), a list a micro-batch."""

    def __init__(self, stream: Stream, first: int, stride: int) -> None:
        self.stream = stream
        self.first = first
        self.stride = stride

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for begin in count(self.first, self.stride):
            yield [(draw, self.stream.index_of(draw)) for draw in range(begin, begin + self.stream.batch_size)]
