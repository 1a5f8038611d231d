"""Pictures with a part of another in them, so that a student is asked about more than its data shows."""

import torch

from bksdm.common.randomness import derived_seed, generator
from bksdm.data.stream import Batch, Samples

COMPOSED = "composed"
_PICTURES = ("pixel_values", "latents_mean", "latents_std")


class CutMix:
    r"""Samples of which some show a rectangle of another sample's picture (CutMix, arXiv 1905.04899).

    The rectangle has the picture's proportions and a share of its area that is uniform in [0, 1), $r_w = W\sqrt{1 -
    \lambda}$ and $r_h = H\sqrt{1 - \lambda}$; its middle lies anywhere, and what falls outside is cut off. Caption and
    frame stay those of the sample. Latents get it as pixels would, mean and deviation of the posterior alike. All of it
    follows from the seed of the draw.

    A sample has `composed` besides: whether its picture is no longer that of its caption.

    Arguments:
        samples: Where both pictures come from.
        share: Of the samples, from 0 to 1.
    """

    def __init__(self, samples: Samples, share: float) -> None:
        self._samples = samples
        self._share = share

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        return self._samples.name(index)

    def sample(self, index: int, rng_seed: int) -> Batch:
        own, numbers = self._samples.sample(index, rng_seed), generator(rng_seed, "cutmix")
        composed = bool(torch.rand((), generator=numbers) < self._share)
        if not composed:
            return own | {COMPOSED: torch.tensor(composed)}
        number = int(torch.randint(len(self), (), generator=numbers))
        other = self._samples.sample(number, derived_seed(rng_seed, "cutmix"))
        area, down, right = torch.rand(3, generator=numbers).tolist()
        pasted = {}
        for name in _PICTURES:
            if name in own:
                height, width = own[name].shape[-2:]
                rows, columns = _span(height, down, area), _span(width, right, area)
                pasted[name] = own[name].clone()
                pasted[name][..., rows, columns] = other[name][..., rows, columns]
        return own | pasted | {COMPOSED: torch.tensor(composed)}


def _span(length: int, middle: float, area: float) -> slice:
    """Of a side: as long as its share of the root of the area, about a point, all in [0, 1)."""
    half, at = length * area**0.5 / 2, middle * length
    return slice(max(0, round(at - half)), min(length, round(at + half)))
