"""Weighted scores against their formulas in NumPy, against torchmetrics, and against drawing the pictures again."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from bksdm.common.errors import InputError
from bksdm.evaluate import statistics
from bksdm.evaluate.scores import frechet_distance
from bksdm.evaluate.statistics import (
    Gaussian,
    bootstrap_weights,
    frechet_distances,
    inception_scores,
    kernel_distances,
    precision_and_recall,
    torch_fidelity_order,
    weighted_means,
)

Array = NDArray[np.float64]
ONE = torch.ones(1, 60)


def features(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Array:
    rng = np.random.default_rng(seed)
    return shift + scale * rng.standard_normal((n, d)) @ rng.standard_normal((d, d))


@pytest.fixture(scope="module")
def rows() -> Array:
    return features(60, 8, 0)


@pytest.fixture(scope="module")
def reference() -> Array:
    return features(50, 8, 1, scale=1.5, shift=0.5)


@pytest.fixture(scope="module")
def weights() -> Tensor:
    """Ones, and five resamples of 20 prompts with three pictures each."""
    return torch.cat([ONE.double(), bootstrap_weights(np.arange(60) // 3, 5, seed=0)])


@pytest.fixture(params=[7, 60, 2048])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows in memory at once: blocks with a rest, one that just fits, one with room."""
    monkeypatch.setattr(statistics, "_BLOCK", request.param)
    return request.param


def repeated(rows: Array, weights_row: Tensor) -> Array:
    """The rows that a resample has, each as often as it was drawn."""
    return np.repeat(rows, weights_row.int().numpy(), axis=0)


class Given(nn.Module):
    """Stands where torchmetrics expects a network."""

    num_features = 8

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_by_the_product(a: Array, b: Array) -> float:
    """tr (S S')^1/2 as the sum of the roots of the eigenvalues of the product, which is not symmetric."""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).real.sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s) + np.trace(t) - 2 * roots)


def test_the_frechet_distance_is_its_formula_for_every_resample(
    rows: Array, reference: Array, weights: Tensor, block: int
) -> None:
    found = frechet_distances(rows, Gaussian.of(reference), weights)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([frechet_by_the_product(repeated(rows, row), reference) for row in weights])


def test_the_frechet_distance_is_that_of_torchmetrics(rows: Array, reference: Array) -> None:
    theirs = frechet_distance(torch.from_numpy(rows), torch.from_numpy(reference))
    assert frechet_distances(rows, Gaussian.of(reference), ONE).item() == pytest.approx(theirs, rel=1e-6)


def test_the_frechet_distance_of_fewer_pictures_than_features_is_its_formula() -> None:
    few, many = features(6, 8, 2), features(50, 8, 3)
    found = frechet_distances(few, Gaussian.of(many), torch.ones(1, 6)).item()
    assert found == pytest.approx(frechet_by_the_product(few, many), rel=1e-5)


def test_the_frechet_distance_to_oneself_is_zero_and_to_a_shifted_self_the_squared_shift(rows: Array) -> None:
    here = Gaussian.of(rows)
    assert frechet_distances(rows, here, ONE).item() == pytest.approx(0, abs=1e-8)
    assert frechet_distances(rows + 3, here, ONE).item() == pytest.approx(8 * 9)


def test_resamples_of_the_frechet_distance_lie_above_it_and_spread_as_other_pictures_would() -> None:
    """They hold fewer different pictures, which has the same price as sampling: twice it in all."""
    rng = np.random.default_rng(0)
    real = Gaussian(torch.zeros(16).double(), torch.eye(16).double())

    def pictures() -> Array:
        return 1.3 * rng.standard_normal((400, 16)) + 0.5

    truth = 16 * (0.5**2 + 0.3**2)
    others = np.array([frechet_distances(pictures(), real, torch.ones(1, 400)).item() for _ in range(200)])
    scores, means, spreads = np.transpose(
        [
            (found[0], found[1:].mean(), found[1:].std())
            for found in (
                frechet_distances(
                    pictures(), real, torch.cat([torch.ones(1, 400), bootstrap_weights(range(400), 50, 0)])
                )
                for _ in range(10)
            )
        ]
    )
    assert (means > scores).all()
    assert np.mean(means - scores) == pytest.approx(others.mean() - truth, rel=0.3)
    assert np.mean(spreads) == pytest.approx(others.std(), rel=0.2)


