r"""The change of linear operations that brings what follows from them closest to what it should be.

A linear layer gives $W x + b$ and a convolution the same of patches $x$. With $\hat{x} = (x, 1)$, of a residual $r$
and a ridge $\lambda$ towards the weights that are there, the change

$$\Delta = \arg\min_\Delta \sum_n \| r_n - J_n \Delta \hat{x}_n \|^2 + \lambda \| \Delta_W \|^2$$

solves the normal equations. Where what is given is only added to, $J = 1$, they are

$$\Delta \, (\sum_n \hat{x}_n \hat{x}_n^T + \lambda I_W) = \sum_n r_n \hat{x}_n^T$$

and exact. Where a gate or a norm follows, every channel c would have a matrix of its own. There squares of $J$, which
are channel by channel, are taken as $w_n \beta_c$, so that one matrix serves all, $\sum_n w_n \hat{x}_n \hat{x}_n^T$,
with the right side $\sum_n J_n^T r_n \hat{x}_n^T / \beta$: a step downhill, whose best length is measured.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bksdm.common.errors import InputError

Operation: TypeAlias = nn.Linear | nn.Conv2d
_AT_ONCE = 2**26  # numbers of patches, 256 MB in float32
_BLOCKS = 4  # to a side of a symmetric product, of which those above the diagonal are not computed


Change: TypeAlias = dict[str, Tensor]  # what is added to the weight, and to the bias where that changes; in float64


class NormalEquations:
    """Sums over samples, of which the change of operations follows whose results are added up.

    Products are in float32 and their sums in float64.

    Arguments:
        operations: Linear layers or convolutions; of their biases, the first one's alone changes.

    Attributes:
        exact: Whether all that was taken in is only added to, so that the change is the solution.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = operations
        self._has_bias = operations[0].bias is not None
        self.exact = True
        weight, channels = operations[0].weight, len(operations[0].weight)
        self._gram, self._right, self._gains, self._weight = (
            weight.new_zeros(shape, dtype=torch.float64)
            for shape in ((self._width, self._width), (channels, self._width), (channels,), ())
        )

    def add(self, inputs: Sequence[Tensor], gradient: Tensor, gains: Tensor) -> None:
        r"""Take in some samples.

        Arguments:
            inputs: What each operation takes, (B, C, h, w) of a convolution, (..., C) of a linear layer.
            gradient: $J^T r$ with the shape of what the operations give.
            gains: Squares of $J$ by place and channel, likewise.
        """
        self.exact &= bool((gains == 1).all())
        for part in _parts(len(gradient), self._width * gradient[0].numel() // _channels(gradient)):
            rows = [patches(operation, own[part]) for operation, own in zip(self._operations, inputs, strict=True)]
            if self._has_bias:
                rows.append(rows[0].new_ones(len(rows[0]), 1))
            self._take(torch.cat(rows, dim=1), flat(gradient[part]), flat(gains[part]))

    @property
    def _width(self) -> int:
        return sum(operation.weight[0].numel() for operation in self._operations) + self._has_bias

    def _take(self, rows: Tensor, gradient: Tensor, gains: Tensor) -> None:
        weight = gains.mean(dim=1)
        self._right += gradient.T @ rows
        self._gains += gains.sum(dim=0)
        self._weight += weight.sum()
        _add_lower(self._gram, rows * weight.sqrt()[:, None])

    def changes(self, ridge: float) -> list[Change]:
        """The change of each operation; to be asked for once.

        Arguments:
            ridge: The lambda, as a share of the mean square of the inputs over all places.

        Raises:
            InputError: The ridge is too small for so few samples.
        """
        tiny = torch.finfo(self._gram.dtype).tiny
        by_channel = (self._gains / self._weight.clamp_min(tiny)).clamp_min(tiny)
        weights = self._gram.diagonal()[: self._width - self._has_bias]
        weights += ridge * weights.mean()
        root, failed = torch.linalg.cholesky_ex(self._gram)  # which reads the lower half
        if failed:
            raise InputError(
                f"ridge is {ridge}, with which the least squares of a layer have no one solution; give more of it, or "
                f"more --repair_pictures"
            )
        return list(self._split(torch.cholesky_solve((self._right / by_channel[:, None]).T, root).T))

    def _split(self, change: Tensor) -> Iterator[Change]:
        at = 0
        for operation in self._operations:
            size = operation.weight[0].numel()
            own = change[:, at : at + size].reshape(operation.weight.shape)
            yield {"weight": own} | ({"bias": change[:, -1]} if self._has_bias and not at else {})
            at += size


class Scales:
    r"""The same of a norm's weight, $w \odot n(x)$: a channel by itself, so that $\Delta_c$ is a quotient of two sums.

    Arguments:
        operations: The norm alone.
    """

    def __init__(self, operations: Sequence[nn.Module]) -> None:
        (self._norm,) = operations
        self._sums: list[Tensor] = []
        self.exact = True

    def add(self, inputs: Sequence[Tensor], gradient: Tensor, gains: Tensor) -> None:
        """See `NormalEquations.add`."""
        weight: Any = self._norm.weight
        normed = flat(self._norm(inputs[0])) / torch.where(weight == 0, 1, weight)
        sums = [flat(gradient) * normed, flat(gains) * normed.square()]
        sums = [one.double().sum(dim=0) for one in sums]
        self._sums = [total + more for total, more in zip(self._sums, sums, strict=True)] if self._sums else sums

    def changes(self, ridge: float) -> list[Change]:
        """See `NormalEquations.changes`."""
        right, squares = self._sums
        return [{"weight": right / (squares + ridge * squares.mean()).clamp_min(torch.finfo(squares.dtype).tiny)}]


def patches(operation: Operation, given: Tensor) -> Tensor:
    """What an operation multiplies its weight by, (places, numbers in a row of the weight), from what it takes."""
    if isinstance(operation, nn.Linear):
        return given.reshape(-1, given.shape[-1])
    padding: Any = operation.padding
    return (
        F.unfold(given, operation.kernel_size, padding=padding, stride=operation.stride).transpose(1, 2).flatten(0, 1)
    )


def flat(given: Tensor) -> Tensor:
    """What operations give, (B, C, h, w) or (..., C), as (places, C)."""
    return given.movedim(1, -1).flatten(0, -2) if given.dim() == 4 else given.reshape(-1, given.shape[-1])


def _channels(given: Tensor) -> int:
    return given.shape[1 if given.dim() == 4 else -1]


def _parts(count: int, numbers: int) -> Iterator[slice]:
    """Samples in parts that do not take too much memory, of which each makes so many numbers."""
    size = max(1, _AT_ONCE // max(1, numbers))
    yield from (slice(at, at + size) for at in range(0, count, size))


def _add_lower(total: Tensor, rows: Tensor) -> None:
    """Add the product of the transpose of rows (N, D) with them to the lower half of what there is, (D, D)."""
    step = -(-len(total) // _BLOCKS)
    for at in range(0, len(total), step):
        total[at:, at : at + step] += rows[:, at:].T @ rows[:, at : at + step]
