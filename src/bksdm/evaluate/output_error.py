"""How far a student's output is from its teacher's on the same noisy latents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from bksdm.common.randomness import Draws
from bksdm.data.pictures import Picture, PictureSamples
from bksdm.distill.conditions import Conditions, as_type
from bksdm.families import family_of_pipeline
from bksdm.families.family import Family, Told
from bksdm.families.noise import ForwardProcess
from bksdm.models.pipelines import denoiser, image_size, pixels_a_side, tokenizing

LEVELS = 10
_BATCH = 32


@dataclass(frozen=True)
class Probe:
    """What U-Nets are compared on.

    Attributes:
        latents: Noisy latents with shape (B, C, h, w).
        timesteps: Their timesteps with shape (B,).
        told: What the denoiser is told of captions and pictures.
        family: Of the U-Nets.
    """

    latents: Tensor
    timesteps: Tensor
    told: Told
    family: Family

    @torch.no_grad()
    def output(self, unet: Any) -> Tensor:
        """What a U-Net answers, with the shape of the latents."""
        return self.family.answer(unet, self.latents.to(unet.dtype), self.timesteps, as_type(self.told, unet.dtype))


@dataclass(frozen=True)
class _Clean:
    """Latents with shape (B, C, h, w) before there is noise in them, the rest as in `Probe`."""

    latents: Tensor
    told: Told
    family: Family
    noise_schedule: ForwardProcess

    def noisy(self, draws: Draws, grid: Tensor | None = None) -> Probe:
        """The same at timesteps drawn of `grid`, with shape (G,), or of all."""
        noisy = self.noise_schedule.corrupt(self.latents, draws, grid)
        return Probe(noisy.latents, noisy.timesteps, self.told, self.family)


def probes(
    pipeline: DiffusionPipeline, entries: Sequence[Picture], seed: int = 0, batch_size: int = _BATCH
) -> Iterator[Probe]:
    """Captioned pictures in batches, each with noise of its own at one random timestep, as the pipeline sees them."""
    for clean, draws in _encoded(pipeline, entries, seed, batch_size):
        yield clean.noisy(draws)


def output_error(student: Any, teacher: DiffusionPipeline, entries: Sequence[Picture], seed: int = 0) -> float:
    """Mean squared difference of the two U-Nets' outputs over captioned pictures, each at one random timestep."""
    return float(output_errors(student, teacher, entries, seed).mean())


def output_errors(student: Any, teacher: DiffusionPipeline, entries: Sequence[Picture], seed: int = 0) -> Tensor:
    """The same for every picture by itself, with shape (N,)."""
    return torch.cat([_errors(probe, [student], teacher)[0] for probe in probes(teacher, entries, seed)])


def errors_by_noise(
    networks: Sequence[Any], teacher: DiffusionPipeline, entries: Sequence[Picture], seed: int = 0, levels: int = LEVELS
) -> Tensor:
    """The same for S U-Nets and every picture, at one random timestep of each of L noise levels, each with its noise.

    The teacher is asked once for all of them.

    Returns:
        Errors with shape (S, N, L), the least noisy level first.
    """
    parts = noise_levels(teacher, levels)
    found = []
    for clean, draws in _encoded(teacher, entries, seed):
        noisy = (clean.noisy(draws.also(f"level {number}"), part) for number, part in enumerate(parts))
        found.append(torch.stack([_errors(probe, networks, teacher) for probe in noisy], dim=-1))
    return torch.cat(found, dim=1)


def noise_levels(pipeline: DiffusionPipeline, count: int = LEVELS) -> tuple[Tensor, ...]:
    """The timesteps of a pipeline in `count` equal parts, with shape (G,) each, the least noisy first."""
    height, width = (side // pixels_a_side(pipeline) for side in image_size(pipeline))
    return family_of_pipeline(pipeline).noise_schedule(pipeline.scheduler).parts(count, height, width)


def _encoded(
    pipeline: DiffusionPipeline, entries: Sequence[Picture], seed: int, batch_size: int = _BATCH
) -> Iterator[tuple[_Clean, Draws]]:
    """What captioned pictures are to the pipeline, in batches, and the random numbers that go with each."""
    conditions = Conditions.of(pipeline)
    noise_schedule = conditions.family.noise_schedule(pipeline.scheduler)
    tokenize = tokenizing(pipeline)
    samples = PictureSamples(entries, image_size(pipeline), tokenize, told=conditions.of_fitted)
    for start in range(0, len(entries), batch_size):
        chunk = [samples.sample(index, 0) for index in range(start, min(start + batch_size, len(entries)))]
        draws = Draws(seed, "output error", start)
        batch = {name: torch.stack([one[name] for one in chunk]).to(pipeline.device) for name in chunk[0]}
        latents = conditions.latents(batch, draws)
        yield _Clean(latents, conditions.told(batch), conditions.family, noise_schedule), draws


def _errors(probe: Probe, networks: Sequence[Any], teacher: DiffusionPipeline) -> Tensor:
    """Mean squared differences from the teacher's output with shape (S, B)."""
    wanted = probe.output(denoiser(teacher)).float()
    differences = (probe.output(network).float() - wanted for network in networks)
    return torch.stack([one.square().flatten(1).mean(dim=1).double().cpu() for one in differences])