def test_statistics_are_numpys(rows: Array, block: int) -> None:
    found = Gaussian.of(rows)
    assert found.count == 60
    assert np.allclose(found.mean, rows.mean(axis=0), rtol=1e-12)
    assert np.allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-12)


def test_statistics_keep_their_digits_far_from_zero(rows: Array) -> None:
    assert np.allclose(Gaussian.of(rows + 1e6).covariance, np.cov(rows, rowvar=False), rtol=1e-8)


def test_the_root_is_computed_once_and_squares_to_the_covariance(rows: Array) -> None:
    found = Gaussian.of(rows)
    assert torch.allclose(found.root @ found.root, found.covariance)
    assert found.root is found.root


def test_statistics_come_back_from_their_file_and_are_pytorch_fids(rows: Array, tmp_path: Path) -> None:
    written = Gaussian.of(rows)
    written.save(tmp_path / "real.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["real.npz"]
    with np.load(tmp_path / "real.npz") as arrays:
        assert np.array_equal(arrays["mu"], written.mean)
        assert np.array_equal(arrays["sigma"], written.covariance)
    read = Gaussian.load(tmp_path / "real.npz")
    assert torch.equal(read.mean, written.mean)
    assert torch.equal(read.covariance, written.covariance)
    assert read.count == 60


def test_statistics_of_pytorch_fid_have_no_count(rows: Array, tmp_path: Path) -> None:
    sigma = np.cov(rows, rowvar=False).astype(np.float32)
    np.savez_compressed(tmp_path / "real.npz", mu=rows.mean(axis=0), sigma=sigma)
    read = Gaussian.load(tmp_path / "real.npz")
    assert read.count is None
    assert read.covariance.dtype == torch.float64
    assert frechet_distances(rows, read, ONE).item() == pytest.approx(0, abs=1e-4)


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "has no array sigma"),
        ({"sigma": np.eye(3)}, "has no array mu"),
        (GOOD | {"sigma": np.eye(4)}, r"mu with shape \(3,\) and sigma with shape \(4, 4\)"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, r"mu with shape \(3, 1\)"),
        (GOOD | {"mu": np.array([0, np.nan, 0])}, "not finite"),
        (GOOD | {"sigma": np.diag([1, np.inf, 1])}, "not finite"),
        (GOOD | {"sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        (GOOD | {"mu": np.array(["a", "b", "c"])}, "holds no statistics"),
        (GOOD | {"mu": np.array([{}, {}, {}])}, "holds no statistics"),
    ],
)
def test_a_file_of_something_else_is_refused(arrays: dict[str, Array], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", **arrays)
    with pytest.raises(InputError, match=message) as error:
        Gaussian.load(tmp_path / "real.npz")
    assert str(tmp_path / "real.npz") in str(error.value)
    assert "\n" not in str(error.value)


def not_there(path: Path) -> None:
    pass


def text(path: Path) -> None:
    path.write_text("mu sigma")


def nothing(path: Path) -> None:
    path.touch()


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def half(path: Path) -> None:
    np.savez(path, **GOOD)
    path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_there, "cannot be read: No such file"),
        (text, "holds no statistics"),
        (nothing, "holds no statistics"),
        (one_array, "holds one array"),
        (half, "holds no statistics"),
    ],
)
def test_a_file_that_is_no_npz_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    damage(tmp_path / "real.npz")
    with pytest.raises(InputError, match=message) as error:
        Gaussian.load(tmp_path / "real.npz")
    assert "\n" not in str(error.value)


