"""What the U-Net sees besides noise: latents of the picture, and the caption's embedding.

Both come from frozen parts of the teacher, so they can be computed once and kept.
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel

from bksdm.common.randomness import Draws
from bksdm.data.stream import Batch


class Conditions:
    """The teacher's VAE encoder and text encoder, frozen.

    A batch holds either `pixel_values` with shape (B, 3, H, W) in [-1, 1] or the posterior of its
    latents, `latents_mean` and `latents_std` with shape (B, C, h, w); and either `input_ids` with
    shape (B, L) or their embedding `context` with shape (B, L, D). Each network computes in its own
    number format, whatever autocast is on around it.
    """

    def __init__(self, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoder = text_encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, scaled for the U-Net."""
        with torch.autocast(pixels.device.type, enabled=False):
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        factor = self.vae.config.scaling_factor
        return posterior.mean * factor, posterior.std * factor

    @torch.no_grad()
    def embedding(self, input_ids: Tensor) -> Tensor:
        """The text encoder's last hidden states with shape (B, L, D)."""
        with torch.autocast(input_ids.device.type, enabled=False):
            embedding: Tensor = self.text_encoder(input_ids).last_hidden_state
        return embedding

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """A sample of the scaled latents with shape (B, C, h, w)."""
        if "latents_mean" in batch:
            mean, std = batch["latents_mean"], batch["latents_std"]
        else:
            mean, std = self.posterior(batch["pixel_values"])
        return (mean + std * draws.normal(mean.shape).to(mean)).float()

    def context(self, batch: Batch) -> Tensor:
        """The embedded captions with shape (B, L, D)."""
        return batch["context"] if "context" in batch else self.embedding(batch["input_ids"])
