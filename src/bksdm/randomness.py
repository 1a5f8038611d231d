"""Random numbers as a function of what they are for.

Nothing here keeps a state: noise, timesteps, order and flips follow from (seed, purpose, position),
so that a resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib

import torch


def derived_seed(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed for `purpose` at `position` (a step, a micro-batch, a sample number, ...)."""
    text = ":".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator for `purpose` at `position`; on the CPU so that every device draws the same."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *position))


def permutation(n: int, seed: int, epoch: int) -> list[int]:
    """The order in which pass number `epoch` visits `n` samples."""
    return torch.randperm(n, generator=generator(seed, "order", epoch)).tolist()
