"""Random numbers as a function of what they are for.

Nothing here keeps a state: noise, timesteps, order and flips follow from (seed, purpose, position),
so that a resumed run draws what the uninterrupted one would have drawn, and a sample meets the same
numbers whatever batch it is in and whichever process has it.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def derived_seed(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed for `purpose` at `position` (a draw, a pass, a sample number, ...)."""
    text = ":".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator for `purpose` at `position`; on the CPU so that every device draws the same."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *position))


def permutation(n: int, seed: int, epoch: int) -> list[int]:
    """The order in which pass number `epoch` visits `n` samples."""
    return torch.randperm(n, generator=generator(seed, "order", epoch)).tolist()


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Numbers of this machine's memory on a device, with no wait for it.

    A GPU of NVIDIA fetches them by itself only from memory that stays where it is; a copy from any other waits until
    the GPU has done all that it was given before.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Draws:
    """Random numbers for a batch whose rows are the draws `first`, `first` + 1, ... of a run.

    Every row has a generator of its own, which goes on from one call to the next.
    """

    def __init__(self, seed: int, purpose: str, first: int = 0) -> None:
        self._seed = seed
        self._purpose = purpose
        self._first = first
        self._generators: list[torch.Generator] = []

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers with shape (B, ...), on the CPU."""
        return torch.stack([torch.randn(shape[1:], generator=rng) for rng in self._rows(shape[0])])

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Numbers in [0, 1) with shape (B, ...), on the CPU."""
        return torch.stack([torch.rand(shape[1:], generator=rng) for rng in self._rows(shape[0])])

    def integers(self, high: int, count: int) -> Tensor:
        """Whole numbers in [0, high) with shape (count,), on the CPU."""
        return torch.stack([torch.randint(high, (), generator=rng) for rng in self._rows(count)])

    def also(self, purpose: str) -> "Draws":
        """Other numbers for the same rows: these go on as if nothing had been asked of those."""
        return Draws(self._seed, f"{self._purpose}/{purpose}", self._first)

    def _rows(self, count: int) -> Iterator[torch.Generator]:
        for row in range(len(self._generators), count):
            self._generators.append(generator(self._seed, self._purpose, self._first + row))
        yield from self._generators[:count]
