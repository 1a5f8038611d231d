"""What a U-Net and parts of it cost: parameters and multiply-accumulates, from its config alone.

Its family says which layers follow from the config; where that is not certain, the network is built and watched. Two
conventions are in use for the multiply-accumulates (MACs): `modules` counts convolutions and linear layers, as the
paper and common counters do; `all` adds the two matrix products of each attention.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bksdm.families import family_claiming
from bksdm.families.layers import Layer

TOKENS = 77  # of a caption, in Stable Diffusion


@dataclass(frozen=True)
class UNetCost:
    """Cost of one forward pass at batch 1.

    Attributes:
        params: Parameters.
        macs_modules: MACs of convolutions and linear layers.
        macs_attention: MACs of the matrix products inside attention.
        latent_size: Height and width of the latents.
    """

    params: int
    macs_modules: int
    macs_attention: int
    latent_size: tuple[int, int]

    @property
    def gmacs_modules(self) -> float:
        return self.macs_modules / 1e9

    @property
    def gmacs_all(self) -> float:
        return (self.macs_modules + self.macs_attention) / 1e9


def unet_cost(
    config: Mapping[str, Any], latent_size: int | tuple[int, int] | None = None, tokens: int = TOKENS
) -> UNetCost:
    """Cost of the U-Net with this config.

    Arguments:
        config: A `UNet2DConditionModel` config.
        latent_size: Side of the latents, or height and width; those of the config by default.
        tokens: Length of the text context.

    Raises:
        InputError: The config is not one of a U-Net that runs.
    """
    size = _size(config, latent_size)
    return _sum(_layers(_key(config), size, tokens), size)


def parts_cost(
    config: Mapping[str, Any],
    parts: Mapping[str, Sequence[str]],
    latent_size: int | tuple[int, int] | None = None,
    tokens: int = TOKENS,
) -> dict[str, UNetCost]:
    """What parts of that U-Net cost in it.

    Arguments:
        config: As in `unet_cost`, with `latent_size` and `tokens`.
        parts: Name -> paths of the modules that make up the part.

    Raises:
        InputError: The config is not one of a U-Net that runs.
    """
    size = _size(config, latent_size)
    layers = _layers(_key(config), size, tokens)
    inside = {name: tuple(f"{path}." for path in paths) for name, paths in parts.items()}
    return {
        name: _sum((layer for layer in layers if f"{layer.path}.".startswith(paths)), size)
        for name, paths in inside.items()
    }


def _sum(layers: Iterable[Layer], size: tuple[int, int]) -> UNetCost:
    each = [(layer.params, layer.macs, layer.products) for layer in layers]
    params, modules, attention = (sum(column) for column in zip(*each, strict=True)) if each else (0, 0, 0)
    return UNetCost(params, modules, attention, size)


def _key(config: Mapping[str, Any]) -> str:
    """The config as JSON, without what says where it is from: equal networks are counted once."""
    of_origin = ("_name_or_path", "_diffusers_version")
    return json.dumps({name: value for name, value in config.items() if name not in of_origin}, sort_keys=True)


def _size(config: Mapping[str, Any], latent_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if latent_size is None:
        return family_claiming(config).latent_sides(config)
    return latent_size if isinstance(latent_size, tuple) else (latent_size, latent_size)


@lru_cache(maxsize=32)  # the same few U-Nets are asked for again and again
def _layers(config: str, size: tuple[int, int], tokens: int) -> list[Layer]:
    """The layers of the U-Net with this config, as JSON."""
    given = json.loads(config)
    found = family_claiming(given).layers_of(given, size, tokens)
    if found is None:
        from bksdm.pruning.built import layers  # noqa: PLC0415 - torch and diffusers take seconds

        found = layers(given, size, tokens)
    return found
