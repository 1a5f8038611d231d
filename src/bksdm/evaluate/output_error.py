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
from bksdm.families.family import Family, Told
from bksdm.models.pipelines import denoiser, image_size, tokenizing

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


def probes(
    pipeline: DiffusionPipeline, entries: Sequence[Picture], seed: int = 0, batch_size: int = _BATCH
) -> Iterator[Probe]:
    """Captioned pictures in batches, each with noise of its own at one random timestep, as the pipeline sees them."""
    conditions = Conditions.of(pipeline)
    noise_schedule = conditions.family.noise_schedule(pipeline.scheduler)
    tokenize = tokenizing(pipeline)
    samples = PictureSamples(entries, image_size(pipeline), tokenize, told=conditions.of_fitted)
    for start in range(0, len(entries), batch_size):
        chunk = [samples.sample(index, 0) for index in range(start, min(start + batch_size, len(entries)))]
        draws = Draws(seed, "output error", start)
        batch = {name: torch.stack([one[name] for one in chunk]).to(pipeline.device) for name in chunk[0]}
        noisy = noise_schedule.corrupt(conditions.latents(batch, draws), draws)
        yield Probe(noisy.latents, noisy.timesteps, conditions.told(batch), conditions.family)


def output_error(student: Any, teacher: DiffusionPipeline, entries: Sequence[Picture], seed: int = 0) -> float:
    """Mean squared difference of the two U-Nets' outputs over captioned pictures, each at one random timestep."""
    return float(output_errors(student, teacher, entries, seed).mean())


def output_errors(student: Any, teacher: DiffusionPipeline, entries: Sequence[Picture], seed: int = 0) -> Tensor:
    """The same for every picture by itself, with shape (N,)."""
    found = []
    for probe in probes(teacher, entries, seed):
        difference = probe.output(student).float() - probe.output(denoiser(teacher)).float()
        found.append(difference.square().flatten(1).mean(dim=1).double().cpu())
    return torch.cat(found)
