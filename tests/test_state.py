"""The state of training: to the disk and back to the bit, whatever happens on the way."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bksdm.common.errors import InputError
from bksdm.distill.state import Checkpoints, Ema, TrainState, averaged


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def new_state(seed: int = 0, *, ema: bool = True) -> TrainState:
    network = model(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    return TrainState(network, optimizer, Ema(network, 0.9) if ema else None)


def advance(state: TrainState, steps: int = 1) -> TrainState:
    """Take steps on data that follow from the step number."""
    for _ in range(steps):
        data = torch.randn(8, 3, generator=torch.Generator().manual_seed(state.step))
        state.model(data).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        if state.ema:
            state.ema.update(state.parameters, state.step)
    return state


def snapshot(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.tensors().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# The average


def test_the_average_follows_its_formula() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 1.0)
    ema, wanted = Ema(network, 0.5), 1.0
    for step in range(1, 20):
        nn.init.constant_(network.weight, float(step))
        ema.update(list(network.parameters()), step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * step
        assert ema.average["weight"].item() == pytest.approx(wanted, rel=1e-6)


def test_the_average_begins_at_the_first_weights_and_is_a_copy() -> None:
    network = model()
    ema = Ema(network, 0.9)
    for name, parameter in network.named_parameters():
        assert torch.equal(ema.average[name], parameter)
        assert ema.average[name].data_ptr() != parameter.data_ptr()
        assert not ema.average[name].requires_grad


def test_the_average_can_become_the_model() -> None:
    state = advance(new_state(), 3)
    state.ema.copy_to(state.model)
    assert all(torch.equal(state.ema.average[name], p) for name, p in state.model.named_parameters())


def test_the_model_is_averaged_only_inside() -> None:
    state = advance(new_state(), 3)
    own = snapshot(state)
    with averaged(state):
        assert all(torch.equal(state.ema.average[name], p) for name, p in state.model.named_parameters())
    assert_equal(snapshot(state), own)


def test_the_model_gets_its_own_weights_back_after_an_error() -> None:
    state = advance(new_state(), 3)
    own = snapshot(state)
    with pytest.raises(KeyError), averaged(state):
        raise KeyError
    assert_equal(snapshot(state), own)


def test_without_average_the_model_stays() -> None:
    state = advance(new_state(ema=False))
    own = snapshot(state)
    with averaged(state):
        assert_equal(snapshot(state), own)


# One checkpoint


@pytest.mark.parametrize("ema", [False, True])
def test_a_loaded_state_is_the_saved_one_to_the_bit(tmp_path: Path, ema: bool) -> None:
    saved = advance(new_state(0, ema=ema), 3)
    saved.save(tmp_path / "checkpoint")
    loaded = new_state(1, ema=ema)
    loaded.load(tmp_path / "checkpoint")
    assert loaded.step == 3
    assert_equal(snapshot(loaded), snapshot(saved))


def test_a_checkpoint_holds_weights_buffers_average_and_moments(tmp_path: Path) -> None:
    state = advance(new_state(), 2)
    names = state.tensors().keys()
    assert {"model.0.weight", "model.1.running_mean", "ema.0.weight"} <= names
    assert {
        f"optimizer.{index}.{moment}" for index in range(6) for moment in ("exp_avg", "exp_avg_sq", "step")
    } <= names
    state.save(tmp_path / "checkpoint")
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"tensors.safetensors", "state.json"}


def test_training_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = advance(new_state(), 6)
    advance(new_state(), 3).save(tmp_path / "checkpoint")
    resumed = new_state(1)
    resumed.load(tmp_path / "checkpoint")
    assert_equal(snapshot(advance(resumed, 3)), snapshot(whole))


def test_loading_keeps_the_parameters_that_the_optimizer_has(tmp_path: Path) -> None:
    advance(new_state()).save(tmp_path / "checkpoint")
    loaded = new_state(1)
    parameters = list(loaded.model.parameters())
    loaded.load(tmp_path / "checkpoint")
    assert all(now is before for now, before in zip(loaded.model.parameters(), parameters, strict=True))
    assert [id(p) for p in loaded.optimizer.param_groups[0]["params"]] == [id(p) for p in parameters]


def test_a_fresh_state_can_be_saved(tmp_path: Path) -> None:
    new_state(0).save(tmp_path / "checkpoint")
    loaded = new_state(1)
    loaded.load(tmp_path / "checkpoint")
    assert_equal(snapshot(loaded), snapshot(new_state(0)))


def test_the_loss_scale_is_kept(tmp_path: Path) -> None:
    network = model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    state = TrainState(network, torch.optim.SGD(network.parameters()), scaler=scaler)
    scaler.scale(torch.ones(()))
    state.save(tmp_path / "checkpoint")
    other = TrainState(network, torch.optim.SGD(network.parameters()), scaler=torch.amp.GradScaler("cpu"))
    other.load(tmp_path / "checkpoint")
    assert other.scaler.get_scale() == 4096.0


# What is refused


def saved(folder: Path) -> Path:
    advance(new_state()).save(folder / "checkpoint")
    return folder / "checkpoint"


def refused(state: TrainState, checkpoint: Path) -> str:
    with pytest.raises(InputError) as error:
        state.load(checkpoint)
    assert f"checkpoint {checkpoint} cannot be read" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_a_checkpoint_that_is_cut_short(tmp_path: Path, name: str, share: float) -> None:
    checkpoint = saved(tmp_path)
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: int(share * len(content))])
    assert "remove it to go on from the one before" in refused(new_state(), checkpoint)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_checkpoint_that_lacks_a_file(tmp_path: Path, name: str) -> None:
    checkpoint = saved(tmp_path)
    (checkpoint / name).unlink()
    refused(new_state(), checkpoint)


@pytest.mark.parametrize("content", ["{}", '{"step": 1}', "[]", "7"])
def test_a_checkpoint_whose_numbers_are_not_there(tmp_path: Path, content: str) -> None:
    checkpoint = saved(tmp_path)
    (checkpoint / "state.json").write_text(content)
    refused(new_state(), checkpoint)


@pytest.mark.parametrize("layers", [(nn.Linear(3, 4),), (nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))])
def test_a_checkpoint_of_another_model(tmp_path: Path, layers: tuple[nn.Module, ...]) -> None:
    other = nn.Sequential(*layers)
    refused(TrainState(other, torch.optim.AdamW(other.parameters())), saved(tmp_path))


# The checkpoints of a run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path / "checkpoints"), new_state()
    checkpoints.save(advance(state, 9))
    checkpoints.save(advance(state))
    restored = new_state(1)
    assert checkpoints.restore(restored)
    assert_equal(snapshot(restored), snapshot(state))


def test_without_checkpoint_the_state_stays(tmp_path: Path) -> None:
    state = new_state()
    assert not Checkpoints(tmp_path / "checkpoints").restore(state)
    assert_equal(snapshot(state), snapshot(new_state()))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_checkpoints_stay(tmp_path: Path, keep: int) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep), new_state()
    for _ in range(5):
        checkpoints.save(advance(state))
    assert names(tmp_path) == [f"step-{step:08d}" for step in range(6 - keep, 6)]


def test_the_same_step_may_be_saved_again(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path), advance(new_state())
    checkpoints.save(state)
    checkpoints.save(state)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("failing", ["bksdm.distill.state.save_file", "os.replace"])
def test_a_failure_while_saving_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep=1), advance(new_state())
    checkpoints.save(state)
    earlier = snapshot(state)
    advance(state)
    with monkeypatch.context() as broken:
        broken.setattr(failing, no_space)
        with pytest.raises(InputError, match=r"No space left.*make room"):
            checkpoints.save(state)
    restored = new_state(1)
    assert checkpoints.restore(restored)
    assert_equal(snapshot(restored), earlier)
    assert checkpoints.all() == [tmp_path / "step-00000001"]


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_a_kill_left_half_written_is_not_taken(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path), advance(new_state())
    checkpoints.save(state)
    earlier = snapshot(state)
    half = tmp_path / ".step-00000002.partial"
    shutil.copytree(tmp_path / "step-00000001", half)
    (half / "tensors.safetensors").write_bytes(b"half")
    restored = new_state(1)
    checkpoints.restore(restored)
    assert_equal(snapshot(restored), earlier)
    checkpoints.save(advance(restored))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_serves(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path), new_state()
    checkpoints.save(advance(state))
    earlier = snapshot(state)
    checkpoints.save(advance(state))
    (tmp_path / "step-00000002" / "tensors.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"step-00000002 cannot be read .* remove it to go on from the one before"):
        checkpoints.restore(new_state())
    shutil.rmtree(tmp_path / "step-00000002")
    restored = new_state(1)
    checkpoints.restore(restored)
    assert_equal(snapshot(restored), earlier)


def test_saving_changes_nothing_in_the_state(tmp_path: Path) -> None:
    state = advance(new_state(), 2)
    before = copy.deepcopy(snapshot(state))
    state.save(tmp_path / "checkpoint")
    assert_equal(snapshot(state), before)
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 2
