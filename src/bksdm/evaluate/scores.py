"""Scores of pictures, each with its uncertainty.

A score is a function of weights: how often every picture is counted. Ones give its value, the weights of
a bootstrap over prompts its standard error, and the pictures of one seed each the band from seed to seed.
Two models that drew the same prompts from the same seeds are resampled together, so what their
difference owes to the prompts cancels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bksdm.evaluate.statistics import (
    Gaussian,
    Rows,
    bootstrap_weights,
    frechet_distances,
    inception_scores,
    kernel_distances,
    precision_and_recall,
    torch_fidelity_order,
    weighted_means,
)

_CHUNK = 1024
_SPLITS = 10
_Z = 1.96  # standard errors to either side of a 95 % interval

Weighted = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """What a score is called, whether less of it is better, and whether it holds pictures against their captions."""

    title: str
    less_is_better: bool = False
    of_captions: bool = False


KINDS = {
    "frechet_distance": Kind("Fréchet distance", less_is_better=True),
    "kernel_distance": Kind("kernel distance", less_is_better=True),
    "inception_score": Kind("Inception Score"),
    "precision": Kind("precision"),
    "recall": Kind("recall"),
    "clip_score": Kind("CLIP score", of_captions=True),
    "retrieval_r1": Kind("R@1", of_captions=True),
    "output_error": Kind("output error", less_is_better=True),
}


@dataclass(frozen=True)
class Estimate:
    """A score with its uncertainty.

    Attributes:
        value: Over all pictures.
        deviation: Standard error, by the bootstrap over prompts; the interval is the value and 1.96 of it to
            either side. Resampled distances lie higher than the value (fewer different pictures), so their spread
            is used and not their quantiles.
        seeds: The score of each set of pictures with one seed a prompt, where there are several sets.
        resampled: The score of every resample, with shape (R,).
    """

    value: float
    deviation: float
    seeds: tuple[float, ...] = ()
    resampled: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)

    @property
    def interval(self) -> tuple[float, float]:
        return self.value - _Z * self.deviation, self.value + _Z * self.deviation

    @property
    def band(self) -> float:
        """From the lowest to the highest of the sets with one seed a prompt; 0 where there is one set."""
        return max(self.seeds) - min(self.seeds) if self.seeds else 0.0

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "value": self.value,
            "deviation": self.deviation,
            "low": low,
            "high": high,
            "seeds": list(self.seeds),
        }


@dataclass(frozen=True)
class Resampling:
    """The weights that one set of pictures is scored with.

    Attributes:
        weights: Shape (1 + R + S, N): ones, R resamples, and S sets with one seed a prompt.
        resamples: R.
    """

    weights: Tensor
    resamples: int

    @classmethod
    def of(
        cls, units: Sequence[int], resamples: int, seed: int, repeats: int = 1, device: torch.device | str = "cpu"
    ) -> "Resampling":
        """Weights for N pictures.

        Arguments:
            units: The prompt, by number, of every picture; all pictures of a prompt are drawn together.
            resamples: R.
            seed: Of the bootstrap. The same units and seed give the same weights.
            repeats: Pictures of every prompt, which follow each other.
            device: Where scores are computed.
        """
        weights = [torch.ones(1, len(units), dtype=torch.float64)]
        if resamples:
            weights.append(bootstrap_weights(units, resamples, seed).double())
        if repeats > 1:
            number = torch.arange(len(units)) % repeats
            weights.append(torch.stack([number == repeat for repeat in range(repeats)]).double())
        return cls(torch.cat(weights).to(device), resamples)

    def estimate(self, score: Weighted) -> Estimate:
        """The score with its uncertainty."""
        values = score(self.weights).double().cpu()
        resampled = values[1 : 1 + self.resamples]
        return Estimate(
            value=float(values[0]),
            deviation=float(resampled.std()) if self.resamples > 1 else 0.0,
            seeds=tuple(values[1 + self.resamples :].tolist()),
            resampled=resampled,
        )


@dataclass(frozen=True)
class Difference:
    """How two models differ in a score.

    Attributes:
        score: Its name.
        first: Name of a model.
        second: Name of another.
        difference: The second's value less the first's.
        deviation: Its standard error.
        band: The wider of the two models' bands from seed to seed.
    """

    score: str
    first: str
    second: str
    difference: float
    deviation: float
    band: float

    @property
    def real(self) -> bool:
        """Whether it is more than the 95 % interval and more than the band from seed to seed."""
        return abs(self.difference) > max(_Z * self.deviation, self.band)

    def to_dict(self) -> dict[str, Any]:
        names = ("score", "first", "second", "difference", "deviation", "band", "real")
        return {name: getattr(self, name) for name in names}


def differences(models: Mapping[str, Mapping[str, Estimate]], order: Sequence[str] = tuple(KINDS)) -> list[Difference]:
    """Of every two models in every score that both have; `order` names the scores."""
    found = []
    for (first, ours), (second, theirs) in combinations(models.items(), 2):
        for name in ours.keys() & theirs.keys():
            a, b = ours[name], theirs[name]
            spread = float((b.resampled - a.resampled).std()) if len(a.resampled) > 1 else 0.0
            found.append(Difference(name, first, second, b.value - a.value, spread, max(a.band, b.band)))
    return sorted(found, key=lambda item: order.index(item.score))


def frechet(rows: Rows, reference: Gaussian) -> Weighted:
    """Fréchet distance to the reference (arXiv 1706.08500)."""
    return lambda weights: frechet_distances(rows, reference, weights)


def kernel(rows: Rows, reference: Rows) -> Weighted:
    """Kernel distance to the reference (arXiv 1801.01401)."""
    return lambda weights: kernel_distances(rows, reference, weights)


def inception(logits: Rows) -> Weighted:
    """Inception Score (arXiv 1606.03498), over the splits of torch-fidelity; fewer than ten of fewer pictures."""
    splits, order = min(_SPLITS, len(logits)), torch_fidelity_order(len(logits))
    return lambda weights: inception_scores(logits, weights, splits, order)


def mean_of(values: Tensor) -> Weighted:
    """The mean of a value that every picture has."""
    return lambda weights: weighted_means(values.to(weights.device), weights)


def near(rows: Rows, reference: Rows, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """For every picture whether it lies among the real ones, and the other way round (arXiv 1904.06991)."""
    precise, recalled = precision_and_recall(rows, reference, device=device)
    return precise.double().cpu(), recalled.double().cpu()


def cosines(images: Rows, texts: Rows) -> Tensor:
    """Cosine similarity of every picture with its own caption, with shape (N,); their mean is the CLIP score."""
    found = [F.cosine_similarity(image, text, dim=-1) for image, text in _together(images, texts)]
    return torch.cat(found).double()


def retrieval_hits(images: Rows, captions: Sequence[str], pool: Mapping[str, Tensor], among: int) -> Tensor:
    r"""For every picture how often its own caption fits best among `among` captions; the mean is R@1.

    The others are drawn at random from the pool, and this is the mean over all draws: a picture that b of its M
    rivals in the pool beat or equal is a hit with probability $\binom{M - b}{k} / \binom{M}{k}$, k = `among` - 1.

    Arguments:
        images: Features with shape (N, D).
        captions: The N captions.
        pool: Features with shape (D,) by caption; holds at least `among` captions, all of `captions` with them.
        among: Number of captions to choose from.

    Returns:
        Probabilities with shape (N,).
    """
    numbers = {name: number for number, name in enumerate(pool)}
    features = F.normalize(torch.stack(list(pool.values())), dim=-1)
    rivals, drawn = len(pool) - 1, among - 1
    every = math.comb(rivals, drawn)
    hits = []
    for start in range(0, len(captions), _CHUNK):
        similar = F.normalize(_tensor(images[start : start + _CHUNK]), dim=-1) @ features.T
        own = torch.tensor([numbers[caption] for caption in captions[start : start + _CHUNK]])
        better = (similar >= similar.gather(1, own[:, None])).sum(dim=1) - 1  # its own caption is not a rival
        hits += [math.comb(rivals - int(count), drawn) / every for count in better]
    return torch.tensor(hits, dtype=torch.float64)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of features (N, D) and (M, D) at hand."""
    return _value(frechet(features, Gaussian.of(reference)), len(features))


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean cosine similarity of each picture (N, D) with its own caption (N, D)."""
    return float(cosines(images, texts).mean())


def retrieval_r1(images: Tensor, captions: Sequence[str], pool: Mapping[str, Tensor], among: int) -> float:
    """Share of pictures whose own caption fits best among `among`; see `retrieval_hits`."""
    return float(retrieval_hits(images, captions, pool, among).mean())


def _value(score: Weighted, count: int) -> float:
    return float(score(torch.ones(1, count, dtype=torch.float64))[0])


def _together(*rows: Rows) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, len(rows[0]), _CHUNK):
        yield tuple(_tensor(item[start : start + _CHUNK]) for item in rows)


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values).float()
