"""Scores of pictures, each with its uncertainty.

A score is a function of weights: how often every picture is counted. Ones give its value, the weights of
a bootstrap over prompts its standard error, and the pictures of one seed each the band from seed to seed.
Where its derivative by the weights is known, that stands for the resamples. Two models that drew the same
prompts from the same seeds are resampled together, so what their difference owes to the prompts cancels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    frechet_influences,
    inception_scores,
    kernel_distances,
    precision_and_recall,
    torch_fidelity_order,
    weighted_means,
)
from bksdm.options.evaluate import Intervals

OUTPUT_ERROR, LEFT, LEFT_UNSEEN = "output_error", "error_left", "error_left_unseen"
_CHUNK = 1024
_SPLITS = 10
_Z = 1.96  # standard errors to either side of a 95 % interval

Weighted = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Frechet:
    """Fréchet distance to the reference (arXiv 1706.08500), whose derivative by the weights is known.

    Attributes:
        rows: Features with shape (N, D).
        own: Their statistics.
        reference: Statistics of the real pictures.
    """

    rows: Rows
    own: Gaussian
    reference: Gaussian

    def __call__(self, weights: Tensor) -> Tensor:
        return frechet_distances(self.rows, self.reference, weights)

    def influences(self) -> tuple[Tensor, Tensor]:
        """The distance, and its derivative by every picture's weight, with shape (N,), where all weights are 1."""
        return frechet_influences(self.rows, self.own, self.reference)


@dataclass(frozen=True, eq=False)
class ErrorLeft:
    r"""What is left of the error that pruning made, the mean over L noise levels: $\frac{1}{L} \sum_l e_l / p_l$.

    $e_l$ and $p_l$ are the mean squared differences of a student's outputs, and of its own before any retraining, from
    the teacher's. The lowest noise levels have nearly all of the error, where little of a picture is decided; here
    each counts alike.

    Attributes:
        errors: The student's of every picture, with shape (N, L).
        lost: Those just after pruning, likewise; None for the teacher, of which nothing was pruned.
        levels: First and last timestep of each level.
    """

    errors: Tensor
    lost: Tensor | None
    levels: Sequence[tuple[float, float]]

    def __call__(self, weights: Tensor) -> Tensor:
        return self._by_level(weights).mean(dim=1)

    def to_rows(self) -> list[dict[str, Any]]:
        """One dictionary a level, the least noisy first."""
        left = self._by_level(torch.ones(1, len(self.errors), dtype=torch.float64))[0]
        rows: list[dict[str, Any]] = []
        for number, timesteps in enumerate(self.levels):
            row = {"timesteps": list(timesteps), "error": float(self.errors[:, number].mean())}
            row["pruned_error"] = None if self.lost is None else float(self.lost[:, number].mean())
            rows.append(row | {"left": float(left[number])})
        return rows

    def _by_level(self, weights: Tensor) -> Tensor:
        """With shape (R, L)."""
        errors = weights @ self.errors.to(weights)
        return errors if self.lost is None else errors / (weights @ self.lost.to(weights))


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
    OUTPUT_ERROR: Kind("output error", less_is_better=True),
    LEFT: Kind("error left", less_is_better=True),
    LEFT_UNSEEN: Kind("error left, unseen", less_is_better=True),
}


@dataclass(frozen=True, eq=False)
class Estimate:
    """A score with its uncertainty.

    Attributes:
        value: Over all pictures.
        parts: The standard error in parts, one a resample or one a prompt, whose squares add up to its own. What two
            models share cancels in the difference of theirs.
        seeds: The score of each set of pictures with one seed a prompt, where there are several sets.
        by: What gave the standard error.
    """

    value: float
    parts: Tensor
    seeds: tuple[float, ...] = ()
    by: Intervals = "bootstrap"

    @property
    def deviation(self) -> float:
        """Standard error over prompts; the interval is the value and 1.96 of it to either side."""
        return float(self.parts.norm())

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
            "by": self.by,
        }


@dataclass(frozen=True)
class Resampling:
    """The weights that one set of pictures is scored with.

    Attributes:
        weights: Shape (1 + R + S, N): ones, R resamples, and S sets with one seed a prompt.
        resamples: R.
        units: The prompt, by number from 0, of every picture, with shape (N,).
    """

    weights: Tensor
    resamples: int
    units: Tensor

    @classmethod
    def of(
        cls, units: Sequence[int], resamples: int, seed: int, repeats: int = 1, device: torch.device | str = "cpu"
    ) -> "Resampling":
        """Weights for N pictures.

        Arguments:
            units: The prompt, by number from 0, of every picture; all pictures of a prompt are drawn together.
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
        return cls(torch.cat(weights).to(device), resamples, torch.tensor(units, device=device))

    def estimate(self, score: Weighted) -> Estimate:
        """The score with its uncertainty by the bootstrap.

        Resampled distances lie higher than the value (fewer different pictures), so their spread is used and not
        their quantiles.
        """
        values = score(self.weights).double().cpu()
        resampled = values[1 : 1 + self.resamples]
        apart = resampled - resampled.mean()
        return Estimate(
            value=float(values[0]),
            parts=apart / (self.resamples - 1) ** 0.5 if self.resamples > 1 else torch.zeros(1),
            seeds=tuple(values[1 + self.resamples :].tolist()),
        )

    def by_influence(self, score: Frechet) -> Estimate:
        """The score with its uncertainty by the infinitesimal jackknife: the bootstrap's of its linear part, exactly.

        Counts of the U prompts that a bootstrap draws have the covariance 1 - 1 / U on the diagonal and -1 / U beside
        it, so the variance is the sum of the squares of the prompts' derivatives, from their mean. Source: Efron, The
        Jackknife, the Bootstrap and Other Resampling Plans, 1982, chapter 6.
        """
        value, influences = score.influences()
        prompts = influences.new_zeros(int(self.units.max()) + 1).index_add(0, self.units, influences)
        sets = self.weights[1 + self.resamples :]
        return Estimate(
            value=float(value),
            parts=(prompts - prompts.mean()).cpu(),
            seeds=tuple(score(sets).tolist()) if len(sets) else (),
            by="influence",
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
            found.append(Difference(name, first, second, b.value - a.value, _between(a, b), max(a.band, b.band)))
    return sorted(found, key=lambda item: order.index(item.score))


def _between(a: Estimate, b: Estimate) -> float:
    """Standard error of the difference; models with other numbers of prompts share none."""
    if len(a.parts) != len(b.parts):
        return math.hypot(a.deviation, b.deviation)
    return float((b.parts - a.parts).norm())


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
    return float(frechet_distances(features, Gaussian.of(reference), torch.ones(1, len(features))))


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean cosine similarity of each picture (N, D) with its own caption (N, D)."""
    return float(cosines(images, texts).mean())


def retrieval_r1(images: Tensor, captions: Sequence[str], pool: Mapping[str, Tensor], among: int) -> float:
    """Share of pictures whose own caption fits best among `among`; see `retrieval_hits`."""
    return float(retrieval_hits(images, captions, pool, among).mean())


def _together(*rows: Rows) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, len(rows[0]), _CHUNK):
        yield tuple(_tensor(item[start : start + _CHUNK]) for item in rows)


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values).float()
