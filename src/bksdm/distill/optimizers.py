"""What steps the weights that learn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bksdm.options.shared import Optimizer


def optimizer_of(model: nn.Module, name: Optimizer, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """One for all parameters of a model.

    Arguments:
        model: The model.
        name: AdamW, or `Muon` for the matrices among them.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """
    if name == "muon":
        turned = matrices(model)
        known = set(turned)
        return Muon(turned, [weight for weight in model.parameters() if weight not in known], lr, weight_decay)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def moments(model: nn.Module, name: Optimizer) -> int:
    """Numbers that an optimizer keeps of a model: two a weight in AdamW, one a weight of a matrix in Muon."""
    count = 2 * sum(weight.numel() for weight in model.parameters())
    return count - sum(weight.numel() for weight in matrices(model)) if name == "muon" else count


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What of a model has two sides longer than 1: weights of linear layers, and the factors of a LoRA."""
    return [weight for weight in model.parameters() if weight.ndim == 2 and min(weight.shape) > 1]


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024) for some matrices, AdamW for all else.

    A step of a matrix is along the nearest orthogonal matrix to its momentum, and as long as one of AdamW at the same
    rate: 0.2 times the root of the longer side (arXiv 2502.16982, eq. 4). Both are torch's own; they share the groups
    and the state of this one, which is therefore kept and restored as that of any optimizer.

    Arguments:
        turned: What Muon steps, each with shape (N, M).
        others: What AdamW steps; neither is empty.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self, turned: Sequence[nn.Parameter], others: Sequence[nn.Parameter], lr: float, weight_decay: float
    ) -> None:
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(turned, lr, weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr, weight_decay=weight_decay, fused=True),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self._parts:
            part.step()

    def _share(self) -> None:
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
