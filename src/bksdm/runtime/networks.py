"""What a text-to-image pipeline asks of its networks, in numpy, whatever runtime computes them."""

from typing import Literal, Protocol

from numpy import float32, int64
from numpy.typing import NDArray

Array = NDArray[float32]
Tokens = NDArray[int64]
Told = dict[str, Array]  # by name: what a denoiser is told besides noisy latents and their timestep

# Of a denoiser: all of it; all of it, with DEEP as another output; what computes the output from DEEP and its inputs.
Part = Literal["whole", "keeping", "outer"]
DEEP = "deep"  # what the outermost stage gets on the way up, as a tensor of an exported U-Net


class Networks(Protocol):
    """The networks of a latent diffusion model; every array is float32."""

    def encode(self, tokens: Tokens) -> Told:
        """What captions give, such as `context` with shape (B, L, D), by their tokens.

        These have shape (B, L), where those of several text encoders lie side by side or, as many of each, (B, N, L).
        """
        ...

    def predict(self, latents: Array, timestep: float, told: Told) -> Array:
        """The denoiser's answer for noisy latents with shape (B, C, h, w) at one timestep and what it is told of B."""
        ...

    def decode(self, latents: Array) -> Array:
        """Pixels with shape (B, 3, H, W), about -1 to 1, of latents (B, C, h, w) as the VAE gives them."""
        ...

    def moments(self, pixels: Array) -> Array:
        """Mean and log-variance, one after the other, with shape (B, 2 C, h, w), of pixels (B, 3, H, W) in [-1, 1]."""
        ...


class PartedNetworks(Networks, Protocol):
    """Networks of which the denoiser may be computed in parts."""

    def check_parted(self) -> None:
        """Refuse what knows of no parts.

        Raises:
            InputError: The denoiser was exported without them.
        """
        ...

    def keeping(self, latents: Array, timestep: float, told: Told) -> tuple[Array, Array]:
        """What `predict` gives, and what the denoiser's outermost stage got on the way up, with shape (B, D, h, w)."""
        ...

    def outer(self, latents: Array, timestep: float, told: Told, deep: Array) -> Array:
        """What `predict` gives where the outermost stage gets `deep`, and nothing inside of it computes."""
        ...
