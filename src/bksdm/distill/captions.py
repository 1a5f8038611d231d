r"""What becomes of the captions that a batch comes with: some are dropped, some replaced.

A caption becomes the empty prompt with probability $p_\emptyset$, so that the student keeps what classifier-free
guidance needs (Ho and Salimans, 2022, arXiv 2207.12598). Of the others, one becomes a random caption of a pool with
probability $p(t) = e^{-k (1 - t / T)}$ at timestep t of T: near 1 where noise hides the picture, and $e^{-k}$ where
there is none (random conditioning, arXiv 2504.02011; the rate k is a choice). Both U-Nets see the same captions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bksdm.common.randomness import Draws

_CHUNK = 32

Embed = Callable[[Tensor], Tensor]


class CaptionPool:
    """Captions to draw from, embedded at once if that fits in `room` bytes, or else when they are drawn.

    Arguments:
        tokens: With shape (N, L).
        embed: Tokens (B, L) -> embedded captions (B, L, D).
        room: Bytes that the embedded captions may take.
    """

    def __init__(self, tokens: Tensor, embed: Embed, room: float) -> None:
        self._tokens = tokens
        self._embed = embed
        fits = len(tokens) * embed(tokens[:1]).numel() * 4 <= room
        self._kept = torch.cat([embed(chunk).float().cpu() for chunk in torch.split(tokens, _CHUNK)]) if fits else None

    def __len__(self) -> int:
        return len(self._tokens)

    def embedded(self, indices: Tensor) -> Tensor:
        """The captions with these numbers, with shape (B, L, D)."""
        return self._embed(self._tokens[indices]) if self._kept is None else self._kept[indices]


class Captions:
    """Changes the captions of batches, by random numbers of its own for every draw.

    Arguments:
        empty: The embedded empty prompt with shape (L, D).
        dropout: Probability of the empty prompt.
        pool: Captions that take the place of others; None for none.
        rate: k in the probability of that.
        timesteps: T.
    """

    def __init__(
        self,
        empty: Tensor,
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

    def __call__(self, context: Tensor, timesteps: Tensor, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Embedded captions with shape (B, L, D) at timesteps with shape (B,).

        Returns:
            What takes their place, and which of them no longer belong to their picture: booleans with shape (B,), or
            None where there is no pool. The empty prompt belongs to every picture.
        """
        count, device = len(context), context.device
        dropped = draws.also("caption dropout").uniform((count,)).to(device) < self._dropout
        replaced = None
        if self._pool is not None:
            numbers = draws.also("random conditioning")
            likely = torch.exp(-self._rate * (1 - timesteps / self._timesteps))
            replaced = (numbers.uniform((count,)).to(device) < likely) & ~dropped
            others = self._pool.embedded(numbers.integers(len(self._pool), count))
            context = torch.where(replaced[:, None, None], others.to(context), context)
        return torch.where(dropped[:, None, None], self.empty.to(context), context), replaced
