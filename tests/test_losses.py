"""The losses of retraining, against their formulas in float64."""

import pytest
import torch
from torch import Tensor

from bksdm.distill.losses import LossWeights, feature_kd_losses, guided, output_kd_loss, task_loss

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mean_squared_error(first: Tensor, second: Tensor) -> float:
    difference = first.detach().double() - second.detach().double()
    return float((difference * difference).sum() / difference.numel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", [task_loss, output_kd_loss])
def test_the_mean_squared_error_is_taken_in_float32(loss: object, dtype: torch.dtype) -> None:
    first, second = random(0, 3, 4, 8, 8, dtype=dtype), random(1, 3, 4, 8, 8, dtype=dtype)
    value = loss(first, second)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(mean_squared_error(first, second), rel=1e-6)


@pytest.mark.parametrize("loss", [task_loss, output_kd_loss])
def test_squares_do_not_overflow_half_precision(loss: object) -> None:
    large = torch.full((1, 4, 2, 2), 1000.0, dtype=torch.float16)
    assert float(loss(large, -large)) == pytest.approx(4e6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tap_has_its_mean_squared_error(dtype: torch.dtype) -> None:
    shapes = {"down_blocks.0": (2, 8, 4, 4), "down_blocks.1": (2, 16, 2, 2), "up_blocks.0": (2, 8, 8, 8)}
    student = {path: random(index, *shape, dtype=dtype) for index, (path, shape) in enumerate(shapes.items())}
    teacher = {f"t.{path}": random(9 + index, *shape) for index, (path, shape) in enumerate(shapes.items())}
    losses = feature_kd_losses(student, teacher)
    assert list(losses) == list(student)
    for path, value in losses.items():
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(mean_squared_error(student[path], teacher[f"t.{path}"]), rel=1e-6)


def test_gradients_flow_to_the_student_alone() -> None:
    student, teacher = random(0, 2, 4, 8, 8).requires_grad_(), random(1, 2, 4, 8, 8).requires_grad_()
    (output_kd_loss(student, teacher) + feature_kd_losses({"a": student}, {"b": teacher})["a"]).backward()
    assert teacher.grad is None
    wanted = 2 * 2 * (student.detach().double() - teacher.detach().double()) / student.numel()
    assert torch.allclose(student.grad.double(), wanted, atol=1e-9, rtol=1e-6)


def test_equal_outputs_cost_nothing() -> None:
    same = random(0, 2, 4, 8, 8)
    assert float(task_loss(same, same)) == float(output_kd_loss(same, same)) == 0


def test_taps_must_pair_off() -> None:
    with pytest.raises(ValueError, match="zip"):
        feature_kd_losses({"a": random(0, 1)}, {"a": random(0, 1), "b": random(1, 1)})


# Features that are weighed or left out

FORMS = [{"normalize": True}, {"mask": 2.0}, {"mask": 1.0}, {"normalize": True, "mask": 2.0}]


def heavy_tailed(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A feature with a mean of its own, a few elements of which lie far out."""
    return (random(seed, 3, 5, 4, 4) ** 3 + 0.7).to(dtype)


def expected(student: Tensor, teacher: Tensor, *, normalize: bool = False, mask: float | None = None) -> float:
    """The mean over samples, one by one in float64."""
    errors = []
    for learnt, wanted in zip(student.double(), teacher.double(), strict=True):
        stays = torch.ones_like(wanted, dtype=torch.bool)
        if mask is not None:
            stays = (wanted - wanted.mean()).abs() <= mask * wanted.std(correction=0)
        error = (learnt[stays] - wanted[stays]).square().mean()
        errors.append(error / wanted[stays].square().mean() if normalize else error)
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_features_are_weighed_and_left_out_by_the_formula(form: dict[str, float], dtype: torch.dtype) -> None:
    student, teacher = heavy_tailed(0, dtype), heavy_tailed(1, dtype)
    (loss,) = feature_kd_losses({"a": student}, {"b": teacher}, **form).values()
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(expected(student, teacher, **form), rel=1e-5)


@pytest.mark.parametrize("factor", [1e-3, 64.0])
@pytest.mark.parametrize("form", [form for form in FORMS if "normalize" in form])
def test_normalized_features_have_no_scale(form: dict[str, float], factor: float) -> None:
    def loss(scale: float) -> float:
        return float(feature_kd_losses({"a": scale * heavy_tailed(0)}, {"a": scale * heavy_tailed(1)}, **form)["a"])

    assert loss(factor) == pytest.approx(loss(1.0), rel=1e-5)


def test_a_feature_of_nothing_but_zeros_has_a_finite_error() -> None:
    loss = feature_kd_losses({"a": torch.full((2, 3), 1e-3)}, {"a": torch.zeros(2, 3)}, normalize=True)["a"]
    assert loss.isfinite()


def test_what_lies_far_out_teaches_nothing() -> None:
    student, teacher = heavy_tailed(0).requires_grad_(), heavy_tailed(1)
    feature_kd_losses({"a": student}, {"a": teacher}, mask=2.0)["a"].backward()
    rows = teacher.flatten(1)
    out = (rows - rows.mean(1, keepdim=True)).abs() > 2 * rows.std(1, keepdim=True, correction=0)
    gradient = student.grad.flatten(1)
    assert 0 < int(out.sum()) < out.numel() / 5
    assert not gradient[out].any()
    assert gradient[~out].all()


def test_a_constant_feature_has_no_outliers() -> None:
    loss = feature_kd_losses({"a": torch.zeros(2, 50)}, {"a": torch.full((2, 50), 0.1)}, mask=2.0)["a"]
    assert float(loss) == pytest.approx(0.01)


@pytest.mark.parametrize("form", [{}, *FORMS])
def test_splitting_a_batch_does_not_change_its_features_losses(form: dict[str, float]) -> None:
    student, teacher = torch.cat([heavy_tailed(0), 9 * heavy_tailed(2)]), torch.cat([heavy_tailed(1), heavy_tailed(3)])
    whole = feature_kd_losses({"a": student}, {"a": teacher}, **form)["a"]
    pairs = zip(student.split(2), teacher.split(2), strict=True)
    parts = [feature_kd_losses({"a": first}, {"a": second}, **form)["a"] for first, second in pairs]
    assert float(torch.stack(parts).mean()) == pytest.approx(float(whole), rel=1e-5)


# The task without some of its samples


def test_samples_that_are_left_out_count_as_zeros() -> None:
    predicted, target = random(0, 4, 2, 3, 3).requires_grad_(), random(1, 4, 2, 3, 3)
    left_out = torch.tensor([False, True, True, False])
    loss = task_loss(predicted, target, left_out)
    assert loss.item() == pytest.approx(mean_squared_error(predicted[[0, 3]], target[[0, 3]]) / 2, rel=1e-6)
    loss.backward()
    assert not predicted.grad[left_out].any()
    assert task_loss(predicted, target, torch.ones(4, dtype=torch.bool)).item() == 0


def test_leaving_nothing_out_changes_nothing() -> None:
    predicted, target = random(0, 4, 2, 3, 3), random(1, 4, 2, 3, 3)
    none = task_loss(predicted, target, torch.zeros(4, dtype=torch.bool))
    assert float(none) == pytest.approx(float(task_loss(predicted, target)), rel=1e-6)


# Guidance


@pytest.mark.parametrize("dtype", DTYPES)
def test_guidance_is_that_of_the_formula(dtype: torch.dtype) -> None:
    captioned, empty = random(0, 3, 4, 8, 8, dtype=dtype), random(1, 3, 4, 8, 8, dtype=dtype)
    found = guided(torch.cat([captioned, empty]), 7.5)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), 7.5 * captioned.double() - 6.5 * empty.double(), rtol=1e-4, atol=1e-4)


def test_the_paper_weighs_all_terms_alike() -> None:
    assert LossWeights() == LossWeights(task=1, output_kd=1, feature_kd=1)


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 4, 4)])
def test_directions_are_compared_token_by_token(shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=rng) for _ in range(2))
    channels = 1 if len(shape) == 4 else -1
    cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=channels)
    found = feature_kd_losses({"a": 3 * student}, {"a": teacher}, directions=True)["a"]
    assert float(found) == pytest.approx(float((2 - 2 * cosine).mean()), rel=1e-5)
    assert float(feature_kd_losses({"a": 7 * teacher}, {"a": teacher}, directions=True)["a"]) < 1e-10
