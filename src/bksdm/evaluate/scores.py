"""Scores over features: how like the real pictures, how true to the captions."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from bksdm.evaluate.encoder import cosine


class _Given(nn.Module):
    """Stands where torchmetrics expects a network: the features are computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    r"""$|\mu - \mu'|^2 + tr(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2})$ of features (N, D) and (M, D).

    Source: arXiv 1706.08500, eq. 6.
    """
    distance = FrechetInceptionDistance(feature=_Given(features.shape[1]))
    distance.set_dtype(torch.float64)
    distance.update(features.double(), real=False)
    distance.update(reference.double(), real=True)
    return float(distance.compute())


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean cosine similarity of each picture (N, D) with its own caption (N, D)."""
    return float(cosine(images, texts).diagonal().mean())


def retrieval_r1(images: Tensor, captions: Sequence[str], pool: Mapping[str, Tensor], among: int) -> float:
    r"""Share of pictures whose own caption fits best among `among` captions.

    The others are drawn at random from the pool, and this is the mean over all draws: a picture that b of its M
    rivals in the pool beat or equal is a hit with probability $\binom{M - b}{k} / \binom{M}{k}$, k = `among` - 1.

    Arguments:
        images: Features with shape (N, D).
        captions: The N captions.
        pool: Features with shape (D,) by caption; holds at least `among` captions, all of `captions` with them.
        among: Number of captions to choose from.
    """
    names = list(pool)
    features = torch.stack([pool[name] for name in names])
    similar = cosine(images, features)
    own = torch.tensor([names.index(caption) for caption in captions])
    better = (similar >= similar.gather(1, own[:, None])).sum(dim=1) - 1  # its own caption is not a rival
    rivals, drawn = len(names) - 1, among - 1
    hits = [math.comb(rivals - int(count), drawn) / math.comb(rivals, drawn) for count in better]
    return sum(hits) / len(hits)
