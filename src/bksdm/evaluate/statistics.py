r"""Scores of sets of pictures, with their uncertainty.

Every score takes weights $w$ with shape (R, N), how often each of the N pictures counts, and returns R values: ones
give the score itself, rows of `bootstrap_weights` what it would have been for other prompts. Features are read in
blocks and never held whole, unless they are fewer than D, and everything is computed in float64, where the weights are.
"""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.common.randomness import generator
from bksdm.common.runs import replace_file

_BLOCK = 2048  # rows in memory at once: 32 MiB of Inception's features


class Rows(Protocol):
    """N rows of D numbers, such as an array, a tensor, or an array mapped from a file.

    A slice of them is an array or a tensor with shape (n, D), of any number format.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Gaussian:
    """What the Fréchet distance knows of a set of pictures.

    Attributes:
        mean: Mean of the features, with shape (D,), float64.
        covariance: Their covariance, with shape (D, D), float64.
        count: How many pictures it is of, where that is known.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @classmethod
    def of(cls, rows: Rows, weights_row: Tensor | None = None) -> "Gaussian":
        """The mean and the covariance (divisor sum of weights - 1) of N rows, each counted as often as its weight.

        The rows are read twice, so that the covariance is of differences to the mean and loses no digits.

        Arguments:
            rows: Features with shape (N, D).
            weights_row: Weights with shape (N,); ones by default.

        Raises:
            InputError: There are fewer than two pictures, or a feature is not finite.
        """
        row = torch.ones(len(rows)) if weights_row is None else weights_row
        row = _checked(row[None], len(rows))[0]
        total, mean = _total_and_mean(rows, row)
        apart = ((block - mean, weight) for block, weight in _drawn_blocks(rows, row))
        scatter = _sum(block.T @ (block * weight[:, None]) for block, weight in apart)
        return cls(mean, scatter / (total - 1), round(float(total)))

    def save(self, path: Path) -> None:
        """Write pytorch-fid's .npz: arrays `mu` and `sigma`, and `count` where it is known."""
        arrays: dict[str, Any] = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy()}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        with replace_file(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Gaussian":
        """Read a .npz with `mu` and `sigma`, such as pytorch-fid writes.

        Raises:
            InputError: There is no such file, or it holds something else.
        """
        arrays = _read_npz(Path(path))
        for name in ("mu", "sigma"):
            if name not in arrays:
                raise InputError(f"{path} has no array {name}; give statistics as pytorch-fid --save-stats writes them")
        mean, covariance = arrays["mu"], arrays["sigma"]
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise InputError(
                f"{path} holds mu with shape {mean.shape} and sigma with shape {covariance.shape}; "
                f"(D,) and (D, D) are statistics"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise InputError(f"{path} holds numbers that are not finite; compute the statistics again")
        if not np.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-8):
            raise InputError(f"{path} holds a sigma that is not symmetric, so no covariance; compute it again")
        count = int(arrays["count"]) if "count" in arrays and arrays["count"].shape == () else None
        return cls(torch.from_numpy(mean), torch.from_numpy(covariance), count)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance, with shape (D, D)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return root

    def distance(self, other: "Gaussian") -> Tensor:
        r"""The Fréchet distance $|\mu - \mu'|^2 + tr(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2})$, a scalar.

        The trace of the root is the sum of the roots of the eigenvalues of $\Sigma'^{1/2} \Sigma \Sigma'^{1/2}$,
        which is symmetric; $\Sigma'^{1/2}$ is computed once for `other`. Source: arXiv 1706.08500, eq. 6.

        Raises:
            InputError: The two are of another feature size.
        """
        _check_size(len(self.mean), len(other.mean))
        root = other.root.to(self.mean.device)
        eigenvalues: Tensor = torch.linalg.eigvalsh(root @ self.covariance @ root)
        return _distance(self.mean, self.covariance.trace(), other, _roots(eigenvalues))


def frechet_distances(rows: Rows, reference: Gaussian, weights: Tensor) -> Tensor:
    """The Fréchet distance of weighted rows to a reference; see `Gaussian.distance`.

    A resample has fewer different pictures than the set, so its distance is larger on average: take from resamples
    their spread and not their percentiles (`docs/decisions/0009-scores-take-weights.md`).

    Fewer pictures than features span no more than themselves, and the eigenvalues are those of a matrix with a row a
    picture in place of a row a feature.

    Arguments:
        rows: Features with shape (N, D).
        reference: Statistics of the real pictures.
        weights: With shape (R, N).

    Returns:
        Distances with shape (R,).

    Raises:
        InputError: The reference is of another feature size, or fewer than two pictures count.
    """
    weights = _checked(weights, len(rows))
    _check_size(_size(rows), len(reference.mean))
    return torch.stack([_frechet_distance(rows, reference, row) for row in weights])


def frechet_influences(rows: Rows, own: Gaussian, reference: Gaussian) -> tuple[Tensor, Tensor]:
    r"""The Fréchet distance of N rows to a reference, and its derivative by the weight of every row, where all are 1.

    With $u_i = x_i - \mu$ and the matrix $A$ that carries the one Gaussian to the other,
    $A = \Sigma'^{1/2} (\Sigma'^{1/2} \Sigma \Sigma'^{1/2})^{-1/2} \Sigma'^{1/2}$,

    $$ \frac{\partial d}{\partial w_i} = \frac{2 (\mu - \mu') \cdot u_i}{N}
       + \frac{|u_i|^2 - u_i^T A u_i - tr(\Sigma - A \Sigma)}{N - 1} $$

    A singular root is inverted on its support, which other weights of the same pictures leave as it is; so the
    derivative exists for fewer pictures than features too. Source of $A$: Olkin and Pukelsheim, 1982.

    Arguments:
        rows: Features with shape (N, D).
        own: Their statistics.
        reference: Statistics of the real pictures.

    Returns:
        The distance, a scalar, and derivatives with shape (N,).

    Raises:
        InputError: The reference is of another feature size.
    """
    _check_size(len(own.mean), len(reference.mean))
    roots, carrier = _carrier(rows, own, reference)
    trace, shift = own.covariance.trace(), own.mean - reference.mean.to(own.mean.device)
    found = []
    for _, block in _blocks(rows, own.mean.device):
        apart = block - own.mean
        stretch = apart.square().sum(dim=1) - (apart @ carrier).square().sum(dim=1) - (trace - roots.sum())
        found.append(2 * apart @ shift / len(rows) + stretch / (len(rows) - 1))
    return _distance(own.mean, trace, reference, roots), torch.cat(found)


def kernel_distances(rows: Rows, reference_rows: Rows, weights: Tensor) -> Tensor:
    r"""The kernel distance (KID): the squared MMD for the kernel $k(x, y) = (x \cdot y / D + 1)^3$, unbiased.

    $$ \frac{\sum_{i \ne j} w_i w_j k(x_i, x_j)}{\sum_{i \ne j} w_i w_j}
       + \frac{\sum_{i \ne j} k(y_i, y_j)}{M (M - 1)} - 2 \frac{\sum_{i, j} w_i k(x_i, y_j)}{M \sum_i w_i} $$

    It takes all pairs at once. Published values are means over random subsets of (usually) 1000 pictures, which
    have the same expectation and a draw of their own. A picture makes no pair with itself, however often it is
    drawn: else resampling would add to the distance. Source: arXiv 1801.01401, eq. 4.

    Arguments:
        rows: Features with shape (N, D).
        reference_rows: Features of real pictures, with shape (M, D).
        weights: With shape (R, N).

    Returns:
        Distances with shape (R,).

    Raises:
        InputError: The feature sizes differ, or there are fewer than two pictures on a side.
    """
    weights = _checked(weights, len(rows))
    _check_size(_size(rows), _size(reference_rows))
    real = torch.ones(1, len(reference_rows), dtype=torch.float64, device=weights.device)
    within = _mean_kernel_within(rows, weights) + _mean_kernel_within(reference_rows, real)
    return within - 2 * _mean_kernel_across(rows, reference_rows, weights)


def inception_scores(
    logits_rows: Rows, weights: Tensor, splits: int = 10, order: Sequence[int] | None = None
) -> Tensor:
    r"""The Inception Score: the mean over splits of $\exp(E_x KL(p(y|x) \| p(y)))$, with $p(y)$ of the split.

    A split of which no picture counts is left out of the mean. Source: arXiv 1606.03498.

    Arguments:
        logits_rows: Logits without the bias, as torch-fidelity takes them, with shape (N, C).
        weights: With shape (R, N).
        splits: How many, each of pictures in a row; the score depends on it.
        order: Numbers of the N pictures in the order in which they are split; as they come by default.
            torch-fidelity shuffles: see `torch_fidelity_order`.

    Returns:
        Scores with shape (R,), from 1 to C.

    Raises:
        InputError: There are fewer pictures than splits.
    """
    count = len(logits_rows)
    weights = _checked(weights, count)
    if not 1 <= splits <= count:
        raise InputError(f"{count} pictures cannot be in {splits} splits; choose from 1 to {count}")
    split_of = _split_of(count, splits, order).to(weights.device)
    totals = torch.stack([weights[:, split_of == split].sum(dim=1) for split in range(splits)])  # (splits, R)
    certainty = torch.zeros_like(totals)  # sums of w p log p
    marginal = totals.new_zeros(*totals.shape, _size(logits_rows))  # sums of w p, with shape (splits, R, C)
    for where, logits in _blocks(logits_rows, weights.device):
        log_p = logits.log_softmax(dim=1)
        p = log_p.exp()
        negentropy = (p * log_p).sum(dim=1)
        for split in range(splits):
            members = split_of[where] == split
            drawn = weights[:, where][:, members]
            certainty[split] += drawn @ negentropy[members]
            marginal[split] += drawn @ p[members]
    q = marginal / totals[..., None]
    scores = (certainty / totals - torch.xlogy(q, q).sum(dim=-1)).exp()
    return scores.nanmean(dim=0)


def torch_fidelity_order(count: int) -> list[int]:
    """The order in which torch-fidelity splits `count` pictures, sorted by file name, by its defaults."""
    shuffled: list[int] = np.random.RandomState(2020).permutation(count).tolist()
    return shuffled


def weighted_means(values: Tensor, weights: Tensor) -> Tensor:
    """Means with shape (R,) of a value for each picture, with shape (N,) and of any number format.

    Arguments:
        values: Such as the similarity of each picture with its caption, or an indicator of `precision_and_recall`.
        weights: With shape (R, N).
    """
    weights = _checked(weights, len(values))
    return weights @ values.to(weights) / weights.sum(dim=1)


def precision_and_recall(
    rows: Rows, reference_rows: Rows, k: int = 3, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Which generated pictures lie where real ones do, and which real ones where generated ones do.

    A set lies within the balls around its members that reach to their k-th nearest neighbour in the set. Precision
    is the mean of the first result, recall that of the second. Source: arXiv 1904.06991.

    Arguments:
        rows: Features of generated pictures, with shape (N, D).
        reference_rows: Features of real pictures, with shape (M, D).
        k: The neighbour that gives the radius.
        device: Where to compute.

    Returns:
        Booleans with shapes (N,) and (M,), on `device`.

    Raises:
        InputError: The feature sizes differ, or a set has no k-th neighbours.
    """
    _check_size(_size(rows), _size(reference_rows))
    if not 1 <= k < min(len(rows), len(reference_rows)):
        raise InputError(
            f"k {k} wants sets of more than {max(k, 1)} pictures, and these have {len(rows)} and "
            f"{len(reference_rows)}; give more pictures, or leave precision and recall out of the scores"
        )
    device = torch.device(device)
    radii, reference_radii = (_squared_radii(of, k, device) for of in (rows, reference_rows))
    precise = torch.zeros(len(rows), dtype=torch.bool, device=device)
    recalled = torch.zeros(len(reference_rows), dtype=torch.bool, device=device)
    for here, block in _blocks(rows, device):
        for there, real in _blocks(reference_rows, device):
            squared = _squared_distances(block, real)
            precise[here] |= (squared <= reference_radii[there]).any(dim=1)
            recalled[there] |= (squared <= radii[here, None]).any(dim=0)
    return precise, recalled


def bootstrap_weights(units: Sequence[int], resamples: int, seed: int) -> Tensor:
    """How often each picture is drawn when whole units are drawn with replacement, as many as there are.

    Pictures of one prompt depend on one another, so the prompt is the unit. Resample r is a function of the seed
    and r alone, whatever else was drawn.

    Arguments:
        units: The unit (number of the prompt) of each of N pictures.
        resamples: R.
        seed: Another seed, other draws.

    Returns:
        Weights with shape (R, N), float64.

    Raises:
        InputError: There is no picture, or fewer than one resample is asked for.
    """
    if len(units) == 0 or resamples < 1:
        raise InputError(f"{resamples} resamples of {len(units)} pictures are none; give one or more of both")
    names, unit_of = np.unique(np.asarray(units), return_inverse=True)
    weights = torch.empty(resamples, len(units), dtype=torch.float64)
    for resample in range(resamples):
        drawn = torch.randint(len(names), (len(names),), generator=generator(seed, "bootstrap", resample))
        weights[resample] = torch.bincount(drawn, minlength=len(names))[torch.from_numpy(unit_of)]
    return weights


def _checked(weights: Tensor, count: int) -> Tensor:
    """Weights in float64.

    Raises:
        InputError: They do not fit the pictures, are negative, or a row of them is zero.
    """
    if count == 0:
        raise InputError("there are no pictures to score; give two or more")
    if weights.ndim != 2 or weights.shape[1] != count:
        raise InputError(f"weights with shape {tuple(weights.shape)} do not fit {count} pictures; give (R, {count})")
    weights = weights.double()
    if not (bool((weights >= 0).all()) and bool((weights.sum(dim=1) > 0).all())):
        raise InputError("weights count pictures: none below zero or not a number, not all zero in a row")
    return weights


def _size(rows: Rows) -> int:
    """D of rows with shape (N, D)."""
    return int(rows[:1].shape[1])


def _check_size(size: int, reference: int) -> None:
    if size != reference:
        raise InputError(
            f"statistics of another feature size: {reference} in the reference, {size} here; use one network for both"
        )


def _blocks(rows: Rows, device: torch.device, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Where each block of rows lies, from the `first` row on, and the block in float64.

    Raises:
        InputError: A number in it is not finite.
    """
    for start in range(first, len(rows), _BLOCK):
        where = slice(start, min(start + _BLOCK, len(rows)))
        block = rows[where]
        if not isinstance(block, Tensor):
            block = torch.from_numpy(np.array(block))  # a copy: what is mapped from a file may be read only
        block = block.to(device, torch.float64)
        if not bool(block.isfinite().all()):
            raise InputError(f"features {where.start} to {where.stop - 1} are not all finite; compute them again")
        yield where, block


def _drawn_blocks(rows: Rows, row: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of the rows whose weight is not zero, with their weights: over a third of a resample are zero."""
    for where, block in _blocks(rows, row.device):
        weight = row[where]
        drawn = weight > 0
        yield block[drawn], weight[drawn]


def _total_and_mean(rows: Rows, row: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the weights, and the weighted mean.

    Raises:
        InputError: There are fewer than two pictures.
    """
    total = row.sum()
    if total < 2:
        raise InputError(f"statistics of {int(total)} pictures have no covariance; give two or more")
    return total, _sum(weight @ block for block, weight in _drawn_blocks(rows, row)) / total


def _mean_and_factor(rows: Rows, row: Tensor) -> tuple[Tensor, Tensor]:
    r"""The weighted mean of few rows, and $F$ with a row for each that counts, where $\Sigma = F^T F$."""
    total, mean = _total_and_mean(rows, row)
    apart = [(block - mean) * (weight / (total - 1)).sqrt()[:, None] for block, weight in _drawn_blocks(rows, row)]
    return mean, torch.cat(apart)


def _frechet_distance(rows: Rows, reference: Gaussian, row: Tensor) -> Tensor:
    if int((row > 0).sum()) >= len(reference.mean):
        return Gaussian.of(rows, row).distance(reference)
    mean, factor = _mean_and_factor(rows, row)
    eigenvalues = torch.linalg.eigvalsh(factor @ reference.covariance.to(row.device) @ factor.T)
    return _distance(mean, factor.square().sum(), reference, _roots(eigenvalues))


def _carrier(rows: Rows, own: Gaussian, reference: Gaussian) -> tuple[Tensor, Tensor]:
    r"""The roots whose sum is $tr (\Sigma \Sigma')^{1/2}$, and C with shape (D, K) where $A = C C^T$.

    With $\Sigma = F^T F$ and $F \Sigma' F^T = P \Lambda P^T$ it is $A = \Sigma' F^T P \Lambda^{-3/2} P^T F \Sigma'$.
    """
    device = own.mean.device
    if len(rows) < len(own.mean):
        _, factor = _mean_and_factor(rows, torch.ones(len(rows), dtype=torch.float64, device=device))
        seen, power = reference.covariance.to(device) @ factor.T, -3 / 2
        eigenvalues, vectors = torch.linalg.eigh(factor @ seen)
    else:
        seen, power = reference.root.to(device), -1 / 2
        eigenvalues, vectors = torch.linalg.eigh(seen @ own.covariance @ seen)
    roots = _roots(eigenvalues)
    support = roots > 0
    return roots, seen @ (vectors[:, support] * roots[support] ** power)


def _roots(eigenvalues: Tensor) -> Tensor:
    """Of rising eigenvalues, with zero for what rounding alone may have made: its root would be a million times it."""
    eigenvalues = eigenvalues.clamp(min=0)
    least = torch.finfo(eigenvalues.dtype).eps * len(eigenvalues) * eigenvalues[-1]
    return torch.where(eigenvalues > least, eigenvalues, 0).sqrt()


def _distance(mean: Tensor, trace: Tensor, reference: Gaussian, roots: Tensor) -> Tensor:
    """The Fréchet distance from the mean and the trace of the covariance, and the eigenvalues of the root."""
    shift = mean - reference.mean.to(mean.device)
    return shift.square().sum() + trace + reference.covariance.trace().to(mean.device) - 2 * roots.sum()


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total += part
    return total


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_kernel_within(rows: Rows, weights: Tensor) -> Tensor:
    """Weighted mean of the kernel over pairs of different rows, with shape (R,)."""
    pairs = weights.sum(dim=1).square() - weights.square().sum(dim=1)
    if not bool((pairs > 0).all()):
        raise InputError(
            "a kernel distance needs two pictures on either side, in every resample; give more pictures, or "
            "resamples 0 for no interval"
        )
    total = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    for here, left in _blocks(rows, weights.device):
        for there, right in _blocks(rows, weights.device, here.start):
            kernel = _kernel(left, right)
            if here == there:
                kernel.fill_diagonal_(0)
            sums = (weights[:, here] @ kernel * weights[:, there]).sum(dim=1)
            total += sums if here == there else 2 * sums  # the kernel is symmetric
    return total / pairs


def _mean_kernel_across(rows: Rows, reference_rows: Rows, weights: Tensor) -> Tensor:
    """Weighted mean of the kernel over pairs of a row and a row of the reference, with shape (R,)."""
    total = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    for here, left in _blocks(rows, weights.device):
        for _, right in _blocks(reference_rows, weights.device):
            total += weights[:, here] @ _kernel(left, right).sum(dim=1)
    return total / (weights.sum(dim=1) * len(reference_rows))


def _split_of(count: int, splits: int, order: Sequence[int] | None) -> Tensor:
    """The split of each picture: split i ends before number (i + 1) * count // splits of the order."""
    bounds = torch.tensor([split * count // splits for split in range(1, splits)])
    by_place = torch.bucketize(torch.arange(count), bounds, right=True)
    if order is None:
        return by_place
    split_of = torch.empty_like(by_place)
    split_of[torch.as_tensor(order)] = by_place
    return split_of


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """With shape (n, m), of rows (n, D) and (m, D)."""
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    squared = norms - 2 * x @ y.T
    return squared.masked_fill(squared < 1e-12 * norms, 0)  # else rounding would part a row from its copy


def _squared_radii(rows: Rows, k: int, device: torch.device) -> Tensor:
    """Squared distance of each row to its k-th nearest neighbour among the others, with shape (N,)."""
    radii = []
    for here, block in _blocks(rows, device):
        nearest = torch.full((len(block), k), torch.inf, dtype=torch.float64, device=device)
        for there, others in _blocks(rows, device):
            squared = _squared_distances(block, others)
            if here == there:
                squared.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, squared], dim=1).topk(k, dim=1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _read_npz(path: Path) -> dict[str, NDArray[np.float64]]:
    """All arrays of a .npz as float64.

    Raises:
        InputError: It is not one, or holds something else than numbers.
    """
    mend = "give a .npz as pytorch-fid --save-stats writes it"
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.lib.npyio.NpzFile):
            with opened:
                return {name: opened[name].astype(np.float64) for name in opened.files}
    except OSError as error:
        raise InputError(f"statistics {path} cannot be read: {error.strerror or error}; {mend}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} holds no statistics; {mend}") from error
    raise InputError(f"{path} holds one array and no statistics; {mend}")
