"""What steps the weights of a student: Muon for matrices and AdamW for all else, kept and restored as one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bksdm.distill.loop import optimize
from bksdm.distill.optimizers import Muon, matrices, moments, optimizer_of
from bksdm.distill.state import TrainState

LR, DECAY = 1e-2, 0.1


def model() -> nn.Sequential:
    """Two matrices, and what is none: biases, a norm, a convolution and a row."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.LayerNorm(128), nn.Linear(128, 24), nn.Linear(24, 8))
    made.register_parameter("row", nn.Parameter(torch.randn(1, 8)))
    return made


def state() -> TrainState:
    made = model()
    return TrainState(made, optimizer_of(made, "muon", LR, DECAY))


def step(state: TrainState, number: int) -> dict[str, Tensor]:
    """The gradients that were stepped along."""
    numbers = torch.Generator().manual_seed(number)
    pixels, wanted = torch.randn(64, 3, 4, 4, generator=numbers), torch.randn(64, 8, generator=numbers)
    (state.model(pixels) + state.model.row - wanted).square().mean().backward()
    gradients = {name: weight.grad.clone() for name, weight in state.model.named_parameters()}
    optimize(state, LR, 0.0)
    return gradients


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in state.model.named_parameters()}


def test_a_matrix_is_stepped_along_an_orthogonal_one_as_far_as_adamw_would() -> None:
    """Its singular values are near 1, where those of the gradient are not (Newton and Schulz's are 0.7 to 1.2)."""
    trained, before = state(), weights(state())
    for weight in trained.model.parameters():
        weight.grad = torch.randn_like(weight)
    gradients = {name: weight.grad.clone() for name, weight in trained.model.named_parameters()}
    optimize(trained, LR, 0.0)
    for name in ("3.weight", "4.weight"):
        moved = before[name] * (1 - LR * DECAY) - trained.model.get_parameter(name).detach()
        turned = torch.linalg.svdvals(moved.double()) / (LR * 0.2 * max(moved.shape) ** 0.5)
        spread = torch.linalg.svdvals(gradients[name].double())
        assert spread.max() > 2 * spread.min()
        assert 0.5 < turned.min() <= turned.max() < 1.3
        assert (moved * gradients[name]).sum() > 0


def test_all_else_is_stepped_as_by_adamw_to_the_bit() -> None:
    trained, other = state(), model()
    plain = torch.optim.AdamW(other.parameters(), lr=LR, weight_decay=DECAY, fused=True)
    for name, gradient in step(trained, 0).items():
        other.get_parameter(name).grad = gradient
    plain.step()
    own = {id(weight) for weight in matrices(trained.model)}
    rest = [name for name, weight in trained.model.named_parameters() if id(weight) not in own]
    assert len(own) == 2 < len(rest)
    assert all(torch.equal(trained.model.get_parameter(name), other.get_parameter(name)) for name in rest)


def test_a_checkpoint_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = state(), state()
    for number in range(4):
        step(whole, number)
        if number == 1:
            whole.save(tmp_path / "kept")
    resumed.load(tmp_path / "kept")
    for number in (2, 3):
        step(resumed, number)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_numbers_that_an_optimizer_keeps_are_foreseen(name: str) -> None:
    made = model()
    trained = TrainState(made, optimizer_of(made, name, LR, DECAY))
    step(trained, 0)
    kept = [value for moment in trained.optimizer.state.values() for value in moment.values() if value.ndim]
    assert sum(value.numel() for value in kept) == moments(made, name)
    assert isinstance(trained.optimizer, Muon) == (name == "muon")
