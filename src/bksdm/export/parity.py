"""An export against torch: the picture that the whole pipeline makes of the same latents and the same prompt.

Prompt, guidance and scheduler are the same for both; what differs is who computes the networks. 8-bit pixels are
compared: the largest difference, and the peak signal-to-noise ratio 10 log10(255^2 / mean squared difference).
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor

from bksdm.distill.conditions import framed, joined, repeated
from bksdm.families import family_of_pipeline
from bksdm.families.family import Told
from bksdm.models.pipelines import denoiser, pixels_a_side, text_encoders, tokenizing
from bksdm.runtime import networks as runtime
from bksdm.runtime.networks import Array, Networks, Tokens

PROMPT = "red apple, noto style"
_STEPS, _GUIDANCE, _SEED = 4, 2.5, 0


@dataclass(frozen=True)
class Parity:
    """How near two pictures are.

    Attributes:
        largest: Largest difference of 8-bit pixels, 0 to 255.
        psnr: In dB; infinite where they are equal.
    """

    largest: int
    psnr: float

    def to_dict(self) -> dict[str, float | None]:
        """For JSON, which knows no infinity: psnr is None where the pictures are equal."""
        return {"largest": self.largest, "psnr": None if math.isinf(self.psnr) else round(self.psnr, 2)}

    @classmethod
    def from_dict(cls, values: Mapping[str, float | None]) -> "Parity":
        """What `to_dict` gave."""
        largest, psnr = values.get("largest"), values.get("psnr")
        return cls(int(largest or 0), math.inf if psnr is None else psnr)

    def text(self) -> str:
        return f"max {self.largest}/255, PSNR {self.psnr:.1f} dB"


class TorchNetworks:
    """The networks of a diffusers pipeline."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline, self._family = pipeline, family_of_pipeline(pipeline)

    @torch.inference_mode()
    def encode(self, tokens: Tokens) -> runtime.Told:
        return _arrays(self._family.embedded(text_encoders(self._pipeline), torch.from_numpy(tokens)))

    @torch.inference_mode()
    def predict(self, latents: Array, timestep: float, told: runtime.Told) -> Array:
        timesteps = torch.tensor(timestep)
        given = denoiser(self._pipeline), torch.from_numpy(latents), timesteps, _tensors(told)
        return _array(self._family.answer(*given))

    @torch.inference_mode()
    def decode(self, latents: Array) -> Array:
        return _array(self._pipeline.vae.decode(torch.from_numpy(latents), return_dict=False)[0])

    @torch.inference_mode()
    def moments(self, pixels: Array) -> Array:
        return _array(self._pipeline.vae.encode(torch.from_numpy(pixels)).latent_dist.parameters)


def check_parity(
    pipeline: DiffusionPipeline, networks: Networks, height: int, width: int, *, steps: int = _STEPS
) -> Parity:
    """Make one picture with torch and one with `networks`, and compare them.

    Arguments:
        pipeline: What was exported, on the CPU in float32.
        networks: The export.
        height, width: In pixels.
        steps: Denoising steps.
    """
    factor, channels = pixels_a_side(pipeline), family_of_pipeline(pipeline).latent_channels(denoiser(pipeline).config)
    shape = (1, channels, height // factor, width // factor)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(_SEED)).numpy()
    ours, theirs = (draw(pipeline, given, latents, steps) for given in (networks, TorchNetworks(pipeline)))
    return compare(ours, theirs)


def draw(
    pipeline: DiffusionPipeline, networks: Networks, latents: Array, steps: int, prompt: str = PROMPT
) -> NDArray[np.uint8]:
    """The picture, 8-bit with shape (1, H, W, 3), that networks make of latents (1, C, h, w) under guidance."""
    scheduler, family, sides = copy.deepcopy(pipeline.scheduler), family_of_pipeline(pipeline), latents.shape[2:]
    family.set_steps(scheduler, steps, sides)
    height, width = (side * pixels_a_side(pipeline) for side in sides)
    told = _arrays(_told(pipeline, networks, prompt, (height, width)))
    scale: Callable[..., Tensor] = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    sample = torch.from_numpy(latents) * getattr(scheduler, "init_noise_sigma", 1.0)
    noise = torch.Generator().manual_seed(_SEED)
    extra = {"generator": noise} if _draws(scheduler) else {}
    for timestep in scheduler.timesteps:
        scaled = scale(sample, timestep).float().numpy()
        both = torch.from_numpy(networks.predict(np.concatenate([scaled, scaled]), float(timestep), told))
        empty, prompted = both.chunk(2)
        guided = empty + _GUIDANCE * (prompted - empty)
        sample = scheduler.step(guided, timestep, sample, **extra).prev_sample
    pixels = networks.decode(family.unscaled(pipeline.vae, sample).float().numpy())
    scaled_pixels = np.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1) * 255
    return scaled_pixels.round().astype(np.uint8)


def compare(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> Parity:
    """Pictures of one shape."""
    difference = ours.astype(np.int64) - theirs.astype(np.int64)
    mean_square = float(np.mean(difference**2))
    psnr = 10 * math.log10(255**2 / mean_square) if mean_square else math.inf
    return Parity(int(np.abs(difference).max()), psnr)


def _told(pipeline: DiffusionPipeline, networks: Networks, prompt: str, size: tuple[int, int]) -> Told:
    """What the denoiser is told where there is no caption, and of the prompt."""
    family, tokenize = family_of_pipeline(pipeline), tokenizing(pipeline)
    both = _tensors(networks.encode(torch.stack([tokenize(text) for text in ("", prompt)]).numpy()))
    empty, prompted = ({name: value[row : row + 1] for name, value in both.items()} for row in (0, 1))
    return joined(family.without_caption(pipeline, empty), prompted) | repeated(framed(family, size), 2)


def _tensors(told: runtime.Told) -> Told:
    return {name: torch.from_numpy(value) for name, value in told.items()}


def _arrays(told: Told) -> runtime.Told:
    return {name: _array(value) for name, value in told.items()}


def _draws(scheduler: object) -> bool:
    """Whether a scheduler's step draws random numbers of its own."""
    return "generator" in type(scheduler).step.__code__.co_varnames  # type: ignore[attr-defined]


def _array(tensor: Tensor) -> Array:
    return np.asarray(tensor.float().numpy())
