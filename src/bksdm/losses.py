r"""The losses of retraining (BK-SDM, arXiv 2305.15798, section 3.2), in float32.

$L = \lambda_{task} L_{task} + \lambda_{out} L_{outKD} + \lambda_{feat} L_{featKD}$
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three terms; the paper has 1 for each."""

    task: float = 1.0
    output_kd: float = 1.0
    feature_kd: float = 1.0


def task_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error to the noise or the velocity (eq. 1); tensors with shape (B, C, H, W)."""
    return F.mse_loss(predicted.float(), target.float())


def output_kd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error to the teacher's output (eq. 2); tensors with shape (B, C, H, W)."""
    return F.mse_loss(student.float(), teacher.detach().float())


def feature_kd_losses(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean squared error of every tap (eq. 3, whose sum over taps is the term); both mappings in the same order."""
    return {
        name: F.mse_loss(feature.float(), wanted.detach().float())
        for (name, feature), wanted in zip(student.items(), teacher.values(), strict=True)
    }