def kernel_distance_by_pairs(x: Array, y: Array, w: Sequence[float]) -> float:
    def k(a: Array, b: Array) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    own = list(itertools.permutations(range(len(x)), 2))
    mine = sum(w[i] * w[j] * k(x[i], x[j]) for i, j in own) / sum(w[i] * w[j] for i, j in own)
    theirs = np.mean([k(a, b) for a, b in itertools.permutations(y, 2)])
    across = sum(w[i] * k(a, b) for i, a in enumerate(x) for b in y) / (sum(w) * len(y))
    return float(mine + theirs - 2 * across)


def test_the_kernel_distance_is_its_formula_for_every_resample(
    rows: Array, reference: Array, weights: Tensor, block: int
) -> None:
    expected = [kernel_distance_by_pairs(rows, reference, row.tolist()) for row in weights[:3]]
    assert kernel_distances(rows, reference, weights[:3]).tolist() == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features")
def test_the_kernel_distance_is_that_of_torchmetrics_with_all_pictures_in_one_subset(rows: Array) -> None:
    reference = features(60, 8, 1, scale=1.5, shift=0.5)
    theirs = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=60)
    theirs.set_dtype(torch.float64)
    theirs.update(torch.from_numpy(rows), real=False)
    theirs.update(torch.from_numpy(reference), real=True)
    assert kernel_distances(rows, reference, ONE).item() == pytest.approx(theirs.compute()[0].item())


def test_the_kernel_distance_of_pictures_from_one_source_is_zero_on_average_resampled_or_not() -> None:
    rng = np.random.default_rng(0)
    values = [
        kernel_distances(*rng.standard_normal((2, 30, 4)), torch.cat([torch.ones(1, 30), resampled])).numpy()
        for resampled in bootstrap_weights(range(30), 200, seed=1)[:, None]
    ]
    mean, error = np.mean(values, axis=0), np.std(values, axis=0) / np.sqrt(len(values))
    assert (np.abs(mean) < 3 * error).all()


def inception_score_by_splits(logits: Array, splits: int) -> float:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for split in range(splits):
        part = p[split * len(p) // splits : (split + 1) * len(p) // splits]
        scores.append(np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()))
    return float(np.mean(scores))


@pytest.mark.parametrize("splits", [1, 4, 7, 60])
def test_the_inception_score_is_its_formula(rows: Array, splits: int, block: int) -> None:
    assert inception_scores(rows, ONE, splits).item() == pytest.approx(inception_score_by_splits(rows, splits))


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features", "ignore:std.* degrees of freedom")
def test_the_inception_score_is_that_of_torchmetrics_in_one_split(rows: Array) -> None:
    theirs = InceptionScore(feature=Given(), splits=1)
    theirs.set_dtype(torch.float64)
    theirs.update(torch.from_numpy(rows))
    assert inception_scores(rows, ONE, splits=1).item() == pytest.approx(theirs.compute()[0].item())


def test_the_inception_score_of_a_resample_is_that_of_the_pictures_drawn(rows: Array, weights: Tensor) -> None:
    expected = [inception_score_by_splits(repeated(rows, row), splits=1) for row in weights]
    assert inception_scores(rows, weights, splits=1).tolist() == pytest.approx(expected)


def test_weights_count_within_each_split(rows: Array, weights: Tensor, block: int) -> None:
    halves = [
        inception_scores(rows[part], weights[:, part], splits=1).numpy() for part in (slice(0, 30), slice(30, 60))
    ]
    assert inception_scores(rows, weights, splits=2).tolist() == pytest.approx(np.mean(halves, axis=0).tolist())


def test_a_split_of_which_nothing_is_drawn_is_left_out(rows: Array) -> None:
    only_the_first = torch.cat([torch.ones(1, 30), torch.zeros(1, 30)], dim=1)
    expected = inception_score_by_splits(rows[:30], splits=1)
    assert inception_scores(rows, only_the_first, splits=2).item() == pytest.approx(expected)


