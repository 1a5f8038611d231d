"""How far a student's output is from its teacher's on the same noisy latents."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from bksdm.data.pictures import Picture, to_pixels
from bksdm.distill.conditions import Conditions
from bksdm.distill.noise import NoiseSchedule
from bksdm.models import image_size, tokenizing
from bksdm.randomness import Draws

_BATCH = 32


def output_error(
    student: UNet2DConditionModel, teacher: StableDiffusionPipeline, entries: Sequence[Picture], seed: int = 0
) -> float:
    """Mean squared difference of the two U-Nets' outputs over captioned pictures, each at one random timestep."""
    return float(output_errors(student, teacher, entries, seed).mean())


@torch.no_grad()
def output_errors(
    student: UNet2DConditionModel, teacher: StableDiffusionPipeline, entries: Sequence[Picture], seed: int = 0
) -> Tensor:
    """The same for every picture by itself, with shape (N,)."""
    conditions = Conditions(teacher.vae, teacher.text_encoder)
    noise_schedule = NoiseSchedule.from_scheduler(teacher.scheduler)
    tokenize = tokenizing(teacher.tokenizer)
    side = image_size(teacher)
    found = []
    for start in range(0, len(entries), _BATCH):
        chunk = entries[start : start + _BATCH]
        draws = Draws(seed, "output error", start)
        batch = {
            "pixel_values": torch.stack([to_pixels(entry.open(), side) for entry in chunk]),
            "input_ids": torch.stack([tokenize(entry.text) for entry in chunk]),
        }
        batch = {name: value.to(teacher.device) for name, value in batch.items()}
        noisy = noise_schedule.corrupt(conditions.latents(batch, draws), draws)
        context = conditions.context(batch)
        ours, theirs = (
            unet(noisy.latents.to(unet.dtype), noisy.timesteps, context.to(unet.dtype)).sample.float()
            for unet in (student, teacher.unet)
        )
        found.append((ours - theirs).square().flatten(1).mean(dim=1).double().cpu())
    return torch.cat(found)
