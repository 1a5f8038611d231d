"""Models that are measured side by side: what each part of them is, as something to call.

A rival computes in torch, or is an exported folder that computes in its own runtime.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from bksdm.common.errors import InputError
from bksdm.common.randomness import generator
from bksdm.distill.conditions import Conditions, as_type, framed, joined, repeated
from bksdm.families import family_of_pipeline
from bksdm.families.family import Told
from bksdm.generate.exported import export_facts, is_exported, open_exported, sample_exported
from bksdm.generate.requests import Request
from bksdm.generate.runtimes import converted
from bksdm.generate.sampling import sample
from bksdm.models.configs import context_tokens, load_denoiser_config
from bksdm.models.decoder import load_model
from bksdm.models.pipelines import check_text_to_image, denoiser, image_size, text_encoders, tokenizing
from bksdm.pruning.cost import UNetCost, unet_cost
from bksdm.runtime.defaults import Defaults
from bksdm.runtime.pipeline import Pipeline
from bksdm.runtime.spared import Spared

PARTS = {"text_encoder": "text encoder", "unet_step": "U-Net step", "decoder": "decoder", "whole": "whole"}
PROMPT = "red apple"  # every prompt is padded to the same length

Task = Callable[[], object]


@dataclass(frozen=True)
class Drawing:
    """How a rival's pictures are drawn; sizes are None where it has its own."""

    how: Defaults
    height: int | None = None
    width: int | None = None

    @property
    def guided(self) -> bool:
        return self.how.guidance > 1


class Rival(Protocol):
    """A model that is measured."""

    @property
    def title(self) -> str:
        """What it is called in the table."""

    @property
    def model(self) -> str:
        """The MODEL or folder, from which another process loads it."""

    @property
    def drawing(self) -> Drawing:
        """What its pictures are like."""

    @property
    def decoder(self) -> str | None:
        """The small decoder that was put into it, if any."""

    @property
    def precision(self) -> str:
        """Of its weights."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures in pixels."""

    def to(self, device: torch.device) -> None:
        """Go where the measurement takes place."""

    def cost(self) -> UNetCost:
        """Of its U-Net for one picture, without guidance."""

    def params(self) -> dict[str, int]:
        """Parameters of text_encoder, unet and decoder."""

    def tasks(self, batch_size: int) -> dict[str, Task]:
        """By part, in the order of `PARTS`."""


def load_rivals(
    models: Sequence[tuple[str, Drawing]],
    dtype: torch.dtype,
    *,
    runtimes: Sequence[str] = ("torch",),
    decoder: str | None = None,
) -> list[Rival]:
    """Every model in every runtime, with its own decoder and, where one is named, with the small one too.

    Arguments:
        models: MODELs, each with what its pictures are like.
        dtype: Type of the weights in torch.
        runtimes: Which compute.
        decoder: The small one.

    Raises:
        InputError: A model is unfit, or cannot be converted for a runtime.
    """
    found: list[Rival] = []
    for model, drawing in models:
        if is_exported(model):
            found.append(ExportedRival.load(model, model, drawing))
            continue
        for runtime in runtimes:
            for small in (None, decoder) if decoder else (None,):
                title = model if small is None else f"{model} + {small}"
                if runtime == "torch":
                    found.append(TorchRival.load(model, drawing, dtype, small))
                else:
                    folder = str(converted(model, runtime, small, drawing.how.spared.pool_keys))
                    found.append(ExportedRival.load(f"{title}, {runtime}", folder, drawing))
    return found


