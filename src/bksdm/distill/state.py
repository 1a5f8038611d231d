"""Everything that a resumed run needs, in one object, and its way to the disk and back.

A checkpoint is a folder with `tensors.safetensors` (weights, EMA, optimizer moments) and
`state.json` (step, samples, loss scale). It appears under its name only when it is whole.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bksdm.common.errors import InputError
from bksdm.common.runs import replace_folder


class Ema:
    r"""Exponential moving average of a model's parameters.

    $\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta$ with $d = \min(\text{decay}, (1 + n) / (10 + n))$
    after $n$ updates, so that the average forgets the first weights quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], step: int) -> None:
        """Move towards `parameters`, in the order of the model's own, after update number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(parameters), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.copy_(self.average[name])


@dataclass
class TrainState:
    """A model in training after `step` optimizer steps on `samples` samples; there is no other hidden state.

    `samples` is the position in the data: with it, a run goes on with another number of processes, or another
    batch size, from where it was.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    step: int = 0
    samples: int = 0

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained; finding it anew at every step takes milliseconds."""
        return list(self.model.parameters())

    def tensors(self) -> dict[str, Tensor]:
        held = {f"model.{name}": p for name, p in self.model.state_dict().items()}
        if self.ema:
            held |= {f"ema.{name}": p for name, p in self.ema.average.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            held |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        return held

    def save(self, folder: Path) -> None:
        """Write a checkpoint; `folder` is either as it was before or complete."""
        with replace_folder(folder) as partial:
            tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors().items()}
            save_file(tensors, partial / "tensors.safetensors")
            scalars = {"step": self.step, "samples": self.samples, "scaler": self.scaler.state_dict()}
            (partial / "state.json").write_text(json.dumps(scalars))

    def load(self, folder: Path) -> None:
        """Take over a checkpoint.

        Raises:
            InputError: The checkpoint is cut short or belongs to another model.
        """
        try:
            scalars = json.loads((folder / "state.json").read_text())
            tensors = load_file(folder / "tensors.safetensors")
            self._take(tensors, scalars)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"checkpoint {folder} cannot be read ({_first_line(error)}); remove it to go on from the one before"
            ) from error

    def _take(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.model.load_state_dict(_under("model.", tensors))
        if self.ema:
            for name, value in _under("ema.", tensors).items():
                self.ema.average[name].copy_(value)
        moments: dict[int, dict[str, Tensor]] = {}
        stepped = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for key, value in _under("optimizer.", tensors).items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = _laid_out_as(value, stepped[int(index)])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.scaler.load_state_dict(scalars["scaler"])
        self.step, self.samples = scalars["step"], scalars["samples"]


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """While inside, the model has its averaged weights, if there are any; after it, its own to the bit."""
    if state.ema is None:
        yield
        return
    own = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    state.ema.copy_to(state.model)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in state.model.named_parameters():
                p.copy_(own[name])


class Checkpoints:
    """The checkpoints of one run: `folder/step-00001000`, the last `keep` of them."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Path]:
        return sorted(self.folder.glob("step-????????"))

    def steps_done(self) -> int:
        """Steps after which the newest checkpoint was written; 0 where there is none."""
        found = self.all()
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def restore(self, state: TrainState) -> bool:
        """Load the newest checkpoint into `state`; False where there is none."""
        found = self.all()
        if found:
            state.load(found[-1])
        return bool(found)

    def save(self, state: TrainState) -> None:
        """Write the state, then drop what is older than the last `keep`.

        Raises:
            InputError: It cannot be written; the earlier checkpoints stay as they are.
        """
        target = self.folder / f"step-{state.step:08d}"
        try:
            state.save(target)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"checkpoint {target} cannot be written ({_first_line(error)}); make room and run the same command "
                f"again, it goes on from the checkpoint before"
            ) from error
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _laid_out_as(value: Tensor, parameter: Tensor) -> Tensor:
    """Moments in the memory layout of their parameter: files have none, and the fused AdamW takes it for granted."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value) if value.shape == parameter.shape else value


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
