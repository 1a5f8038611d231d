"""Intervals of the Fréchet distance by its derivative: against finite differences, its formula, and the bootstrap."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.evaluate import statistics
from bksdm.evaluate.scores import Frechet, Resampling, differences
from bksdm.evaluate.statistics import Gaussian, frechet_distances, frechet_influences

Array = NDArray[np.float64]

# Pictures, features, real pictures: many, few, few on both sides, few real ones, about as many as features
SIZES = [(60, 8, 50), (20, 32, 100), (20, 32, 25), (60, 32, 20), (32, 32, 60), (33, 32, 60)]


def features(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=rng, dtype=torch.float64)
    return shift + torch.randn(n, d, generator=rng, dtype=torch.float64) @ mixing


def given(n: int, d: int, m: int) -> tuple[Tensor, Gaussian]:
    return features(n, d, 0), Gaussian.of(features(m, d, 1, shift=0.5))


def influences(rows: Tensor, reference: Gaussian) -> Tensor:
    return frechet_influences(rows, Gaussian.of(rows), reference)[1]


def by_differences(rows: Tensor, reference: Gaussian, step: float = 1e-4) -> Tensor:
    steps = step * torch.eye(len(rows), dtype=torch.float64)
    more, less = (frechet_distances(rows, reference, 1 + sign * steps) for sign in (1, -1))
    return (more - less) / (2 * step)


@pytest.mark.parametrize(("n", "d", "m"), SIZES)
def test_the_influence_is_the_derivative_by_the_weight(n: int, d: int, m: int) -> None:
    rows, reference = given(n, d, m)
    found = influences(rows, reference)
    assert found.shape == (n,)
    assert torch.allclose(found, by_differences(rows, reference), rtol=0, atol=1e-5 * float(found.abs().max()))


def test_a_feature_that_never_changes_has_no_part_in_it() -> None:
    rows, reference = given(60, 8, 50)
    widened = torch.cat([rows, torch.zeros(60, 1).double()], dim=1)
    wider = Gaussian.of(torch.cat([features(50, 8, 1, shift=0.5), torch.zeros(50, 1).double()], dim=1))
    assert torch.allclose(influences(widened, wider), influences(rows, reference))
    assert frechet_distances(widened, wider, torch.ones(1, 60)).item() == pytest.approx(
        frechet_distances(rows, reference, torch.ones(1, 60)).item()
    )


def root(matrix: Array, power: float = 0.5) -> Array:
    """Of a symmetric matrix, on its support."""
    values, vectors = np.linalg.eigh(matrix)
    support = values > 1e-10 * values.max()
    found: Array = vectors[:, support] * values[support] ** power @ vectors[:, support].T
    return found


@pytest.mark.parametrize(("n", "d", "m"), SIZES)
def test_the_influence_is_its_formula(n: int, d: int, m: int) -> None:
    rows, reference = given(n, d, m)
    x, there, t = rows.numpy(), reference.mean.numpy(), reference.covariance.numpy()
    s, apart = np.cov(x, rowvar=False), x - x.mean(axis=0)
    half = root(t)
    carrier = half @ root(half @ s @ half, -0.5) @ half
    stretch = np.einsum("ni,ij,nj->n", apart, np.eye(d) - carrier, apart) - np.trace(s - carrier @ s)
    expected = 2 * apart @ (x.mean(axis=0) - there) / n + stretch / (n - 1)
    assert influences(rows, reference).numpy() == pytest.approx(expected, abs=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("n", "d", "m"), SIZES)
def test_few_pictures_have_the_distance_of_their_covariance(n: int, d: int, m: int) -> None:
    rows, reference = given(n, d, m)
    own = Gaussian.of(rows)
    expected = own.distance(reference).item()
    assert frechet_distances(rows, reference, torch.ones(1, n)).item() == pytest.approx(expected, rel=1e-12)
    assert frechet_influences(rows, own, reference)[0].item() == pytest.approx(expected, rel=1e-12)


def test_one_picture_over_and_over_has_no_influence_but_its_place() -> None:
    rows, reference = features(1, 8, 0).expand(12, 8), given(60, 8, 50)[1]
    distance, found = frechet_influences(rows, Gaussian.of(rows), reference)
    expected = (rows[0] - reference.mean).square().sum() + reference.covariance.trace()
    assert distance.item() == pytest.approx(expected.item())
    assert found.abs().max() < 1e-8


@pytest.mark.parametrize("block", [7, 60, 2048])
def test_influences_are_the_same_in_any_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, reference = given(60, 8, 50)
    expected = influences(rows, reference)
    monkeypatch.setattr(statistics, "_BLOCK", block)
    assert torch.allclose(influences(rows, reference), expected, rtol=1e-9)


def test_another_feature_size_is_refused() -> None:
    with pytest.raises(InputError, match="statistics of another feature size: 8 in the reference, 5 here"):
        influences(features(60, 5, 0), given(60, 8, 50)[1])


# Beside the bootstrap


def pictures(prompts: int, width: int, seed: int, repeats: int = 1, own: float = 1.0) -> Tensor:
    """Features of `repeats` pictures a prompt, with what a prompt asks (alike for all seeds) and what is their own."""
    asked = features(prompts, width, 100 + seed).repeat_interleave(repeats, dim=0)
    drawn = torch.randn(prompts * repeats, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return asked + own * width**0.5 * drawn + 1


def reference(width: int) -> Gaussian:
    return Gaussian.of(features(20 * width, width, 99))


def compared(rows: Tensor, real: Gaussian, resampling: Resampling) -> tuple[float, float]:
    """Standard errors by influence and by the bootstrap."""
    score = Frechet(rows, Gaussian.of(rows), real)
    influence, bootstrap = resampling.by_influence(score), resampling.estimate(score)
    assert influence.value == pytest.approx(bootstrap.value)
    assert (influence.by, bootstrap.by) == ("influence", "bootstrap")
    return influence.deviation, bootstrap.deviation


@pytest.mark.parametrize(("count", "width", "resamples"), [(400, 16, 400), (500, 32, 200)])
def test_the_interval_is_as_wide_as_the_bootstraps(count: int, width: int, resamples: int) -> None:
    found = [
        compared(pictures(count, width, seed), reference(width), Resampling.of(range(count), resamples, seed))
        for seed in range(4)
    ]
    influence, bootstrap = np.mean(found, axis=0)
    assert influence == pytest.approx(bootstrap, rel=0.1)


def test_so_it_is_where_prompts_have_several_pictures() -> None:
    units = [number for number in range(200) for _ in range(4)]
    rows = [pictures(200, 16, seed, repeats=4, own=0.3) for seed in range(3)]
    found = [compared(each, reference(16), Resampling.of(units, 300, seed)) for seed, each in enumerate(rows)]
    influence, bootstrap = np.mean(found, axis=0)
    assert influence == pytest.approx(bootstrap, rel=0.1)
    alone = [compared(each, reference(16), Resampling.of(range(800), 2, 0))[0] for each in rows]
    assert influence > 1.3 * np.mean(alone), "pictures of one prompt are not as good as pictures of several"


def test_so_it_is_for_the_difference_of_two_models() -> None:
    found, apart = [], []
    for seed in range(3):
        resampling, real = Resampling.of(range(400), 300, seed), reference(16)
        first = pictures(400, 16, seed)
        second = 1.1 * first + 0.3 * features(400, 16, 200 + seed)
        scores = {name: Frechet(rows, Gaussian.of(rows), real) for name, rows in (("a", first), ("b", second))}
        ways = [
            {name: {"frechet_distance": how(score)} for name, score in scores.items()}
            for how in (resampling.by_influence, resampling.estimate)
        ]
        found.append([differences(models)[0].deviation for models in ways])
        apart.append(np.hypot(*(model["frechet_distance"].deviation for model in ways[0].values())))
    influence, bootstrap = np.mean(found, axis=0)
    assert influence == pytest.approx(bootstrap, rel=0.1)
    assert influence < 0.7 * np.mean(apart), "what the prompts ask of both cancels"


def test_models_with_other_numbers_of_prompts_have_nothing_in_common() -> None:
    real = reference(16)
    estimates = {
        name: Resampling.of(range(count), 0, 0).by_influence(Frechet(rows, Gaussian.of(rows), real))
        for name, count in (("few", 100), ("many", 400))
        for rows in (pictures(count, 16, 0),)
    }
    (found,) = differences({name: {"frechet_distance": estimate} for name, estimate in estimates.items()})
    assert found.deviation == pytest.approx(np.hypot(*(estimate.deviation for estimate in estimates.values())))


def test_every_set_with_one_seed_a_prompt_is_scored_by_itself() -> None:
    rows, real = pictures(50, 8, 0, repeats=3), reference(8)
    resampling = Resampling.of([number for number in range(50) for _ in range(3)], 0, 0, repeats=3)
    found = resampling.by_influence(Frechet(rows, Gaussian.of(rows), real)).seeds
    expected = [frechet_distances(rows[seed::3], real, torch.ones(1, 50)).item() for seed in range(3)]
    assert found == pytest.approx(expected)