def test_pictures_may_be_split_in_another_order(rows: Array, block: int) -> None:
    order = torch_fidelity_order(60)
    assert sorted(order) == list(range(60))
    found = inception_scores(rows, ONE, splits=7, order=order).item()
    assert found == pytest.approx(inception_score_by_splits(rows[order], splits=7))
    assert found != pytest.approx(inception_score_by_splits(rows, splits=7))


def test_pictures_of_all_classes_score_their_number_and_of_one_class_one() -> None:
    certain = 1000 * np.eye(8)
    assert inception_scores(certain, torch.ones(1, 8), splits=1).item() == pytest.approx(8)
    assert inception_scores(certain[[3] * 8], torch.ones(1, 8), splits=1).item() == pytest.approx(1)


def test_weighted_means_are_those_of_the_pictures_drawn(weights: Tensor) -> None:
    values = torch.rand(60, generator=torch.Generator().manual_seed(0))
    expected = [repeated(values.numpy(), row).mean() for row in weights]
    assert weighted_means(values, weights).tolist() == pytest.approx(expected)
    assert weighted_means(values > 0.5, ONE).item() == pytest.approx((values > 0.5).double().mean().item())


def in_the_balls_of(others: Array, rows: Array, k: int) -> list[bool]:
    """Whether each row is as near to one of the others as that one's k-th neighbour among them."""
    radii = [sorted(np.linalg.norm(others - other, axis=1))[k] for other in others]  # at 0 is itself
    return [bool((np.linalg.norm(others - row, axis=1) <= radii).any()) for row in rows]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_their_definition(k: int, block: int) -> None:
    rng = np.random.default_rng(0)
    rows, reference = rng.standard_normal((60, 6)), 0.8 * rng.standard_normal((50, 6)) + 0.7
    precise, recalled = precision_and_recall(rows, reference, k)
    assert precise.dtype == recalled.dtype == torch.bool
    assert precise.tolist() == in_the_balls_of(reference, rows, k)
    assert recalled.tolist() == in_the_balls_of(rows, reference, k)
    assert 0 < precise.double().mean() < 1
    assert 0 < recalled.double().mean() < 1


def test_the_same_pictures_are_all_precise_and_recalled_and_far_ones_none(rows: Array, block: int) -> None:
    assert all(found.all() for found in precision_and_recall(rows, rows[::-1].copy()))
    assert not any(found.any() for found in precision_and_recall(rows, rows + 1e3))


def test_one_picture_over_and_over_is_as_near_as_itself() -> None:
    copies = np.repeat(features(1, 64, 0, scale=30), 10, axis=0)
    assert all(found.all() for found in precision_and_recall(copies, copies[:5]))


SCORES: dict[str, Callable[[object, Tensor], Tensor]] = {
    "frechet": lambda rows, weights: frechet_distances(rows, Gaussian.of(features(50, 8, 1)), weights),
    "kernel": lambda rows, weights: kernel_distances(rows, features(50, 8, 1), weights),
    "inception": lambda rows, weights: inception_scores(rows, weights, splits=3),
    "precision": lambda rows, weights: weighted_means(precision_and_recall(rows, features(50, 8, 1))[0], weights),
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.filterwarnings("error")
def test_rows_may_lie_in_a_file_or_in_a_tensor_of_any_format(score: str, weights: Tensor, tmp_path: Path) -> None:
    half = features(60, 8, 0).astype(np.float16)
    np.save(tmp_path / "rows.npy", half)
    expected = SCORES[score](half.astype(np.float64), weights).tolist()
    for rows in (half, np.load(tmp_path / "rows.npy", mmap_mode="r"), torch.from_numpy(half).float()):
        assert SCORES[score](rows, weights).tolist() == pytest.approx(expected, rel=1e-12)


class Counted:
    """Rows that know the most that was asked of them at once."""

    def __init__(self, rows: Array) -> None:
        self.rows, self.most = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, where: slice) -> Array:
        self.most = max(self.most, len(self.rows[where]))
        return self.rows[where]


