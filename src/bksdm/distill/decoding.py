r"""Teaching a small autoencoder what a VAE decodes: a batch gives the losses of pixels, edges and latents.

$L = \langle |x_S - x_T| \rangle + \lambda\,L_{edges} + \langle (E_S(x_T) - z)^2 \rangle$ with $x_T = D_T(z)$ and
$x_S = D_S(z)$: the decoder learns from the teacher's, and the encoder, which only makes the folder whole, goes
back from the teacher's pictures to the latents. No picture is needed besides the latents, no network besides the VAE.

Without noise on the latents, the teacher decodes each of them once (`Taught`), where there is room for the pictures.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from bksdm.common.randomness import Draws, sent
from bksdm.data.pictures import flips
from bksdm.data.stream import Batch, Samples
from bksdm.distill.conditions import Conditions
from bksdm.distill.losses import edge_loss

_CHUNK = 16
_HALF = 127.5  # of 255 levels, the middle


class Coder(nn.Module):
    """Both ways of an `AutoencoderTiny` at once: latents (B, C, h, w) and pixels (B, 3, H, W) to the other of each."""

    def __init__(self, small: AutoencoderTiny) -> None:
        super().__init__()
        self.small = small

    def forward(self, latents: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.small.decoder(latents), self.small.encoder(pixels)


class DecoderDistillation:
    """The objective of a small decoder.

    Called with a batch (see `Conditions`) and random numbers, it returns `loss`, `pixels`, `edges`, `latents`, and
    `squared`, the mean squared error of the decoder for pixels in [0, 1].

    Arguments:
        coder: What is trained.
        conditions: Its VAE is the teacher.
        edges_weight: Lambda.
        latent_noise: Every sample gets noise of a standard deviation from 0 to this, in the scale of the U-Net's
            latents; the teacher decodes the same.
    """

    def __init__(self, coder: nn.Module, conditions: Conditions, edges_weight: float, latent_noise: float) -> None:
        self._coder = coder
        self._conditions = conditions
        self._edges_weight = edges_weight
        self._latent_noise = latent_noise

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        if "taught" in batch:
            latents, taught = batch["latents"], batch["taught"].float() / _HALF - 1
        else:
            latents = self._noisy(self._conditions.latents(batch, draws), draws.also("latent noise"))
            taught = decoded(self._conditions.vae, latents)
        pixels, back = self._coder(latents, taught)
        terms = {
            "pixels": (pixels.float() - taught).abs().mean(),
            "edges": edge_loss(pixels, taught),
            "latents": (back.float() - latents).square().mean(),
        }
        loss = terms["pixels"] + self._edges_weight * terms["edges"] + terms["latents"]
        squared = ((pixels.detach().float().clamp(-1, 1) - taught) / 2).square().mean()
        return {"loss": loss, **terms, "squared": squared}

    def _noisy(self, latents: Tensor, draws: Draws) -> Tensor:
        if not self._latent_noise:
            return latents
        deviation = self._latent_noise * draws.uniform((len(latents), 1, 1, 1))
        return latents + sent(deviation * draws.normal(latents.shape), latents.device).to(latents)


@torch.no_grad()
def decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] that a VAE makes of a U-Net's latents (B, C, h, w), whatever autocast is on."""
    with torch.autocast(latents.device.type, enabled=False):
        pixels: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
    return pixels.float().clamp(-1, 1)


class Taught:
    """A sample of each picture's latents (C, h, w), `latents`, and what the teacher makes of it, `taught`.

    Those are bytes (3, H, W), 0 to 255 for -1 to 1; rounding to them leaves 59 dB.

    Arguments:
        samples: Latents or pictures; see `Conditions`.
        conditions: The teacher's VAE.
        flip: Whether half the draws are mirrored copies.
        seed: Of the samples of the posteriors.
        device: Where the VAE is.
        advance: Called with the number of pictures done, for a progress bar.
    """

    def __init__(
        self,
        samples: Samples,
        conditions: Conditions,
        flip: bool,
        seed: int,
        device: torch.device,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._samples = samples
        self._flip = flip
        self._copies = []
        for copy in (0, 1) if flip else (0,):  # an odd seed is that of a mirrored copy, see `flips`
            kept: list[tuple[Tensor, Tensor]] = []
            for start in range(0, len(samples), _CHUNK):
                indices = range(start, min(start + _CHUNK, len(samples)))
                drawn = [samples.sample(index, copy) for index in indices]
                batch = {name: torch.stack([each[name] for each in drawn]).to(device) for name in drawn[0]}
                latents = conditions.latents(batch, Draws(seed, "taught", copy * len(samples) + start))
                bytes_ = ((decoded(conditions.vae, latents) + 1) * _HALF).round().to(torch.uint8)
                kept.append((latents.cpu(), bytes_.cpu()))
                advance(len(indices))
            self._copies.append(tuple(torch.cat(parts) for parts in zip(*kept, strict=True)))

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        return self._samples.name(index)

    def sample(self, index: int, rng_seed: int) -> Batch:
        latents, taught = self._copies[self._flip and flips(rng_seed)]
        return {"latents": latents[index], "taught": taught[index]}


def taught_bytes(count: int, flip: bool, pixels: int, latents: int) -> int:
    """Memory in bytes that `Taught` takes, for pictures and latents of this many numbers."""
    return count * (2 if flip else 1) * (pixels + 4 * latents)
