"""Scores over features: how like the real pictures, how true to the captions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from bksdm.evaluate.encoder import cosine
from bksdm.randomness import generator


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


def retrieval_r1(images: Tensor, captions: Sequence[str], pool: dict[str, Tensor], among: int, seed: int = 0) -> float:
    """Share of pictures whose own caption fits best among `among` captions.

    The others are drawn for every picture anew, without its own.

    Arguments:
        images: Features with shape (N, D).
        captions: The N captions.
        pool: Features with shape (D,) by caption; holds at least `among` captions, all of `captions` with them.
        among: Number of captions to choose from.
        seed: Decides which captions are drawn.
    """
    names = list(pool)
    features = torch.stack([pool[name] for name in names])
    similar = cosine(images, features)
    hits = 0
    for number, caption in enumerate(captions):
        own = names.index(caption)
        drawn = torch.randperm(len(names), generator=generator(seed, "retrieval", number))
        others = drawn[drawn != own][: among - 1]
        hits += bool((similar[number, own] > similar[number, others]).all())
    return hits / len(captions)
