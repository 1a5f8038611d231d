"""What the parts of the embedded model learn: autoencoder, dual encoder, and text-to-image."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel

from bksdm.common.randomness import Draws
from bksdm.data.stream import Batch
from bksdm.families.noise import Corrupted, ForwardProcess, NoiseSchedule


class Reconstruction:
    r"""L = |x - x'|_1 + (x - x')^2 + \beta KL(q(z|x) || N(0, 1)), with x' decoded from a sample of q."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float = 1e-5) -> None:
        self.vae = vae
        self.kl_weight = kl_weight

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        pixels = batch["pixel_values"]
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * draws.normal(posterior.mean.shape).to(posterior.mean)
        difference = self.vae.decode(latents).sample.float() - pixels
        absolute, squared = difference.abs().mean(), difference.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": absolute + squared + self.kl_weight * kl, "l1": absolute, "mse": squared, "kl": kl}


class Contrast:
    """CLIP's symmetric contrastive loss, on pictures that are shifted, scaled and recoloured by chance."""

    def __init__(self, clip: CLIPModel) -> None:
        self.clip = clip

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        output = self.clip(pixel_values=augment(batch["pixel_values"], draws), input_ids=batch["input_ids"])
        logits = output.logits_per_image.float()
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        accuracy = (logits.argmax(dim=1) == target).float().mean()
        return {"loss": loss, "accuracy": accuracy}


def augment(pixels: Tensor, draws: Draws) -> Tensor:
    """Scale by 0.8-1.2, turn by up to 10 degrees, shift by up to 10 %, blur and brighten a little; white outside."""
    batch = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * draws.uniform((batch, *shape))).to(pixels.device)

    scale, angle = uniform(0.8, 1.2), uniform(-0.17, 0.17)
    shift_x, shift_y = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift_x], -1), torch.stack([sin, cos, shift_y], -1)], dim=1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels - 1, grid, align_corners=False) + 1
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    moved = torch.lerp(moved, blurred, uniform(0, 1, 1, 1, 1))
    return (moved + uniform(-0.1, 0.1, 1, 1, 1) + uniform(-0.05, 0.05, 3, 1, 1)).clamp(-1, 1)


class Pretraining:
    r"""The task loss alone, for a U-Net and its text encoder together.

    L = E[min(SNR_t, \gamma) / SNR_t (\epsilon - \epsilon_\theta(z_t, t, c))^2] (min-SNR weights, arXiv 2303.09556),
    with some captions left out for classifier-free guidance.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        latents_of: Callable[[Batch, Draws], Tensor],
        noise_schedule: NoiseSchedule,
        *,
        empty_ids: Tensor,
        caption_dropout: float,
        snr_gamma: float,
    ) -> None:
        self.unet = unet
        self.text_encoder = text_encoder
        self.latents_of = latents_of
        self.noise_schedule = noise_schedule
        self.empty_ids = empty_ids
        self.caption_dropout = caption_dropout
        self.snr_gamma = snr_gamma

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        noisy = self.noise_schedule.corrupt(self.latents_of(batch, draws), draws)
        ids = batch["input_ids"]
        left_out = draws.uniform((len(ids), 1)).to(ids.device) < self.caption_dropout
        ids = torch.where(left_out, self.empty_ids.to(ids.device), ids)
        context = self.text_encoder(ids).last_hidden_state
        predicted = self.unet(noisy.latents, noisy.timesteps, context).sample
        error = (predicted.float() - noisy.target).square().mean(dim=(1, 2, 3))
        snr = self.noise_schedule.snr(noisy.timesteps)
        return {"loss": (error * snr.clamp(max=self.snr_gamma) / snr).mean(), "task": error.mean()}


class Succession:
    """The output of another network of the same latents, and the task, in equal parts.

    What a batch holds for each: `taught` is the caption as the one that teaches sees it, the rest is for the one that
    learns; some captions are left out for both. A network's answers tell more than noise does, so that this takes a
    fraction of the steps of `Pretraining`.

    Arguments:
        answer: Of the one that learns, to latents, timesteps and batch.
        teach: Of the other, to noisy latents and `taught`.
        latents_of: Clean latents of a batch.
        forward_process: By which both learnt.
        empty: What a batch of one without a caption holds.
        caption_dropout: Share of captions that are left out.
    """

    def __init__(
        self,
        answer: Callable[[Tensor, Tensor, Batch], Tensor],
        teach: Callable[[Corrupted, Tensor], Tensor],
        latents_of: Callable[[Batch, Draws], Tensor],
        forward_process: ForwardProcess,
        *,
        empty: Batch,
        caption_dropout: float,
    ) -> None:
        self.answer = answer
        self.teach = teach
        self.latents_of = latents_of
        self.forward_process = forward_process
        self.empty = empty
        self.caption_dropout = caption_dropout

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        noisy = self.forward_process.corrupt(self.latents_of(batch, draws), draws)
        left_out = (draws.uniform((len(noisy.latents),)) < self.caption_dropout).to(noisy.latents.device)
        told = batch | {
            name: torch.where(left_out.view(-1, *[1] * (empty.ndim - 1)), empty, batch[name])
            for name, empty in self.empty.items()
        }
        with torch.no_grad():
            taught = self.teach(noisy, told["taught"])
        answer = self.answer(noisy.latents, noisy.timesteps, told).float()
        output, task = F.mse_loss(answer, taught), F.mse_loss(answer, noisy.target)
        return {"loss": output + task, "output": output, "task": task}
