"""What a text-to-image pipeline asks of its networks, in numpy, whatever runtime computes them."""

from typing import Protocol

from numpy import float32, int64
from numpy.typing import NDArray

Array = NDArray[float32]
Tokens = NDArray[int64]


class Networks(Protocol):
    """The four networks of a latent diffusion model; every array is float32."""

    def encode(self, tokens: Tokens) -> Array:
        """Embeddings with shape (B, L, D) of tokens with shape (B, L)."""
        ...

    def predict(self, latents: Array, timestep: float, context: Array) -> Array:
        """The U-Net's output for noisy latents with shape (B, C, h, w) at one timestep and embeddings (B, L, D)."""
        ...

    def decode(self, latents: Array) -> Array:
        """Pixels with shape (B, 3, H, W), about -1 to 1, of latents (B, C, h, w) divided by the scaling factor."""
        ...

    def moments(self, pixels: Array) -> Array:
        """Mean and log-variance, one after the other, with shape (B, 2 C, h, w), of pixels (B, 3, H, W) in [-1, 1]."""
        ...