@pytest.mark.parametrize("score", SCORES)
def test_no_more_than_a_block_is_read_at_once(
    score: str, rows: Array, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_BLOCK", 7)
    counted = Counted(rows)
    SCORES[score](counted, weights)
    assert counted.most == 7


@pytest.mark.parametrize("score", SCORES)
def test_a_feature_that_is_not_finite_is_refused(score: str, rows: Array, weights: Tensor) -> None:
    broken = rows.copy()
    broken[41, 2] = np.nan
    with pytest.raises(InputError, match="features 0 to 59 are not all finite"):
        SCORES[score](broken, weights)


@pytest.mark.parametrize("score", ["frechet", "kernel", "precision"])
def test_another_feature_size_is_refused(score: str, weights: Tensor) -> None:
    with pytest.raises(InputError, match="statistics of another feature size: 8 in the reference, 5 here"):
        SCORES[score](features(60, 5, 0), weights)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(60), r"weights with shape \(60,\) do not fit 60 pictures"),
        (torch.ones(2, 59), r"weights with shape \(2, 59\) do not fit 60 pictures"),
        (torch.zeros(1, 60), "weights count pictures"),
        (torch.full((1, 60), -1.0), "weights count pictures"),
        (torch.full((1, 60), torch.nan), "weights count pictures"),
    ],
)
def test_weights_that_count_nothing_are_refused(score: str, bad: Tensor, message: str, rows: Array) -> None:
    with pytest.raises(InputError, match=message):
        SCORES[score](rows, bad)


def test_too_few_pictures_are_refused(rows: Array, reference: Array) -> None:
    with pytest.raises(InputError, match="there are no pictures to score"):
        Gaussian.of(rows[:0])
    with pytest.raises(InputError, match="statistics of 1 pictures have no covariance"):
        Gaussian.of(rows[:1])
    with pytest.raises(InputError, match="needs two pictures on either side"):
        kernel_distances(rows[:1], reference, torch.ones(1, 1))
    with pytest.raises(InputError, match="needs two pictures on either side"):
        kernel_distances(rows, reference[:1], ONE)
    with pytest.raises(InputError, match="60 pictures cannot be in 61 splits; choose from 1 to 60"):
        inception_scores(rows, ONE, splits=61)
    with pytest.raises(InputError, match="k 3 wants sets of more than 3 pictures, and these have 60 and 3"):
        precision_and_recall(rows, reference[:3])


def test_pictures_of_a_prompt_are_drawn_together_and_as_many_prompts_as_there_are() -> None:
    units = [7, 7, 3, 3, 3, 9]
    weights = bootstrap_weights(units, 200, seed=0)
    assert weights.shape == (200, 6)
    seven, three, nine = weights[:, 0], weights[:, 2], weights[:, 5]
    assert torch.equal(weights, torch.stack([seven, seven, three, three, three, nine], dim=1))
    assert (seven + three + nine == 3).all()
    assert (weights == weights.round()).all()


def test_every_prompt_is_drawn_as_often_as_any() -> None:
    drawn = bootstrap_weights(range(10), 4000, seed=0)
    assert drawn.mean(dim=0).tolist() == pytest.approx([1] * 10, abs=0.06)
    assert drawn.var(dim=0).tolist() == pytest.approx([0.9] * 10, abs=0.12)  # multinomial: n p (1 - p)


def test_resamples_follow_from_the_seed_and_leave_torchs_own_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    three, five, other = (bootstrap_weights(range(20), n, seed) for n, seed in ((3, 0), (5, 0), (3, 1)))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(three, five[:3])
    assert not torch.equal(three, other)
    assert not torch.equal(three[0], three[1])


def test_the_spread_of_resampled_means_is_the_standard_error() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    means = weighted_means(values, bootstrap_weights(range(400), 2000, seed=0))
    assert means.std().item() == pytest.approx(values.std().item() / 20, rel=0.1)


@pytest.mark.parametrize(("units", "resamples"), [([], 5), ([1, 2], 0)])
def test_no_resamples_are_refused(units: list[int], resamples: int) -> None:
    with pytest.raises(InputError, match="give one or more of both"):
        bootstrap_weights(units, resamples, seed=0)
