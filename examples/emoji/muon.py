"""Muon for the matrices of a transformer's blocks, AdamW for all else."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.AdamW):
    """Steps along the nearest orthogonal matrix to the momentum of each matrix (K. Jordan, 2024).

    A step is as long as one of AdamW at the same rate: 0.2 times the square root of the longer side (arXiv 2502.16982).

    Arguments:
        matrices: What is stepped so, each with shape (N, M).
        others: What AdamW steps.
        momentum: Of the matrices.
        options: Of AdamW.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter], momentum: float = 0.95, **options: Any
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "momentum": momentum},
            {"params": list(others), "momentum": None},
        ]
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        groups = self.param_groups
        for group in groups:
            if group["momentum"] is not None:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._turn(weight, group)
        self.param_groups = [group for group in groups if group["momentum"] is None]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _turn(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        assert weight.grad is not None
        self.state[weight].setdefault("step", torch.zeros(()))  # which AdamW looks for when a state is loaded
        held = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        held.lerp_(weight.grad, 1 - group["momentum"])
        ahead = weight.grad.lerp(held, group["momentum"])  # Nesterov's
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(orthogonal(ahead), alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Near the orthogonal matrix that is nearest to `matrix`, with shape (N, M), by Newton and Schulz's iteration."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    a, b, c = _COEFFICIENTS
    found: Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        square = found @ found.T
        found = a * found + (b * square + c * square @ square) @ found
    return found if wide is matrix else found.T
