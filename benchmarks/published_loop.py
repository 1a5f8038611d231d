"""The published training loop of BK-SDM, as plain as it is described, to measure ours against.

A step opens and scales the pictures, runs the VAE and the text encoder, the teacher and the student with
gradient checkpointing, and reads every loss back from the device. It is written from the description of
the method and of its loop (arXiv 2305.15798; the authors' training script), with today's libraries.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bksdm.common.randomness import Draws
from bksdm.data.pictures import PictureSamples
from bksdm.data.stream import Batch, Stream
from bksdm.families.recipe import Tap


class PublishedLoop:
    """One process, one micro-batch a step.

    Order and random numbers of the samples are those of our own loop, so that the losses can be compared.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        student: UNet2DConditionModel,
        taps: tuple[Tap, ...],
        samples: PictureSamples,
        batch_size: int,
        lr: float,
        autocast: torch.dtype | None = None,
    ) -> None:
        device = pipeline.vae.device
        weights = autocast or torch.float32
        self.vae = pipeline.vae.to(dtype=weights).requires_grad_(False)
        self.text_encoder = pipeline.text_encoder.to(dtype=weights).requires_grad_(False)
        self.teacher = pipeline.unet.to(dtype=weights).requires_grad_(False)
        self.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.student = student.train()
        self.student.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=1e-2)
        self.ema = EMAModel(student.parameters(), model_cls=UNet2DConditionModel, model_config=student.config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
        self.device, self.autocast = device, autocast
        self.taps = taps
        self.batch_size = batch_size
        self.batches = _batches(samples, batch_size)
        self.step_number = 0
        self._taught: dict[str, Tensor] = {}
        self._learnt: dict[str, Tensor] = {}
        for tap in taps:
            _remember(self.teacher, tap.teacher, self._taught)
            _remember(self.student, tap.student, self._learnt)

    def step(self) -> dict[str, float]:
        batch = next(self.batches)
        draws = Draws(0, "noise", self.step_number * self.batch_size)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            losses = self._losses({name: value.to(self.device) for name, value in batch.items()}, draws)
        read = {name: value.item() for name, value in losses.items()}
        torch.autograd.backward(self.scaler.scale(losses["loss"]))
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.step(self.student.parameters())
        self.step_number += 1
        return read

    def _losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        posterior = self.vae.encode(batch["pixel_values"].to(self.vae.dtype)).latent_dist
        latents = posterior.mean + posterior.std * draws.normal(posterior.mean.shape).to(posterior.mean)
        latents = latents * self.vae.config.scaling_factor
        noise = draws.normal(latents.shape).to(latents)
        timesteps = draws.integers(len(self.noise_scheduler), len(latents)).to(latents.device)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        context = self.text_encoder(batch["input_ids"])[0]

        predicted = self.student(noisy, timesteps, context).sample
        taught = self.teacher(noisy, timesteps, context).sample
        task = F.mse_loss(predicted.float(), noise.float())
        output_kd = F.mse_loss(predicted.float(), taught.float())
        per_tap = [
            F.mse_loss(_first(self._learnt[tap.student]).float(), _first(self._taught[tap.teacher]).detach().float())
            for tap in self.taps
        ]
        feature_kd = torch.stack(per_tap).sum()
        return {
            "loss": task + output_kd + feature_kd,
            "task": task,
            "output_kd": output_kd,
            "feature_kd": feature_kd,
        }


def _batches(samples: PictureSamples, batch_size: int) -> Iterator[Batch]:
    """Pictures opened and scaled in the training process, in the order of our own loop."""
    stream = Stream(samples, batch_size)
    order = ([stream.index_of(draw) for draw in range(k * batch_size, (k + 1) * batch_size)] for k in range(10**9))
    return iter(DataLoader(_Indexed(samples), batch_sampler=order, num_workers=0))


class _Indexed(torch.utils.data.Dataset[Batch]):
    def __init__(self, samples: PictureSamples) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> Batch:
        return self.samples.sample(index, 0)


def _remember(model: nn.Module, path: str, where: dict[str, Tensor]) -> None:
    model.get_submodule(path).register_forward_hook(lambda _module, _args, output: where.update({path: output}))


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
