r"""What becomes of the captions that a batch comes with: some are dropped, some replaced.

A caption becomes the empty prompt with probability $p_\emptyset$, so that the student keeps what classifier-free
guidance needs (Ho and Salimans, 2022, arXiv 2207.12598). Of the others, one becomes a random caption of a pool with
probability $p(t) = e^{-k (1 - t / T)}$ at timestep t of T: near 1 where noise hides the picture, and $e^{-k}$ where
there is none (random conditioning, arXiv 2504.02011; the rate k is a choice). Both U-Nets see the same captions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bksdm.common.randomness import Draws, sent
from bksdm.data.stream import together
from bksdm.families.family import Told

_CHUNK = 32

Embed = Callable[[Tensor], Told]


class CaptionPool:
    """Captions to draw from, embedded at once if that fits in `room` bytes, or else when they are drawn.

    Arguments:
        tokens: Of N captions; see `tokenizing`.
        embed: Tokens of B captions -> what they give, by name.
        room: Bytes that the embedded captions may take.
    """

    def __init__(self, tokens: Tensor, embed: Embed, room: float) -> None:
        self._tokens = tokens
        self._embed = embed
        fits = len(tokens) * sum(value.numel() for value in embed(tokens[:1]).values()) * 4 <= room
        self._kept = together([embed(chunk) for chunk in torch.split(tokens, _CHUNK)]) if fits else None

    def __len__(self) -> int:
        return len(self._tokens)

    def embedded(self, indices: Tensor) -> Told:
        """What the captions with these numbers give."""
        if self._kept is None:
            return self._embed(self._tokens[indices])
        return {name: value[indices] for name, value in self._kept.items()}


class Captions:
    """Changes the captions of batches, by random numbers of its own for every draw.

    Arguments:
        empty: What the denoiser is told where there is no caption, with B = 1.
        dropout: Probability of the empty prompt.
        pool: Captions that take the place of others; None for none.
        rate: k in the probability of that.
        timesteps: T.
    """

    def __init__(
        self,
        empty: Told,
        *,
        dropout: float = 0.0,
        pool: CaptionPool | None = None,
        rate: float = 0.0,
        timesteps: int = 1000,
    ) -> None:
        self.empty = empty
        self._dropout = dropout
        self._pool = pool
        self._rate = rate
        self._timesteps = timesteps

    def __call__(self, told: Told, timesteps: Tensor, draws: Draws) -> tuple[Told, Tensor | None]:
        """What B captions give at timesteps with shape (B,).

        Returns:
            What takes their place, and which of them no longer belong to their picture: booleans with shape (B,), or
            None where there is no pool. The empty prompt belongs to every picture.
        """
        count, device = len(timesteps), timesteps.device
        dropped = sent(draws.also("caption dropout").uniform((count,)), device) < self._dropout
        replaced = None
        if self._pool is not None:
            numbers = draws.also("random conditioning")
            likely = torch.exp(-self._rate * (1 - timesteps / self._timesteps))
            replaced = (sent(numbers.uniform((count,)), device) < likely) & ~dropped
            told = _where(replaced, self._pool.embedded(numbers.integers(len(self._pool), count)), told)
        return _where(dropped, self.empty, told), replaced


def _where(chosen: Tensor, some: Told, others: Told) -> Told:
    """Of the samples that are chosen, (B,), some conditions; of the rest, the others."""
    return {
        name: torch.where(chosen.view(-1, *[1] * (value.ndim - 1)), sent(some[name], value.device).to(value), value)
        for name, value in others.items()
    }
