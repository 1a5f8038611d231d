"""PyTorch's random numbers of the CPU, without PyTorch: a seed means the same picture in every runtime.

The generator is the Mersenne Twister; normal numbers come from pairs of uniform ones by Box and Muller,
sqrt(-2 log(1 - u)) cos(2 pi v) and the same with sin. From sixteen numbers on, PyTorch fills the whole with 24-bit
uniforms and turns them block by block, the last sixteen anew where there is a rest; below, it takes 53-bit uniforms a
pair at a time and keeps the second of a pair for later (ATen's DistributionTemplates.h and DistributionsHelper.h).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bksdm.runtime.networks import Array

_BLOCK = 16
_HALF = _BLOCK // 2


class Generator:
    """The random numbers of `torch.Generator().manual_seed(seed)`; draws go on where the last one ended."""

    def __init__(self, seed: int) -> None:
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._kept: float | None = None

    def normal(self, shape: Sequence[int]) -> Array:
        """Standard normal numbers of this shape, those of `torch.randn` but for the last bits."""
        size = math.prod(shape)
        flat = self._blocks(size) if size >= _BLOCK else np.array([self._next() for _ in range(size)])
        return flat.astype(np.float32).reshape(tuple(shape))

    def _blocks(self, size: int) -> NDArray[np.float64]:
        uniform = self._uniform(size)
        whole = size - size % _BLOCK
        normal = np.empty(size)
        normal[:whole] = _box_muller(uniform[:whole])
        if whole < size:
            normal[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return normal

    def _uniform(self, size: int) -> NDArray[np.float32]:
        """Numbers in [0, 1) of 24 bits."""
        return (self._bits(size) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _next(self) -> float:
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return kept
        angle, radius = (self._double() for _ in range(2))
        length = math.sqrt(-2 * math.log1p(-radius))
        self._kept = length * math.sin(2 * math.pi * angle)
        return length * math.cos(2 * math.pi * angle)

    def _double(self) -> float:
        """A number in [0, 1) of 53 bits."""
        high, low = (int(bits) for bits in self._bits(2))
        return (((high << 32) | low) & (2**53 - 1)) * 2.0**-53

    def _bits(self, size: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, size=size, dtype=np.uint32)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float64]:
    """Blocks of sixteen, of which the first eight give lengths and the others angles."""
    blocks = uniform.astype(np.float64).reshape(-1, _BLOCK)
    length = np.sqrt(-2 * np.log(1 - blocks[:, :_HALF]))
    angle = 2 * np.pi * blocks[:, _HALF:]
    return np.concatenate([length * np.cos(angle), length * np.sin(angle)], axis=1).reshape(-1)
