"""Reuse: the inside of the denoiser computes in the first of every so many calls (DeepCache, arXiv 2312.00858).

In the others the outermost stage alone does, on what the inside gave last; `bksdm.families.unet.sparing` is the same in
torch.
"""

from bksdm.runtime.networks import Array, PartedNetworks, Told


class Reusing:
    """The denoiser on one way from noise to picture."""

    def __init__(self, networks: PartedNetworks, every: int) -> None:
        """Begin a way, on which the inside computes in the first of every so many calls."""
        self._networks = networks
        self._every = every
        self._since = 0
        self._deep: Array | None = None

    def predict(self, latents: Array, timestep: float, told: Told) -> Array:
        """As `Networks.predict`; the inside also computes where there are more samples than it last had.

        Where there are fewer, they are taken for its last.
        """
        self._since += 1
        if self._deep is None or self._since == self._every or len(latents) > len(self._deep):
            self._since = 0
            output, self._deep = self._networks.keeping(latents, timestep, told)
            return output
        return self._networks.outer(latents, timestep, told, self._deep[-len(latents) :])