@dataclass(frozen=True)
class TorchRival:
    """A diffusers pipeline."""

    model: str
    pipeline: DiffusionPipeline
    drawing: Drawing
    decoder: str | None = None

    @classmethod
    def load(cls, model: str, drawing: Drawing, dtype: torch.dtype, decoder: str | None) -> "TorchRival":
        pipeline = load_model(model, dtype, decoder)
        check_text_to_image(pipeline, model)
        return cls(model, pipeline, drawing, decoder)

    @property
    def title(self) -> str:
        return self.model if self.decoder is None else f"{self.model} + {self.decoder}"

    @property
    def precision(self) -> str:
        return str(denoiser(self.pipeline).dtype).removeprefix("torch.")

    @property
    def size(self) -> tuple[int, int]:
        height, width = image_size(self.pipeline)
        return self.drawing.height or height, self.drawing.width or width

    def to(self, device: torch.device) -> None:
        self.pipeline.to(device)

    def cost(self) -> UNetCost:
        _, height, width = self._latent_shape()
        tokens = text_encoders(self.pipeline)[0].config.max_position_embeddings
        return unet_cost(denoiser(self.pipeline).config, (height, width), tokens)

    def params(self) -> dict[str, int]:
        networks = {
            "text_encoder": text_encoders(self.pipeline),
            "unet": [denoiser(self.pipeline)],
            "decoder": [self.pipeline.vae.decoder, self.pipeline.vae.post_quant_conv],
        }
        return {name: sum(map(_count, parts)) for name, parts in networks.items()}

    def tasks(self, batch_size: int) -> dict[str, Task]:
        """Each calls its network as the pipeline does."""
        pipeline, guided, family = self.pipeline, self.drawing.guided, family_of_pipeline(self.pipeline)
        encode = self._encoding(batch_size)
        with torch.inference_mode():
            told = encode()
        rows = 2 * batch_size if guided else batch_size
        told = as_type(told | repeated(framed(family, self.size, pipeline.device), rows), denoiser(pipeline).dtype)
        latents = _noise(batch_size, self._latent_shape()).to(pipeline.device, denoiser(pipeline).dtype)
        pipeline.scheduler.set_timesteps(self.drawing.how.steps, device=pipeline.device)
        noisy = torch.cat([latents] * 2) if guided else latents
        pooled = Spared(pool_keys=self.drawing.how.spared.pool_keys)
        answer = partial(family.answer, denoiser(pipeline), noisy, pipeline.scheduler.timesteps[0], told)

        def step() -> Tensor:
            with family.sparing(denoiser(pipeline), pipeline.scheduler, pooled):
                return answer()

        decode = partial(pipeline.vae.decode, latents / pipeline.vae.config.scaling_factor, return_dict=False)
        whole = _whole(partial(sample, pipeline), batch_size, self.drawing, self.size)
        return dict(zip(PARTS, cast(tuple[Task, ...], (encode, step, decode, whole)), strict=True))

    def _encoding(self, batch_size: int) -> Callable[[], Told]:
        """What gives what prompts give, and before that what guidance tells without one."""
        pipeline, conditions = self.pipeline, Conditions.of(self.pipeline)
        tokenize, family = tokenizing(pipeline), conditions.family

        def embedded(prompt: str) -> Told:
            return conditions.embedded(torch.stack([tokenize(prompt)] * batch_size).to(pipeline.device))

        def encode() -> Told:
            told = embedded(PROMPT)
            if not self.drawing.guided:
                return told
            empty = embedded("") if family.embeds_empty(pipeline) else told
            return joined(family.without_caption(pipeline, empty), told)

        return encode

    def _latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        height, width = self.size
        channels = family_of_pipeline(self.pipeline).latent_channels(denoiser(self.pipeline).config)
        return channels, height // factor, width // factor


@dataclass(frozen=True)
class ExportedRival:
    """An exported folder in its own runtime, on the CPU."""

    title: str
    model: str
    pipeline: Pipeline
    drawing: Drawing
    precision: str
    decoder: str | None = None

    @classmethod
    def load(cls, title: str, folder: str, drawing: Drawing) -> "ExportedRival":
        pipeline = open_exported(folder, spared=drawing.how.spared)
        return cls(title, folder, pipeline, drawing, str(export_facts(folder).get("precision")))

    @property
    def size(self) -> tuple[int, int]:
        return self.drawing.height or self.pipeline.height, self.drawing.width or self.pipeline.width

    def to(self, device: torch.device) -> None:
        if device.type != "cpu":
            raise InputError(f"{self.title} computes on the CPU, and device is {device}; compare on one device")

    def cost(self) -> UNetCost:
        height, width = (side // self.pipeline.factor for side in self.size)
        return unet_cost(load_denoiser_config(Path(self.model)), (height, width), context_tokens(Path(self.model)))

    def params(self) -> dict[str, int]:
        kept = export_facts(self.model).get("parameters")
        known = cast(dict[str, int], kept) if isinstance(kept, dict) else {}
        names = {"text_encoder": self.pipeline.conditions.outputs, "unet": ["unet"], "decoder": ["vae_decoder"]}
        return {ours: sum(known.get(name, 0) for name in theirs) for ours, theirs in names.items()}

    def tasks(self, batch_size: int) -> dict[str, Task]:
        """Each calls its network as the runtime does."""
        pipeline, networks, guided = self.pipeline, self.pipeline.networks, self.drawing.guided
        shape = (pipeline.channels, *(side // pipeline.factor for side in self.size))
        encode = partial(pipeline.told, [PROMPT] * batch_size, "" if guided else None, shape[1:])
        latents = _noise(batch_size, shape).numpy()
        noisy = np.concatenate([latents, latents]) if guided else latents
        step = partial(networks.predict, noisy, _FIRST_TIMESTEP, encode())
        decode = partial(networks.decode, pipeline.scale.for_vae(latents))
        whole = _whole(partial(sample_exported, pipeline), batch_size, self.drawing, self.size)
        return dict(zip(PARTS, cast(tuple[Task, ...], (encode, step, decode, whole)), strict=True))


_FIRST_TIMESTEP = 901.0


def _whole(draw: Callable[..., Iterator[object]], batch_size: int, drawing: Drawing, size: tuple[int, int]) -> Task:
    """A batch of pictures from prompts to pixels."""
    requests = [Request(PROMPT, seed) for seed in range(batch_size)]

    def make() -> object:
        return list(draw(requests, **vars(drawing.how), batch_size=batch_size, height=size[0], width=size[1]))

    return make


def _noise(batch_size: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(batch_size, *shape, generator=generator(0, "benchmark"))


def _count(network: nn.Module | None) -> int:
    return sum(p.numel() for p in network.parameters()) if network else 0
