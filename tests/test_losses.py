"""The three losses of retraining, against their formulas in float64."""

import pytest
import torch
from torch import Tensor

from bksdm.losses import LossWeights, feature_kd_losses, output_kd_loss, task_loss

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


def test_the_paper_weighs_all_terms_alike() -> None:
    assert LossWeights() == LossWeights(task=1, output_kd=1, feature_kd=1)
