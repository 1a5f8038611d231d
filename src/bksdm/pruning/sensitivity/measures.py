r"""What a teacher loses without a unit, measured on its outputs, its final latents and its pictures.

- output loss, $E_{x, t, c} \| \epsilon_{-u} - \epsilon \|^2$, as a mean over elements (LAPTOP-Diff, arXiv 2404.11098);
- shift of the final latents, $\| \mu - \mu_{-u} \|_2 + \| \sigma - \sigma_{-u} \|_2$, where mean and standard deviation
  of every element are over the pictures (LD-Pruner, arXiv 2404.11936);
- rise of the Frechet distance and fall of the CLIP score (BK-SDM, arXiv 2305.15798, section 3.1).

Both networks meet the same noise, timesteps, captions and seeds, so standard errors are those of paired samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bksdm.common.randomness import generator
from bksdm.evaluate.scores import clip_score, frechet_distance

_RESAMPLES = 100


@dataclass(frozen=True)
class Score:
    """What a unit is worth, and the standard error of that: more is worse to lose."""

    value: float
    error: float


def output_loss(without: Tensor, whole: Tensor) -> Score:
    """Mean squared difference of outputs with shape (N, C, h, w)."""
    return _mean((without.float() - whole.float()).square().flatten(1).mean(dim=1))


def latent_shift(without: Tensor, whole: Tensor) -> Score:
    """How far mean and standard deviation over the pictures have moved, of final latents with shape (N, C, h, w)."""
    without, whole = without.float().flatten(1), whole.float().flatten(1)

    def shift(rows: Tensor) -> float:
        (std, mean), (whole_std, whole_mean) = (torch.std_mean(latents[rows], dim=0) for latents in (without, whole))
        return float((mean - whole_mean).norm() + (std - whole_std).norm())

    return Score(shift(torch.arange(len(whole))), _spread(shift, len(whole)))


def frechet_rise(without: Tensor, whole: Tensor, reference: Tensor) -> Score:
    """How much farther features with shape (N, D) are from those of real pictures (M, D)."""
    features = without.double(), whole.double()
    real = _moments(reference.double())

    def rise(rows: Tensor) -> float:
        there, here = (_frechet(_moments(given[rows]), real) for given in features)
        return there - here

    value = frechet_distance(without, reference) - frechet_distance(whole, reference)
    return Score(value, _spread(rise, len(whole)))


def clip_fall(without: Tensor, whole: Tensor, texts: Tensor) -> Score:
    """How much less pictures with features (N, D) agree with their captions (N, D)."""
    value = clip_score(whole, texts) - clip_score(without, texts)
    falls = F.cosine_similarity(whole, texts) - F.cosine_similarity(without, texts)
    return Score(value, _mean(falls).error)


def _mean(values: Tensor) -> Score:
    values = values.double()
    return Score(float(values.mean()), float(values.std() / len(values) ** 0.5))


def _spread(statistic: Callable[[Tensor], float], count: int) -> float:
    """Standard error by the bootstrap: `statistic` of rows drawn with replacement, the same for every unit."""
    draws = [
        torch.randint(count, (count,), generator=generator(0, "bootstrap", number)) for number in range(_RESAMPLES)
    ]
    return float(torch.tensor([statistic(rows) for rows in draws], dtype=torch.float64).std())


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean with shape (D,) and R with shape (min(N, D), D) where $\Sigma = R^T R$, of features (N, D)."""
    mean = features.mean(dim=0)
    return mean, torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R


def _frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    r"""The distance by the nuclear norm, $tr (\Sigma \Sigma')^{1/2} = \| R R'^T \|_*$: quick where pictures are few."""
    (mean, root), (other_mean, other_root) = a, b
    shared = torch.linalg.matrix_norm(root @ other_root.T, ord="nuc")
    return float((mean - other_mean).square().sum() + root.square().sum() + other_root.square().sum() - 2 * shared)
