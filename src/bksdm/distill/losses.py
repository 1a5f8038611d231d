r"""The losses of retraining (BK-SDM, arXiv 2305.15798, section 3.2), in float32.

$L = \lambda_{task} L_{task} + \lambda_{out} L_{outKD} + \lambda_{feat} L_{featKD}$

Whatever is left out or weighed is so for each sample by itself, so that losses do not depend on how samples are split
into batches and over processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST = 1e-12  # mean square of a feature that counts as nothing


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three terms; the paper has 1 for each."""

    task: float = 1.0
    output_kd: float = 1.0
    feature_kd: float = 1.0


def task_loss(predicted: Tensor, target: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Mean squared error to the noise or the velocity (eq. 1); tensors with shape (B, C, H, W).

    The samples that `left_out`, booleans with shape (B,), names count as zeros in the mean.
    """
    if left_out is None:
        return F.mse_loss(predicted.float(), target.float())
    errors = F.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
    return errors.masked_fill(left_out, 0).mean()


def output_kd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error to the teacher's output (eq. 2); tensors with shape (B, C, H, W)."""
    return F.mse_loss(student.float(), teacher.detach().float())


def pseudo_huber(student: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    r"""Mean of $\sqrt{d^2 + c^2} - c$ for differences d: square near zero, absolute beyond c (arXiv 2310.14189).

    Arguments:
        student, target: With shape (B, C, H, W).
        c: Where one becomes the other.
    """
    difference = student.float() - target.detach().float()
    return ((difference.square() + c * c).sqrt() - c).mean()


def guided(outputs: Tensor, scale: float) -> Tensor:
    r"""Classifier-free guidance, $\epsilon_\emptyset + g\,(\epsilon_c - \epsilon_\emptyset)$ (arXiv 2207.12598).

    Arguments:
        outputs: Answers to B captions, then to the empty prompt on the same latents, with shape (2 B, C, H, W).
        scale: g.

    Returns:
        Float32 with shape (B, C, H, W).
    """
    captioned, empty = outputs.float().chunk(2)
    return empty + scale * (captioned - empty)


def feature_kd_losses(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    *,
    normalize: bool = False,
    mask: float | None = None,
    directions: bool = False,
) -> dict[str, Tensor]:
    r"""Mean squared error of every tap (eq. 3, whose sum over taps is the term); both mappings in the same order.

    Arguments:
        student: Features with shape (B, ...) by path.
        teacher: What they should be.
        normalize: Whether a sample's error is divided by the mean square of the teacher's feature,
            $\|f_T - f_S\|^2 / \|f_T\|^2$, so that no tap dominates (after LAPTOP-Diff, arXiv 2404.11098).
        mask: Elements where the teacher's feature is more than this many standard deviations from its mean, both taken
            over a sample, are left out of all means (after TinyFusion, arXiv 2412.01199, which has 2); None for none.
        directions: Whether only the direction of every token or pixel counts: both are divided by their length, and
            squares are summed over channels (after PPCL, arXiv 2511.16156). It goes with neither of the others.
    """
    pairs = zip(student.items(), teacher.values(), strict=True)
    if directions:
        return {name: direction_error(feature.float(), wanted.detach().float()) for (name, feature), wanted in pairs}
    return {
        name: _feature_error(feature.float(), wanted.detach().float(), normalize, mask)
        for (name, feature), wanted in pairs
    }


def direction_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of unit vectors, 0 to 4, as a mean over tokens (B, L, C) or pixels (B, C, H, W)."""
    channels = 1 if student.ndim == 4 else -1
    difference = F.normalize(student, dim=channels) - F.normalize(teacher, dim=channels)
    return difference.square().sum(dim=channels).mean()


def _feature_error(student: Tensor, teacher: Tensor, normalize: bool, mask: float | None) -> Tensor:
    if not normalize and mask is None:
        return F.mse_loss(student, teacher)
    student, teacher = student.flatten(1), teacher.flatten(1)
    squares, scale = (student - teacher).square(), teacher.square()
    if mask is not None:
        stays = _within(teacher, mask)
        squares, scale = (_mean_of(values, stays) for values in (squares, scale))
    else:
        squares, scale = squares.mean(dim=1), scale.mean(dim=1)
    return (squares / scale.clamp(min=_SMALLEST) if normalize else squares).mean()


def _within(values: Tensor, deviations: float) -> Tensor:
    """Which elements of each row lie within so many of its standard deviations from its mean."""
    distance = values - values.mean(dim=1, keepdim=True)
    return distance.abs() <= deviations * distance.square().mean(dim=1, keepdim=True).sqrt()


def _mean_of(values: Tensor, stays: Tensor) -> Tensor:
    """Mean of the elements of each row that stay."""
    return torch.where(stays, values, 0).sum(dim=1) / stays.sum(dim=1).clamp(min=1)


def edge_loss(student: Tensor, teacher: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels, over a pyramid of halved pictures.

    An absolute error of pixels alone leaves edges soft, which are few; here nothing but edges counts.

    Arguments:
        student, teacher: Pictures with shape (B, C, H, W).
        scales: Levels of the pyramid: as they are, halved, halved again, and so on.
    """
    error, found = student.float() - teacher.detach().float(), []
    for scale in range(scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        found += [error.diff(dim=dim).abs().mean() for dim in (-2, -1)]
    return torch.stack(found).mean()
