r"""The forward process of flow matching and what the denoiser is asked for.

$x_s = (1 - s)\, x_0 + s\, \epsilon$ for a noise level s in (0, 1], and the target is the velocity $\epsilon - x_0$
(rectified flow, arXiv 2209.03003; Lipman et al., arXiv 2210.02747). Timesteps are t = 1000 s.
"""

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.common.randomness import Draws
from bksdm.families.noise import Corrupted

_T = 1000


@dataclass(frozen=True)
class FlowSchedule:
    """Noise levels with shape (T,), from the least to 1: those that timesteps are drawn from, shifted as in training.

    Attributes:
        levels: s, ascending.
    """

    levels: Tensor

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "FlowSchedule":
        """The process that a pipeline's scheduler stands for, with its static shift.

        Raises:
            InputError: The scheduler is none of flow matching.
        """
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise InputError(
                f"scheduler {type(scheduler).__name__} is none of flow matching, by which this model learnt; use one "
                f"with a FlowMatchEulerDiscreteScheduler"
            )
        even = torch.arange(1, _T + 1, dtype=torch.float32) / _T
        shift = 1.0 if scheduler.config.use_dynamic_shifting else scheduler.config.shift
        return cls(shift * even / (1 + (shift - 1) * even))

    def __len__(self) -> int:
        return len(self.levels)

    def corrupt(self, latents: Tensor, draws: Draws, grid: Tensor | None = None) -> Corrupted:
        """Latents with shape (B, C, H, W) at levels drawn evenly from all, or from the timesteps of `grid`, (G,)."""
        noise = draws.normal(latents.shape).to(latents)
        choices = _T * self.levels if grid is None else grid
        timesteps = choices[draws.integers(len(choices), len(latents))].to(latents)
        return Corrupted(self.mixed(latents, noise, timesteps), timesteps, noise - latents)

    def parted(self, latents: Tensor, timesteps: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        r"""Clean latents $x_0$ and noise $\epsilon$ that noisy latents consist of, as a velocity says."""
        level = _level(timesteps, latents)
        return latents - level * answer, latents + (1 - level) * answer

    def mixed(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at `timesteps`, with shape (B,), of clean latents and noise, each with shape (B, C, H, W)."""
        level = _level(timesteps, clean)
        return (1 - level) * clean + level * noise


def _level(timesteps: Tensor, like: Tensor) -> Tensor:
    return (timesteps / _T).to(like).view(-1, 1, 1, 1)
