r"""The forward process of flow matching and what the denoiser is asked for.

$x_s = (1 - s)\, x_0 + s\, \epsilon$ for a noise level s in (0, 1], and the target is the velocity $\epsilon - x_0$
(rectified flow, arXiv 2209.03003; Lipman et al., arXiv 2210.02747). Timesteps are t = 1000 s.

Levels are drawn evenly, or as $1 / (1 + e^{-u})$ for a standard normal u, more of them in the middle (SD 3, arXiv
2403.03206, section 3.1), and are shifted then: $s' = k s / (1 + (k - 1) s)$, more of them noisy where k is above 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bksdm.families.noise import Corrupted

if TYPE_CHECKING:
    from torch import Tensor

    from bksdm.common.randomness import Draws

_T = 1000


@dataclass(frozen=True)
class FlowSchedule:
    """How noise levels are drawn.

    Attributes:
        shift: k, for latents of a height and width.
        logit_normal: Whether they are drawn so, and not evenly.
    """

    shift: Callable[[int, int], float]
    logit_normal: bool = False

    def __len__(self) -> int:
        return _T

    def levels(self, draws: Draws, latents: Tensor) -> Tensor:
        """s of each of B latents, with shape (B,)."""
        count = len(latents)
        drawn = draws.normal((count,)).sigmoid() if self.logit_normal else (draws.integers(_T, count) + 1.0) / _T
        return _shifted(drawn, self.shift(*latents.shape[2:]))

    def grid(self, count: int, height: int, width: int) -> Tensor:
        """0, then `count` timesteps up to 1000, even before they are shifted for latents of this height and width."""
        import torch

        return _T * _shifted(torch.arange(count + 1, dtype=torch.float64) / count, self.shift(height, width)).float()

    def parts(self, count: int, height: int, width: int) -> tuple[Tensor, ...]:
        """A thousand timesteps in `count` equal parts, (G,) each, least noisy first; even before they are shifted."""
        return self.grid(_T, height, width)[1:].tensor_split(count)

    def corrupt(self, latents: Tensor, draws: Draws, grid: Tensor | None = None) -> Corrupted:
        """Latents with shape (B, C, H, W) at levels drawn for them, or at timesteps drawn evenly of `grid`, (G,)."""
        from bksdm.common.randomness import sent

        noise = sent(draws.normal(latents.shape), latents.device).to(latents)
        drawn = _T * self.levels(draws, latents) if grid is None else grid[draws.integers(len(grid), len(latents))]
        timesteps = sent(drawn, latents.device).to(latents)
        return Corrupted(self.mixed(latents, noise, timesteps), timesteps, noise - latents)

    def parted(self, latents: Tensor, timesteps: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        r"""Clean latents $x_0$ and noise $\epsilon$ that noisy latents consist of, as a velocity says."""
        level = _level(timesteps, latents)
        return latents - level * answer, latents + (1 - level) * answer

    def mixed(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at `timesteps`, with shape (B,), of clean latents and noise, each with shape (B, C, H, W)."""
        level = _level(timesteps, clean)
        return (1 - level) * clean + level * noise


def _shifted(levels: Tensor, k: float) -> Tensor:
    return k * levels / (1 + (k - 1) * levels)


def _level(timesteps: Tensor, like: Tensor) -> Tensor:
    return (timesteps / _T).to(like).view(-1, 1, 1, 1)
