"""Text-to-image and image-to-image from networks, a tokenizer and a scheduler's options, in numpy.

Noise, guidance and the order of random numbers are those of diffusers' pipelines with a generator on the CPU for each
picture.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm.common.errors import InputError
from bksdm.runtime.conditions import Conditions
from bksdm.runtime.defaults import Defaults
from bksdm.runtime.flow import FlowEuler, flow_way
from bksdm.runtime.kinds import Flow, Scale
from bksdm.runtime.networks import Array, PartedNetworks, Told
from bksdm.runtime.noise import Generator
from bksdm.runtime.reuse import Reusing
from bksdm.runtime.schedulers import trajectory
from bksdm.runtime.spared import Interval, Spared
from bksdm.runtime.tokens import Tokenizers
from bksdm.runtime.trajectory import Trajectory

Pixels = NDArray[np.uint8]
Predict = Callable[[Array, float, Told], Array]
_LOG_VARIANCE = (-30.0, 20.0)


@dataclass(frozen=True)
class Pipeline:
    """A model that makes pictures of prompts.

    Attributes:
        networks: Compute in some runtime.
        tokenizer: Prompts to tokens, and what of them is cut off.
        scheduler: The options of scheduler_config.json.
        channels: Of the latents.
        scale: How latents of the VAE become those of the denoiser.
        factor: Pixels along a side of one latent.
        multiple: Of which heights and widths in pixels are multiples.
        height: In pixels, where none is asked for.
        width: In pixels, where none is asked for.
        fixed: Whether the networks take no other height and width.
        defaults: What the model draws best with.
        conditions: What the networks are told.
        flow: What is particular to a model that learnt by flow matching; None for others.
    """

    networks: PartedNetworks
    tokenizer: Tokenizers
    scheduler: Mapping[str, Any]
    channels: int
    scale: Scale
    factor: int
    multiple: int
    height: int
    width: int
    fixed: bool = False
    defaults: Defaults = field(default_factory=Defaults)
    conditions: Conditions = field(default_factory=Conditions)
    flow: Flow | None = None

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        interval: Sequence[float] | None = None,
        reuse: int | None = None,
        batch_size: int = 1,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        image: Pixels | None = None,
        strength: float = 0.8,
        latents: Array | None = None,
        sigmas: Sequence[float] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[Pixels]:
        """Yield pictures with shape (B, H, W, 3), a batch at a time, in order.

        Arguments:
            prompts: One a picture.
            seeds: One a picture; 0, 1, ... by default.
            steps: Denoising steps; the model's own by default.
            guidance: Classifier-free guidance scale, the model's own by default; 1 or less for none, which halves the
                work.
            interval: The least and the largest noise level sqrt((1 - a) / a), a the share of the signal, at which
                guidance is given (arXiv 2404.07724); all by default.
            reuse: Every how many steps the inside of the U-Net is computed; every one by default. See `Reusing`.
            batch_size: Pictures at a time.
            negative_prompt: What to keep away from, under guidance.
            height: In pixels; the image's or the model's own by default.
            width: The same.
            image: Start from this picture with shape (H, W, 3) (SDEdit, arXiv 2108.01073) instead of from noise.
            strength: Share of the denoising that is done anew with `image`, in (0, 1].
            latents: Standard normal latents with shape (N, C, h, w) to start from instead of those of the seeds.
            sigmas: Of flow matching: the noise level that each step begins at, before the scheduler shifts it; the
                model's own by default, or even ones.
            on_step: Called after every step with the number of steps that are done and that of all, in this batch.

        Raises:
            InputError: An argument is unfit, or a network gives numbers that are not finite; see the message.
        """
        how = self.defaults.chosen(steps, guidance, Spared.asked(interval, reuse))
        how = how if sigmas is None else replace(how, sigmas=tuple(sigmas))
        chosen = range(len(prompts)) if seeds is None else seeds
        size = self._size(height, width, image)
        shape = (self.channels, size[0] // self.factor, size[1] // self.factor)
        self._check(prompts, chosen, batch_size, latents, image, shape)
        self._check_flow(negative_prompt, image, how)
        if how.spared.reuse is not None:
            self.networks.check_parted()
        self._way(how, shape, strength if image is not None else 1.0)
        return self._batches(
            prompts, chosen, how, batch_size, negative_prompt, shape, image, strength, latents, on_step
        )

    def _batches(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        how: Defaults,
        batch_size: int,
        negative_prompt: str,
        shape: tuple[int, ...],
        image: Pixels | None,
        strength: float,
        latents: Array | None,
        on_step: Callable[[int, int], None] | None,
    ) -> Iterator[Pixels]:
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            guidance = self.guidance(how.guidance)
            told = self.told(prompts[batch], None if guidance is None else negative_prompt, shape[1:])
            if self.flow and self.flow.told:
                told["guidance"] = np.full(len(prompts[batch]), how.guidance, np.float32)
            draws = _Draws(seeds[batch], shape)
            if image is None:
                way = self._way(how, shape)
                given = draws() if latents is None else np.asarray(latents[batch], dtype=np.float32)
                sample = given * way.noise_scale
            else:
                clean, begun = self._latents(image, draws), trajectory(self.scheduler, how.steps, strength)
                way, sample = begun, begun.noisy(clean, draws())
            alone = {name: value[-len(draws) :] for name, value in told.items()}
            reuse = how.spared.reuse
            predict = self.networks.predict if reuse is None else Reusing(self.networks, reuse).predict
            for number, timestep in enumerate(way.timesteps, 1):
                if guidance is not None and _within(how.spared.interval, way, timestep):
                    output = _guided(predict, way.scaled(sample), float(timestep), told, guidance)
                else:
                    output = predict(way.scaled(sample), float(timestep), alone)
                sample = way.step(output, sample, draws)
                if on_step is not None:
                    on_step(number, len(way.timesteps))
            _check_finite(sample, self.conditions.asks.noun)
            pixels = self.networks.decode(self.scale.for_vae(sample))
            _check_finite(pixels, "decoder")
            yield to_bytes(pixels)

    def guidance(self, scale: float) -> float | None:
        """The g of e_0 + g (e_c - e_0), by the guidance scale; None where there is one call."""
        if self.flow:
            return self.flow.second_call(scale)
        return scale if scale > 1 else None

    def _way(self, how: Defaults, shape: Sequence[int], strength: float = 1.0) -> Trajectory | FlowEuler:
        """From noise to pictures of latents with shape (C, h, w)."""
        if self.flow is None:
            return trajectory(self.scheduler, how.steps, strength)
        return flow_way(self.scheduler, how.steps, self.flow.tokens(*shape[1:]), self.flow.mu, how.sigmas)

    def told(self, prompts: Sequence[str], negative_prompt: str | None, sides: Sequence[int]) -> Told:
        """What the U-Net is told of pictures.

        Arguments:
            prompts: One a picture.
            negative_prompt: Under guidance, what all are kept away from, which comes first and as often; else None.
            sides: Height and width of their latents.
        """
        told = self.networks.encode(self.tokenizer(prompts))
        count, (height, width) = len(prompts), (side * self.factor for side in sides)
        if negative_prompt is None:
            return told | self.conditions.of_size(height, width, count)
        if negative_prompt or self.conditions.embeds_empty:
            away = self.networks.encode(self.tokenizer([negative_prompt]))
        else:
            away = {name: np.zeros_like(value[:1]) for name, value in told.items()}
        both = {name: np.concatenate([np.repeat(away[name], count, axis=0), told[name]]) for name in told}
        return both | self.conditions.of_size(height, width, 2 * count)

    def _latents(self, image: Pixels, draws: "_Draws") -> Array:
        """Draws from the VAE's posterior for one picture, scaled for the U-Net."""
        mean, log_variance = np.split(self.networks.moments(from_bytes(image)), 2, axis=1)
        spread = np.exp(0.5 * np.clip(log_variance, *_LOG_VARIANCE))
        return self.scale.scaled(mean + spread * draws())

    def _size(self, height: int | None, width: int | None, image: Pixels | None) -> tuple[int, int]:
        own = (self.height, self.width) if image is None else (image.shape[0], image.shape[1])
        size = own[0] if height is None else height, own[1] if width is None else width
        for name, value, only in zip(("height", "width"), size, (self.height, self.width), strict=True):
            if self.fixed and value != only:
                raise InputError(f"{name} is {value}, and this export makes {only} only; export it for another size")
            if value < 1 or value % self.multiple:
                raise InputError(f"{name} is {value}; give a multiple of {self.multiple}")
        if image is not None and size != own:
            raise InputError(f"the image is {own[1]}x{own[0]} and not {size[1]}x{size[0]}; resize it first")
        return size

    def _check_flow(self, negative_prompt: str, image: Pixels | None, how: Defaults) -> None:
        if self.flow is None:
            return
        if image is not None:
            raise InputError(f"{self.flow.name} does not start from a picture here; leave out the image")
        if how.spared.interval is not None:
            raise InputError(f"{self.flow.name} has no guidance_interval here; leave it out")
        if how.spared.reuse is not None:
            raise InputError(f"{self.flow.name} has no reuse here; leave it out")
        if negative_prompt and not self.flow.negative:
            raise InputError(f"{self.flow.name} takes no negative prompt; leave it out")

    def _check(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        batch_size: int,
        latents: Array | None,
        image: Pixels | None,
        shape: tuple[int, ...],
    ) -> None:
        if len(seeds) != len(prompts):
            raise InputError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; give at least 1")
        if image is not None and (image.dtype != np.uint8 or image.shape[2:] != (3,)):
            raise InputError(f"the image is {image.dtype} of shape {image.shape}; give uint8 of shape (H, W, 3)")
        if latents is not None and image is not None:
            raise InputError("both latents and an image are given; give one of them")
        if latents is not None and latents.shape != (len(prompts), *shape):
            raise InputError(f"latents have shape {latents.shape}; give {(len(prompts), *shape)}")


