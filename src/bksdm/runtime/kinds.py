"""How models of a folder's kind are drawn from: their latents, their guidance, and their way from noise to picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bksdm.common.errors import InputError
from bksdm.runtime.asks import unpatchified
from bksdm.runtime.defaults import Defaults
from bksdm.runtime.flow import Mu, even_mu, fitted_mu
from bksdm.runtime.networks import Array

_STABLE_DIFFUSION_SCALE = 0.18215


@dataclass(frozen=True)
class Scale:
    """How the VAE's latents become those that the denoiser works on.

    Attributes:
        factor: By which they are multiplied.
        shift: What is taken off before.
        statistics: Of channels of squares of 2 by 2 latents, mean and standard deviation, each with shape (C, 1, 1),
            by which they are scaled instead; None where they are not.
    """

    factor: float = _STABLE_DIFFUSION_SCALE
    shift: float = 0.0
    statistics: tuple[Array, Array] | None = None

    @classmethod
    def of(cls, vae: Mapping[str, Any]) -> "Scale":
        """As the config of a decoder says."""
        if "bn_running_mean_data" not in vae:
            return cls(vae.get("scaling_factor") or _STABLE_DIFFUSION_SCALE, vae.get("shift_factor") or 0.0)
        mean, variance = (
            np.array(vae[f"bn_running_{name}_data"], np.float32)[:, None, None] for name in ("mean", "var")
        )
        return cls(statistics=(mean, np.sqrt(variance + np.float32(vae["bn_eps"]))))

    def scaled(self, latents: Array) -> Array:
        """Of the VAE's latents, those that the denoiser works on."""
        return np.asarray((latents - self.shift) * self.factor, dtype=np.float32)

    def for_vae(self, latents: Array) -> Array:
        """Undo it."""
        if self.statistics is not None:
            mean, spread = self.statistics
            return unpatchified(latents * spread + mean)
        return np.asarray(latents / self.factor + self.shift, dtype=np.float32)


@dataclass(frozen=True)
class Flow:
    """What is particular to transformers that learnt by flow matching.

    Attributes:
        name: For people.
        mu: The shift of noise levels that its pipeline asks for.
        usual: How its pictures are drawn where nothing is said.
        patch: Latents of its VAE to a side of one of its own.
        side_of_a_token: Latents to a side of what its transformer takes as a token.
        side: Of its latents, of pictures of 1024 pixels.
        packed: Of how many latents the channels of its transformer are.
        unguided: The guidance scale up to which there is none.
        guides: Whether guidance is a second call.
        told: Whether it is told of guidance instead.
        negative: Whether there may be a negative prompt.
    """

    name: str
    mu: Mu
    usual: Defaults
    patch: int = 1
    side_of_a_token: int = 2
    side: int = 128
    packed: int = 1
    unguided: float = 1.0
    guides: bool = False
    told: bool = False
    negative: bool = False

    @classmethod
    def of(cls, index: Mapping[str, Any], transformer: Mapping[str, Any]) -> "Flow":
        """Of the configs of a pipeline and its transformer.

        Raises:
            InputError: It is of a kind that is not known here.
        """
        kind, usual = transformer.get("_class_name"), Defaults(50, 4.0)
        if kind == "FluxTransformer2DModel":
            told = bool(transformer.get("guidance_embeds"))
            return cls("Flux.1", even_mu, Defaults(28, 3.5), packed=4, told=told)
        if kind == "Flux2Transformer2DModel":
            guides = not index.get("is_distilled")
            return cls("FLUX.2 klein", fitted_mu, usual, patch=2, side_of_a_token=1, side=64, guides=guides)
        if kind == "ZImageTransformer2DModel":
            return cls("Z-Image", even_mu, Defaults(50, 5.0), unguided=0.0, guides=True, negative=True)
        raise InputError(f"a {kind} is not known here")

    def second_call(self, guidance: float) -> float | None:
        """The g of e_0 + g (e_c - e_0), by the guidance scale; None where there is one call."""
        return 1.0 + guidance - self.unguided if self.guides and guidance > self.unguided else None

    def sides(self, transformer: Mapping[str, Any]) -> Sequence[int]:
        """Height and width of its latents, where its config says, or else of 1024 pixels."""
        side = transformer.get("_sample_size", self.side)
        return side if isinstance(side, list) else [side, side]

    def channels(self, transformer: Mapping[str, Any]) -> int:
        """Of its latents."""
        return int(transformer["in_channels"]) // self.packed

    def tokens(self, height: int, width: int) -> int:
        """Of latents of this height and width."""
        return height * width // self.side_of_a_token**2
