"""Latents and text embeddings of a small data set, computed once and kept in memory.

Kept are the mean and the deviation of the VAE's posterior, so that every draw still samples it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bksdm.data.pictures import Picture, PictureSamples, flips
from bksdm.data.stream import Batch

_CHUNK = 32


class CachedSamples:
    """`PictureSamples` with `latents_mean`, `latents_std` (C, h, w) and `context` (L, D) in place of pixels and tokens.

    Arguments:
        samples: The pictures and captions.
        posterior: Pixels (B, 3, H, W) -> mean and deviation of their latents.
        embedding: Tokens (B, L) -> embedded captions.
        advance: Called with the number of pictures done, for a progress bar.
    """

    def __init__(
        self,
        samples: PictureSamples,
        posterior: Callable[[Tensor], tuple[Tensor, Tensor]],
        embedding: Callable[[Tensor], Tensor],
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._samples = samples
        self._latents = [
            _latents(samples, flipped, posterior, advance) for flipped in ((False, True) if samples.flip else (False,))
        ]
        self._context, self._caption = _contexts(samples, embedding)

    def __len__(self) -> int:
        return len(self._caption)

    def name(self, index: int) -> str:
        return self._samples.name(index)

    def sample(self, index: int, rng_seed: int) -> Batch:
        mean, std = self._latents[self._samples.flip and flips(rng_seed)]
        return {"latents_mean": mean[index], "latents_std": std[index], "context": self._context[self._caption[index]]}


def cache_bytes(
    pictures: Sequence[Picture], flip: bool, latent_shape: Sequence[int], context_shape: Sequence[int]
) -> int:
    """Memory in bytes that `CachedSamples` takes at most, for latents (C, h, w) and contexts (L, D).

    Equal captions are kept once; they are not counted here, because captions may lie on the disk.
    """
    copies = 2 if flip else 1
    return 4 * len(pictures) * (2 * copies * _product(latent_shape) + _product(context_shape))


def _latents(
    samples: PictureSamples,
    flipped: bool,
    posterior: Callable[[Tensor], tuple[Tensor, Tensor]],
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    means, stds = [], []
    for start in range(0, len(samples), _CHUNK):
        indices = range(start, min(start + _CHUNK, len(samples)))
        mean, std = posterior(torch.stack([samples.pixels(index, flipped) for index in indices]))
        means.append(mean.float().cpu())
        stds.append(std.float().cpu())
        advance(len(indices))
    return torch.cat(means), torch.cat(stds)


def _contexts(samples: PictureSamples, embedding: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[int]]:
    captions = list(dict.fromkeys(entry.text for entry in samples.pictures))
    number = {caption: index for index, caption in enumerate(captions)}
    chunks = [captions[start : start + _CHUNK] for start in range(0, len(captions), _CHUNK)]
    embedded = [embedding(torch.stack([samples.tokenize(text) for text in chunk])).float().cpu() for chunk in chunks]
    return torch.cat(embedded), [number[entry.text] for entry in samples.pictures]


def _product(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
