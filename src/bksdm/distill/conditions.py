"""What a denoiser sees besides noise: latents of the picture, and what it is told of caption and picture.

All come from frozen parts of the teacher, so they can be computed once and kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from bksdm.common.randomness import Draws, sent
from bksdm.data.stream import Batch
from bksdm.families import family_of_pipeline
from bksdm.families.family import Family, Frame, Told
from bksdm.models.pipelines import text_encoders, tokenizing


class Conditions:
    """The teacher's VAE encoder and text encoders, which learn nothing: none is asked for gradients.

    A batch holds either `pixel_values` with shape (B, 3, H, W) in [-1, 1] or the posterior of its latents,
    `latents_mean` and `latents_std` with shape (B, C, h, w); either `input_ids` (see `tokenizing`) or what the family
    makes of them by name, such as `context` with shape (B, L, D); and what it tells of a picture. Each network
    computes in its own number format, whatever autocast is on around it.
    """

    def __init__(self, family: Family, vae: AutoencoderKL, encoders: Sequence[nn.Module]) -> None:
        self.family = family
        self.vae = vae.eval()
        self.encoders = [encoder.eval() for encoder in encoders]

    @classmethod
    def of(cls, pipeline: DiffusionPipeline) -> "Conditions":
        """Those of a pipeline."""
        return cls(family_of_pipeline(pipeline), pipeline.vae, text_encoders(pipeline))

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, scaled for the denoiser."""
        with torch.autocast(pixels.device.type, enabled=False):
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return self.family.scaled(self.vae, posterior.mean, posterior.std)

    @torch.no_grad()
    def embedded(self, input_ids: Tensor) -> Told:
        """What captions give, by their tokens; on the device of these, whichever the text encoders are on."""
        where: Any = self.encoders[0].device
        with torch.autocast(where.type, enabled=False):
            told = self.family.embedded(self.encoders, input_ids.to(where))
        return {name: value.to(input_ids.device) for name, value in told.items()}

    def of_fitted(self, original: tuple[int, int], size: tuple[int, int]) -> Told:
        """What the denoiser is told of the middle of a picture, of one sample."""
        return self.family.of_frame(Frame.fitted(original, size))

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """A sample of the scaled latents with shape (B, C, h, w)."""
        if "latents_mean" in batch:
            mean, std = batch["latents_mean"], batch["latents_std"]
        else:
            mean, std = self.posterior(batch["pixel_values"])
        return (mean + std * sent(draws.normal(mean.shape), mean.device).to(mean)).float()

    def captions(self, batch: Batch) -> Told:
        """What the captions of a batch give."""
        names = self.family.of_caption
        kept = {name: batch[name] for name in names if name in batch}
        return kept if len(kept) == len(names) else self.embedded(batch["input_ids"])

    def told(self, batch: Batch) -> Told:
        """All that the denoiser is told of a batch."""
        return self.captions(batch) | self.of_pictures(batch)

    def of_pictures(self, batch: Batch) -> Told:
        """What it is told of the pictures of a batch."""
        return {name: batch[name] for name in self.family.of_picture if name in batch}


def without_caption(pipeline: DiffusionPipeline, conditions: Conditions) -> Told:
    """What guidance tells a pipeline's denoiser where there is no caption, with B = 1."""
    tokens = tokenizing(pipeline)("")[None].to(pipeline.vae.device)
    return conditions.family.without_caption(pipeline, conditions.embedded(tokens))


def repeated(told: Told, count: int) -> Told:
    """The conditions of one sample, with B = 1, for `count`."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in told.items()}


def joined(one: Told, other: Told) -> Told:
    """Both, one after the other; what one of them lacks is the same in both."""
    return {name: torch.cat([value, other.get(name, value).to(value)]) for name, value in one.items()}


def as_type(told: Told, dtype: torch.dtype) -> Told:
    """In another number format."""
    return {name: value.to(dtype) for name, value in told.items()}


def framed(family: Family, size: tuple[int, int], device: torch.device | str = "cpu") -> Told:
    """What a denoiser is told of a picture that is drawn, with B = 1; `size` is height and width in pixels."""
    return {name: value[None].to(device) for name, value in family.of_frame(Frame.whole(size)).items()}
