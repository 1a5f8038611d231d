"""How a network is asked for what becomes of noisy latents: its inputs by name, and the answer from its output.

Names are those of optimum's pipelines; what the transformers do is what diffusers' pipelines do around them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bksdm.runtime.networks import Array, Told

# What conditions are called as inputs of an exported network, where that is another name.
INPUTS = {"context": "encoder_hidden_states"}
_TOKENS = 32  # whose multiples Z-Image fills up to


class Asks(Protocol):
    """A way of asking one kind of network.

    Attributes:
        denoiser: The name of its folder.
        noun: What people call it.
        output: What its output is called.
    """

    @property
    def denoiser(self) -> str: ...
    @property
    def noun(self) -> str: ...
    @property
    def output(self) -> str: ...

    def inputs(self, latents: Array, timestep: float, told: Told) -> Mapping[str, NDArray[Any]]:
        """For latents (B, C, h, w) at one timestep, and what is told of B."""
        ...

    def answer(self, output: Array, latents: Array) -> Array:
        """With shape (B, C, h, w), of the output for these latents."""
        ...


class AsksUNet:
    """Stable Diffusion's and SDXL's U-Nets."""

    denoiser, noun, output = "unet", "U-Net", "out_sample"

    def inputs(self, latents: Array, timestep: float, told: Told) -> Mapping[str, NDArray[Any]]:
        named = {INPUTS.get(name, name): value for name, value in told.items()}
        return {"sample": latents, "timestep": np.array(timestep), **named}

    def answer(self, output: Array, latents: Array) -> Array:  # noqa: ARG002
        return output


@dataclass(frozen=True)
class AsksFlux:
    """Flux.1's transformer, whose tokens are squares of 2 by 2 latents.

    Attributes:
        guidance: What it is told of guidance where nothing is said; None where it was taught none.
    """

    guidance: float | None = None
    denoiser: str = "transformer"
    noun: str = "transformer"
    output: str = "out_sample"

    def inputs(self, latents: Array, timestep: float, told: Told) -> Mapping[str, NDArray[Any]]:
        packed, context = patchified(latents), told["context"]
        given = {
            "hidden_states": _tokens(packed),
            "timestep": np.full(len(latents), np.float32(timestep) / np.float32(1000)),
            "encoder_hidden_states": context,
            "pooled_projections": told["text_embeds"],
            "txt_ids": np.zeros((context.shape[1], 3), np.float32),
            "img_ids": _places(packed, 3),
        }
        if self.guidance is not None:
            given["guidance"] = told.get("guidance", np.full(len(latents), self.guidance, np.float32))
        return given

    def answer(self, output: Array, latents: Array) -> Array:
        return unpatchified(_latents(output, latents.shape[2] // 2, latents.shape[3] // 2))


class AsksFlux2:
    """FLUX.2 klein's transformer, of which every latent is a token."""

    denoiser, noun, output = "transformer", "transformer", "out_sample"

    def inputs(self, latents: Array, timestep: float, told: Told) -> Mapping[str, NDArray[Any]]:
        count, context = len(latents), told["context"]
        words = np.zeros((count, context.shape[1], 4), np.float32)
        words[..., 3] = np.arange(context.shape[1])
        return {
            "hidden_states": _tokens(latents),
            "timestep": np.full(count, np.float32(timestep) / np.float32(1000)),
            "encoder_hidden_states": context,
            "txt_ids": words,
            "img_ids": np.repeat(_places(latents, 4)[None], count, axis=0),
        }

    def answer(self, output: Array, latents: Array) -> Array:
        return _latents(output, *latents.shape[2:])


class AsksZImage:
    """Z-Image's transformer; what it is told of captions and places is in `bksdm.families.zimage.graph`."""

    denoiser, noun, output = "transformer", "transformer", "sample"

    def inputs(self, latents: Array, timestep: float, told: Told) -> Mapping[str, NDArray[Any]]:
        lengths = told["mask"].sum(axis=1).astype(int)
        filled = -(-lengths // _TOKENS) * _TOKENS
        context = np.zeros((len(latents), filled.max(), told["context"].shape[2]), np.float32)
        mask = np.full(context.shape[:2], np.finfo(np.float32).min)
        words = np.zeros((*context.shape[:2], 3), np.int32)
        places = _places(latents[:, :, ::2, ::2], 3).astype(np.int32)
        picture = np.zeros((len(latents), -(-len(places) // _TOKENS) * _TOKENS, 3), np.int32)
        for row, (length, until) in enumerate(zip(lengths, filled, strict=True)):
            context[row, :length] = told["context"][row, :length]
            mask[row, :length] = 0
            words[row, :until, 0] = 1 + np.arange(until)
            picture[row, : len(places)] = places + np.array([until + 1, 0, 0])
        return {
            "hidden_states": latents,
            "timestep": np.full(len(latents), np.float32(1000 - timestep) / np.float32(1000)),
            "encoder_hidden_states": context,
            "encoder_attention_mask": mask,
            "txt_ids": words,
            "img_ids": picture,
        }

    def answer(self, output: Array, latents: Array) -> Array:  # noqa: ARG002
        return -output


def patchified(latents: Array) -> Array:
    """Latents (B, C, h, w) with the four of every 2 by 2 square as channels: (B, 4 C, h / 2, w / 2)."""
    b, c, h, w = latents.shape
    squares = latents.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 1, 3, 5, 2, 4)
    return squares.reshape(b, 4 * c, h // 2, w // 2)


def unpatchified(latents: Array) -> Array:
    """Undo `patchified`."""
    b, c, h, w = latents.shape
    squares = latents.reshape(b, c // 4, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3)
    return squares.reshape(b, c // 4, 2 * h, 2 * w)


def _tokens(latents: Array) -> Array:
    """(B, C, h, w) -> (B, h w, C)."""
    return latents.reshape(*latents.shape[:2], -1).transpose(0, 2, 1)


def _latents(tokens: Array, height: int, width: int) -> Array:
    """Undo `_tokens` for latents of this height and width."""
    return tokens.transpose(0, 2, 1).reshape(len(tokens), -1, height, width)


def _places(latents: Array, axes: int) -> Array:
    """Row and column of every token, in the second and third of `axes` numbers: (h w, axes)."""
    height, width = latents.shape[2:]
    places = np.zeros((height, width, axes), np.float32)
    places[..., 1] = np.arange(height)[:, None]
    places[..., 2] = np.arange(width)
    return places.reshape(-1, axes)
