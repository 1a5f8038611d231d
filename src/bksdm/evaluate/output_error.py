"""How far a student's output is from its teacher's on the same noisy latents."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from bksdm.common.randomness import Draws
from bksdm.data.pictures import Picture, PictureSamples
from bksdm.distill.conditions import Conditions, as_type
from bksdm.families import family_of_pipeline
from bksdm.families.family import Family, Told
from bksdm.families.noise import ForwardProcess
from bksdm.models.pipelines import denoiser, image_size, pixels_a_side, tokenizing

LEVELS = 10
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

    def to(self, device: torch.device | str) -> "Probe":
        """The same on a device."""
        told = {name: value.to(device) for name, value in self.told.items()}
        return replace(self, latents=self.latents.to(device), timesteps=self.timesteps.to(device), told=told)

    @torch.no_grad()
    def output(self, unet: Any) -> Tensor:
        """What a U-Net answers, with the shape of the latents."""
        return self.family.answer(unet, self.latents.to(unet.dtype), self.timesteps, as_type(self.told, unet.dtype))


@dataclass(frozen=True)
class _Clean:
    """Latents with shape (B, C, h, w) before there is noise in them, the rest as in `Probe`."""

    latents: Tensor
    told: Told
    family: Family
    noise_schedule: ForwardProcess

    def noisy(self, draws: Draws, grid: Tensor | None = None) -> Probe:
        """The same at timesteps drawn of `grid`, with shape (G,), or of all."""
        noisy = self.noise_schedule.corrupt(self.latents, draws, grid)
        return Probe(noisy.latents, noisy.timesteps, self.told, self.family)


def probes(
    pipeline: DiffusionPipeline, entries: Sequence[Picture], seed: int = 0, batch_size: int = _BATCH
) -> Iterator[Probe]:
    """Captioned pictures in batches, each with noise of its own at one random timestep, as the pipeline sees them."""
    for clean, draws in _encoded(pipeline, entries, seed, batch_size):
        yield clean.noisy(draws)


@dataclass(frozen=True)
class Answered:
    """A probe and what a teacher answered to it, with shape (B, C, h, w).

    Both wait in main memory until networks are held against them: that of the device is for the networks.
    """

    probe: Probe
    answer: Tensor

    def errors(self, network: Any) -> Tensor:
        """Mean squared differences of a network's output from the answer, with shape (B,)."""
        found = self.probe.to(network.device).output(network).float()
        return (found - self.answer.to(found.device)).square().flatten(1).mean(dim=1).cpu().double()


def output_error(student: Any, teacher: DiffusionPipeline, entries: Sequence[Picture], seed: int = 0) -> float:
    """Mean squared difference of the two U-Nets' outputs over captioned pictures, each at one random timestep."""
    return float(output_errors(student, teacher, entries, seed).mean())


def output_errors(student: Any, teacher: DiffusionPipeline, entries: Sequence[Picture], seed: int = 0) -> Tensor:
    """The same for every picture by itself, with shape (N,)."""
    return errors(student, answered(teacher, entries, seed=seed))[:, 0]


def errors(network: Any, batches: Iterable[Sequence[Answered]]) -> Tensor:
    """Mean squared differences of a network's outputs from what `answered` gives, with shape (N, L)."""
    return torch.cat([torch.stack([one.errors(network) for one in batch], dim=-1) for batch in batches])


def answered(
    teacher: DiffusionPipeline,
    entries: Sequence[Picture],
    numbers: range | None = None,
    levels: int | None = None,
    seed: int = 0,
) -> Iterator[list[Answered]]:
    """What a teacher answers about captioned pictures, in batches.

    Arguments:
        teacher: The teacher.
        entries: The pictures.
        numbers: Those that it is asked about, one after the other; all by default.
        levels: Noise levels L, at one random timestep of each of which it is asked about every picture, each with its
            noise. By default, once at any timestep.
        seed: Of timesteps and noise.

    Yields:
        A batch at every level, the least noisy first; or one.
    """
    parts = () if levels is None else noise_levels(teacher, levels)
    for clean, draws in _encoded(teacher, entries, seed, numbers=numbers):
        noisy = [clean.noisy(draws.also(f"level {number}"), part) for number, part in enumerate(parts)]
        yield _answers(denoiser(teacher), noisy or [clean.noisy(draws)])


def noise_levels(pipeline: DiffusionPipeline, count: int = LEVELS) -> tuple[Tensor, ...]:
    """The timesteps of a pipeline in `count` equal parts, with shape (G,) each, the least noisy first."""
    height, width = (side // pixels_a_side(pipeline) for side in image_size(pipeline))
    return family_of_pipeline(pipeline).noise_schedule(pipeline.scheduler).parts(count, height, width)


def _encoded(
    pipeline: DiffusionPipeline,
    entries: Sequence[Picture],
    seed: int,
    batch_size: int = _BATCH,
    numbers: range | None = None,
) -> Iterator[tuple[_Clean, Draws]]:
    """What captioned pictures are to the pipeline, in batches, and the random numbers that go with each."""
    conditions = Conditions.of(pipeline)
    noise_schedule = conditions.family.noise_schedule(pipeline.scheduler)
    tokenize = tokenizing(pipeline)
    samples = PictureSamples(entries, image_size(pipeline), tokenize, told=conditions.of_fitted)
    wanted = range(len(entries)) if numbers is None else numbers
    for start in wanted[::batch_size]:
        chunk = [samples.sample(index, 0) for index in range(start, min(start + batch_size, wanted.stop))]
        draws = Draws(seed, "output error", start)
        batch = {name: torch.stack([one[name] for one in chunk]).to(pipeline.device) for name in chunk[0]}
        latents = conditions.latents(batch, draws)
        yield _Clean(latents, conditions.told(batch), conditions.family, noise_schedule), draws


def _answers(unet: Any, probes: Sequence[Probe]) -> list[Answered]:
    """To probes of one batch, which are told the same and go on to have it in one memory."""
    told = {name: value.cpu() for name, value in probes[0].told.items()}
    kept = [replace(one, latents=one.latents.cpu(), timesteps=one.timesteps.cpu(), told=told) for one in probes]
    return [Answered(one, probe.output(unet).float().cpu()) for one, probe in zip(kept, probes, strict=True)]
