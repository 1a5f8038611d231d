"""How far a student's output is from its teacher's on the same noisy latents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from bksdm.common.randomness import Draws
from bksdm.data.pictures import Picture, to_pixels
from bksdm.distill.conditions import Conditions
from bksdm.families.noise import NoiseSchedule
from bksdm.models.pipelines import image_size, tokenizing

_BATCH = 32


@dataclass(frozen=True)
class Probe:
    """What U-Nets are compared on.

    Attributes:
        latents: Noisy latents with shape (B, C, h, w).
        timesteps: Their timesteps with shape (B,).
        context: Their embedded captions with shape (B, L, D).
    """

    latents: Tensor
    timesteps: Tensor
    context: Tensor

    @torch.no_grad()
    def output(self, unet: UNet2DConditionModel) -> Tensor:
        """What a U-Net answers, with the shape of the latents."""
        answer: Tensor = unet(self.latents.to(unet.dtype), self.timesteps, self.context.to(unet.dtype)).sample
        return answer


def probes(
    pipeline: StableDiffusionPipeline, entries: Sequence[Picture], seed: int = 0, batch_size: int = _BATCH
) -> Iterator[Probe]:
    """Captioned pictures in batches, each with noise of its own at one random timestep, as the pipeline sees them."""
    conditions = Conditions(pipeline.vae, pipeline.text_encoder)
    noise_schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)
    tokenize = tokenizing(pipeline.tokenizer)
    size = image_size(pipeline)
    for start in range(0, len(entries), batch_size):
        chunk = entries[start : start + batch_size]
        draws = Draws(seed, "output error", start)
        batch = {
            "pixel_values": torch.stack([to_pixels(entry.open(), size) for entry in chunk]),
            "input_ids": torch.stack([tokenize(entry.text) for entry in chunk]),
        }
        batch = {name: value.to(pipeline.device) for name, value in batch.items()}
        noisy = noise_schedule.corrupt(conditions.latents(batch, draws), draws)
        yield Probe(noisy.latents, noisy.timesteps, conditions.context(batch))


def output_error(
    student: UNet2DConditionModel, teacher: StableDiffusionPipeline, entries: Sequence[Picture], seed: int = 0
) -> float:
    """Mean squared difference of the two U-Nets' outputs over captioned pictures, each at one random timestep."""
    return float(output_errors(student, teacher, entries, seed).mean())


def output_errors(
    student: UNet2DConditionModel, teacher: StableDiffusionPipeline, entries: Sequence[Picture], seed: int = 0
) -> Tensor:
    """The same for every picture by itself, with shape (N,)."""
    found = []
    for probe in probes(teacher, entries, seed):
        difference = probe.output(student).float() - probe.output(teacher.unet).float()
        found.append(difference.square().flatten(1).mean(dim=1).double().cpu())
    return torch.cat(found)
