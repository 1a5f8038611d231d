r"""What a student of few steps should say of noisy latents: how its answer leads from a timestep to where it jumps.

Latent consistency models (arXiv 2310.04378) jump to the picture, $f(z, t) = c_{skip}(t)\, z + c_{out}(t)\, \hat
z_0(z, t)$, where $\hat z_0$ are the clean latents that the denoiser sees in z, $c_{skip}(t) = \sigma^2 / ((s t)^2 +
\sigma^2)$ and $c_{out}(t) = s t / \sqrt{(s t)^2 + \sigma^2}$, so that $f(z, 0) = z$; $s$ and $\sigma$ are the
scheduler's. Between two steps it adds noise anew.

In flow matching the levels are parted into phases, one a step, and f jumps to the end e of its own, $f(x, s) = x - (s -
e)\, v(x, s)$: a step of Euler's method, which stock schedulers take, without new noise (phased consistency models,
arXiv 2405.18407, section 3.1).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from diffusers import LCMScheduler
from torch import Tensor

from bksdm.families.noise import ForwardProcess


class ConsistencyFunction(Protocol):
    """f, and the grid of timesteps that it is learnt at.

    Attributes:
        noise_schedule: The forward process.
        grid: Timesteps with shape (G,), rising.
    """

    @property
    def noise_schedule(self) -> ForwardProcess: ...

    @property
    def grid(self) -> Tensor: ...

    def before(self, timesteps: Tensor) -> Tensor:
        """One timestep of the grid earlier, with shape (B,); before the first comes 0."""
        ...

    def until(self, timesteps: Tensor) -> Tensor:
        """Where f jumps to from timesteps of the grid, with shape (B,)."""
        ...

    def __call__(self, latents: Tensor, timesteps: Tensor, answer: Tensor, until: Tensor) -> Tensor:
        """f of latents (B, C, H, W) at timesteps (B,), by the denoiser's answer to them."""
        ...


@dataclass(frozen=True)
class ToPicture:
    """To clean latents, by the grid and the boundary of an `LCMScheduler`."""

    noise_schedule: ForwardProcess
    scheduler: LCMScheduler

    @property
    def skip(self) -> int:
        """Between two timesteps of the grid."""
        return len(self.noise_schedule) // int(self.scheduler.config.original_inference_steps)

    @cached_property
    def grid(self) -> Tensor:
        return torch.arange(self.skip, len(self.noise_schedule) + 1, self.skip) - 1  # LCMScheduler.set_timesteps

    def before(self, timesteps: Tensor) -> Tensor:
        return (timesteps - self.skip).clamp(min=0)

    def until(self, timesteps: Tensor) -> Tensor:
        return torch.zeros_like(timesteps)

    def __call__(self, latents: Tensor, timesteps: Tensor, answer: Tensor, until: Tensor) -> Tensor:  # noqa: ARG002
        clean, _ = self.noise_schedule.parted(latents, timesteps, answer)
        skip, out = self.scheduler.get_scalings_for_boundary_condition_discrete(timesteps.float().view(-1, 1, 1, 1))
        consistent: Tensor = skip * latents + out * clean
        return consistent


@dataclass(frozen=True)
class ToPhaseEnd:
    """To the end of the phase that a timestep lies in.

    Attributes:
        noise_schedule: Of flow matching.
        timesteps: 0, then those of the grid, rising, with shape (G + 1,).
        ends: Which of them are ends of phases, from 0 to G, rising, with shape (phases + 1,).
    """

    noise_schedule: ForwardProcess
    timesteps: Tensor
    ends: Tensor

    @property
    def grid(self) -> Tensor:
        return self.timesteps[1:]

    def before(self, timesteps: Tensor) -> Tensor:
        return _last_below(timesteps, self.timesteps)

    def until(self, timesteps: Tensor) -> Tensor:
        return _last_below(timesteps, self.timesteps[self.ends])

    def __call__(self, latents: Tensor, timesteps: Tensor, answer: Tensor, until: Tensor) -> Tensor:
        clean, noise = self.noise_schedule.parted(latents, timesteps, answer)
        return self.noise_schedule.mixed(clean, noise, until)


def phase_ends(timesteps: int, phases: int) -> list[int]:
    """Numbers from 0 to `timesteps`, rising, that part as many into phases as even as can be."""
    return [round(phase * timesteps / phases) for phase in range(phases + 1)]


def _last_below(values: Tensor, known: Tensor) -> Tensor:
    """Of each value, the last of the rising `known` that is less."""
    known = known.to(values)
    return known[torch.searchsorted(known, values) - 1]