def _guided(predict: Predict, latents: Array, timestep: float, told: Told, guidance: float) -> Array:
    both = predict(np.concatenate([latents, latents]), timestep, told)
    away, towards = np.split(both, 2)
    return away + guidance * (towards - away)


def _within(interval: Interval | None, way: Trajectory | FlowEuler, timestep: float) -> bool:
    """Whether guidance is given at a timestep; `Pipeline.sample` refuses intervals in flow matching."""
    if interval is None or isinstance(way, FlowEuler):
        return True
    return interval[0] <= way.level(timestep) <= interval[1]


class _Draws:
    """Normal numbers with shape (B, C, h, w), each picture's from a generator of its own."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]) -> None:
        self._generators = [Generator(seed) for seed in seeds]
        self._shape = shape

    def __len__(self) -> int:
        return len(self._generators)

    def __call__(self) -> Array:
        return np.stack([generator.normal(self._shape) for generator in self._generators])


def _check_finite(numbers: Array, network: str) -> None:
    if not np.isfinite(numbers).all():
        raise InputError(
            f"the {network} gives numbers that are not finite, as half precision does where it overflows; compute in "
            f"f32, or export the model with --precision fp32"
        )


def to_bytes(pixels: Array) -> Pixels:
    """Pixels with shape (B, H, W, 3), 0 to 255, of those with shape (B, 3, H, W), about -1 to 1."""
    shares = np.clip(pixels * np.float32(0.5) + np.float32(0.5), 0, 1)
    return np.ascontiguousarray(np.round(shares.transpose(0, 2, 3, 1) * np.float32(255)).astype(np.uint8))


def from_bytes(image: Pixels) -> Array:
    """Pixels with shape (1, 3, H, W), -1 to 1, of those with shape (H, W, 3), 0 to 255."""
    return (image.astype(np.float32) / np.float32(255)).transpose(2, 0, 1)[None] * 2 - 1
