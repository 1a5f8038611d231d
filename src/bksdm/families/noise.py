r"""The forward process and what the U-Net is asked for.

$z_t = \sqrt{\bar\alpha_t}\, z_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$ (Ho et al., 2020, eq. 4). The target is
$\epsilon$, or the velocity $\sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, z_0$ (Salimans and Ho, 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from bksdm.common.errors import InputError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from torch import Tensor

    from bksdm.common.randomness import Draws

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Corrupted:
    """Noisy latents with what made them.

    Attributes:
        latents: z_t with shape (B, C, H, W).
        timesteps: t with shape (B,), integers in [0, T).
        target: What the U-Net should answer, with the shape of `latents`.
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor


class ForwardProcess(Protocol):
    """How noise is added to latents, at T timesteps, and what the denoiser should answer."""

    def __len__(self) -> int:
        """T, which timesteps are less than, or at most."""
        ...

    def parts(self, count: int, height: int, width: int) -> tuple[Tensor, ...]:
        """All timesteps of latents of this height and width in `count` equal parts, (G,) each, least noisy first."""
        ...

    def corrupt(self, latents: Tensor, draws: Draws, grid: Tensor | None = None) -> Corrupted:
        """Latents with shape (B, C, H, W) at timesteps drawn from `grid`, with shape (G,), or from all."""
        ...

    def parted(self, latents: Tensor, timesteps: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latents and noise that noisy latents consist of, as an answer says; `mixed` is the way back."""
        ...

    def mixed(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at `timesteps`, with shape (B,), of clean latents and noise, each with shape (B, C, H, W)."""
        ...


@dataclass(frozen=True)
class NoiseSchedule:
    r"""Cumulative signal share $\bar\alpha_t$ with shape (T,), and the prediction type."""

    alphas_cumprod: Tensor
    prediction_type: PredictionType = "epsilon"

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> NoiseSchedule:
        """The schedule that a pipeline's scheduler stands for.

        Raises:
            InputError: The scheduler has no such process, or predicts something else than noise or velocity.
        """
        from diffusers import DDPMScheduler

        if "beta_schedule" not in scheduler.config:
            raise InputError(
                f"scheduler {type(scheduler).__name__} cannot be retrained by, for it adds noise by sigmas of its own; "
                f"use a model with betas, such as one with an EulerDiscreteScheduler"
            )
        training = DDPMScheduler.from_config(scheduler.config)
        kind = training.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise InputError(f"prediction type {kind!r} cannot be retrained; use epsilon or v_prediction")
        return cls(training.alphas_cumprod, kind)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def snr(self, timesteps: Tensor) -> Tensor:
        r"""Signal-to-noise ratio $\bar\alpha_t / (1 - \bar\alpha_t)$ with shape (B,)."""
        share = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return share / (1 - share)

    def level(self, timestep: float) -> float:
        """See `bksdm.runtime.noise_schedule.noise_level`."""
        from bksdm.runtime.noise_schedule import noise_level

        return noise_level(self.alphas_cumprod.numpy(), timestep)

    def parts(self, count: int, height: int, width: int) -> tuple[Tensor, ...]:  # noqa: ARG002
        """All timesteps in `count` equal parts, (G,) each, the least noisy first; whatever the size of latents."""
        import torch

        return torch.arange(len(self)).tensor_split(count)

    def corrupt(self, latents: Tensor, draws: Draws, grid: Tensor | None = None) -> Corrupted:
        """Latents with shape (B, C, H, W) at timesteps drawn uniformly from `grid`, with shape (G,), or from all."""
        from bksdm.common.randomness import sent

        noise = sent(draws.normal(latents.shape), latents.device).to(latents)
        drawn = draws.integers(len(self) if grid is None else len(grid), len(latents))
        timesteps = sent(drawn if grid is None else grid[drawn], latents.device)
        signal, spread = self._shares(timesteps, latents)
        target = noise if self.prediction_type == "epsilon" else signal * noise - spread * latents
        return Corrupted(signal * latents + spread * noise, timesteps, target)

    def parted(self, latents: Tensor, timesteps: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        r"""What a U-Net's answer says that noisy latents consist of: clean latents $z_0$ and noise $\epsilon$.

        Arguments:
            latents: z_t with shape (B, C, H, W).
            timesteps: t with shape (B,).
            answer: The U-Net's, with the shape of `latents`.

        Returns:
            $z_0$ and $\epsilon$, with the shape of `latents`; `mixed` puts them together again.
        """
        signal, spread = self._shares(timesteps, latents)
        if self.prediction_type == "epsilon":
            return (latents - spread * answer) / signal, answer
        return signal * latents - spread * answer, signal * answer + spread * latents

    def mixed(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at `timesteps`, with shape (B,), of clean latents and noise, each with shape (B, C, H, W)."""
        signal, spread = self._shares(timesteps, clean)
        return signal * clean + spread * noise

    def _shares(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """What clean latents and noise are multiplied by, each with shape (B, 1, 1, 1)."""
        from bksdm.common.randomness import sent

        share = sent(self.alphas_cumprod, like.device).to(like)[timesteps].view(-1, 1, 1, 1)
        return share.sqrt(), (1 - share).sqrt()
