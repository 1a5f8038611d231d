"""Latents and text embeddings of a small data set, computed once and kept in memory.

Kept are the mean and the deviation of the VAE's posterior, so that every draw still samples it.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bksdm.data.pictures import Picture, PictureSamples, flips
from bksdm.data.stream import Batch, together

_CHUNK = 32

Shape = tuple[int, ...]


class CachedSamples:
    """`PictureSamples` with `latents_mean`, `latents_std` (C, h, w) and what captions give, not pixels and tokens.

    Arguments:
        samples: The pictures and captions.
        posterior: Pixels (B, 3, H, W) -> mean and deviation of their latents.
        embedded: Tokens of B captions -> what they give, by name.
        advance: Called with the number of pictures done, for a progress bar.
    """

    def __init__(
        self,
        samples: PictureSamples,
        posterior: Callable[[Tensor], tuple[Tensor, Tensor]],
        embedded: Callable[[Tensor], Batch],
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._samples = samples
        self._seen = [
            _seen(samples, flipped, posterior, advance) for flipped in ((False, True) if samples.flip else (False,))
        ]
        self._captions, self._caption = _captions(samples, embedded)

    def __len__(self) -> int:
        return len(self._caption)

    def name(self, index: int) -> str:
        return self._samples.name(index)

    def sample(self, index: int, rng_seed: int) -> Batch:
        seen, caption = self._seen[0] | self._seen[self._samples.flip and flips(rng_seed)], self._caption[index]
        return {name: value[index] for name, value in seen.items()} | {
            name: value[caption] for name, value in self._captions.items()
        }


def cache_bytes(pictures: Sequence[Picture], flip: bool, latent_shape: Sequence[int], told: Mapping[str, Shape]) -> int:
    """Memory in bytes that `CachedSamples` takes at most, for latents (C, h, w) and conditions of these shapes.

    Equal captions are kept once; they are not counted here, because captions may lie on the disk.
    """
    copies = 2 if flip else 1
    return 4 * len(pictures) * (2 * copies * math.prod(latent_shape) + sum(map(math.prod, told.values())))


def _seen(
    samples: PictureSamples,
    flipped: bool,
    posterior: Callable[[Tensor], tuple[Tensor, Tensor]],
    advance: Callable[[int], None],
) -> Batch:
    chunks = []
    for start in range(0, len(samples), _CHUNK):
        rows = [samples.seen(index, flipped) for index in range(start, min(start + _CHUNK, len(samples)))]
        columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        mean, std = posterior(columns.pop("pixel_values"))
        told = {} if flipped else columns  # of a mirrored picture the same
        chunks.append(together([{"latents_mean": mean, "latents_std": std, **told}]))
        advance(len(rows))
    return together(chunks)


def _captions(samples: PictureSamples, embedded: Callable[[Tensor], Batch]) -> tuple[Batch, list[int]]:
    captions = list(dict.fromkeys(entry.text for entry in samples.pictures))
    number = {caption: index for index, caption in enumerate(captions)}
    chunks = [captions[start : start + _CHUNK] for start in range(0, len(captions), _CHUNK)]
    found = together([embedded(torch.stack([samples.tokenize(text) for text in chunk])) for chunk in chunks])
    return found, [number[entry.text] for entry in samples.pictures]
