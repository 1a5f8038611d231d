"""A ControlNet (arXiv 2302.05543) of a teacher in front of its student.

A ControlNet adds to each skip connection of the U-Net, and to what comes out of its middle. A student has fewer of
those, so that of the ControlNet's residuals it takes the ones of the layers that it kept. The ControlNet stays whole,
for what it computes late depends on what it computes early.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch import Tensor

from bksdm.common.errors import InputError, one_line
from bksdm.families import skip_connections
from bksdm.families.family import Family
from bksdm.families.recipe import Config, Pruning
from bksdm.families.weightless import without_weights
from bksdm.models.adapters.block_controlnet import StudentFluxControlNet, StudentZImageControlNet
from bksdm.models.adapters.kinds import class_name, read_choice, read_tensors
from bksdm.models.pipelines import load_network

SELECTION_FILE = "residuals.json"
_HINT = re.compile(
    r"((control_model\.)?input_hint_block\.|controlnet_cond_embedding\.(blocks\.)?)(?P<place>\d+|conv_in|conv_out)\.weight"
)


@dataclass(frozen=True)
class Selection:
    """Which of a ControlNet's residuals a student takes.

    Attributes:
        skips: Of its skip connections, in their order, the numbers of the teacher's.
        mid: Whether it takes the one of the middle.
        taps: The teacher's modules that those are the outputs of.
    """

    skips: tuple[int, ...]
    mid: bool
    taps: tuple[str, ...]

    @classmethod
    def of(cls, pruning: Pruning, teacher: Config) -> "Selection":
        """By the layers that a recipe keeps.

        A student without the middle block takes the middle's residual all the same where the stage around it stays:
        it is added in the same place.

        Arguments:
            pruning: What the recipe does.
            teacher: The config of the teacher's U-Net.
        """
        whole = skip_connections(teacher)
        taps = tuple(pruning.teacher_key(path) for path in skip_connections(pruning.student_config))
        stays = len(pruning.student_config["block_out_channels"]) == len(teacher["block_out_channels"])
        return cls(tuple(whole.index(tap) for tap in taps), stays, taps)

    def to_dict(self) -> dict[str, Any]:
        return {"skips": list(self.skips), "mid": self.mid, "taps": list(self.taps)}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> "Selection":
        """Undo `to_dict`."""
        return cls(tuple(map(int, values["skips"])), bool(values["mid"]), tuple(map(str, values["taps"])))


class StudentControlNet(ControlNetModel):  # type: ignore[misc]
    """A ControlNet that gives the residuals which a student takes; stock pipelines take it for one of theirs."""

    selection: Selection | None = None
    selects = Selection.of_dict

    def forward(self, *given: Any, return_dict: bool = True, **more: Any) -> Any:
        """As that of `ControlNetModel`, with the residuals that are selected."""
        downs, mid = super().forward(*given, return_dict=False, **more)
        if self.selection is not None:
            downs, mid = selected(downs, mid, self.selection)
        if not return_dict:
            return downs, mid
        return ControlNetOutput(down_block_res_samples=downs, mid_block_res_sample=mid)


def selected(downs: Sequence[Tensor], mid: Tensor, selection: Selection) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of the residuals of skip connections, each (B, C, h, w), and of the middle those of a selection.

    A middle that takes none gets a zero, without which a U-Net of diffusers would leave out all the others.
    """
    nothing = torch.zeros_like(mid[:, :1, :1, :1])
    return tuple(downs[number] for number in selection.skips), mid if selection.mid else nothing


def read_single_file(file: Path, teacher: UNet2DConditionModel, family: Family) -> ControlNetModel:
    """The ControlNet in one file, in the names of its authors or of diffusers, for a teacher whose config it shares.

    Arguments:
        file: With the tensors.
        teacher: Its U-Net; the weights are not used and may be on the meta device.
        family: Of the teacher.

    Raises:
        InputError: It is damaged, or was not made for a U-Net of this shape.
    """
    tensors, _ = read_tensors(file)
    if "difference" in tensors:
        raise InputError(f"controlnet {file} holds differences from a U-Net; give a whole ControlNet")
    hint = _hint_convolutions(tensors)
    with without_weights():
        made = ControlNetModel.from_unet(
            teacher,
            conditioning_embedding_out_channels=tuple(shape[0] for shape in hint[:-1:2]),
            load_weights_from_unet=False,
            conditioning_channels=hint[0][1],
        )
    try:
        names = {name: name for name in made.state_dict()}
        if "conv_in.weight" not in tensors:
            prefix = "control_model." if any(name.startswith("control_model.") for name in tensors) else ""
            names = {name: prefix + there for name, there in _authors_names(names, family).items()}
        whole = {name: tensors[there].float() for name, there in names.items()}
        made.load_state_dict(whole, strict=True, assign=True)
    except (RuntimeError, KeyError) as error:
        reason = one_line(error)
        raise InputError(f"controlnet {file} was not made for a U-Net of this teacher's shape ({reason})") from error
    left = next((name for name in tensors if name not in names.values()), None)
    if left is not None:
        raise InputError(f"controlnet {file} has {left}, which is no part of a ControlNet; give one by itself")
    return made.eval()


def _authors_names(keys: Iterable[str], family: Family) -> dict[str, str]:
    """What the tensors of a ControlNet are called in the files of its authors."""
    parts = [key.rpartition(".") for key in keys]
    places = family.original_paths(dict.fromkeys(path for path, _, _ in parts if not path.startswith("controlnet_")))
    blocks = sum("controlnet_cond_embedding.blocks" in path for path, _, kind in parts if kind == "weight")
    hints = ["conv_in", *(f"blocks.{number}" for number in range(blocks)), "conv_out"]
    places |= {f"controlnet_cond_embedding.{name}": f"input_hint_block.{2 * n}" for n, name in enumerate(hints)}
    places |= {f"controlnet_down_blocks.{n}": f"zero_convs.{n}.0" for n in range(len(parts))}
    places |= {"controlnet_mid_block": "middle_block_out.0"}
    return {f"{path}.{kind}": f"{places[path]}.{kind}" for path, _, kind in parts}


def _hint_convolutions(tensors: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """The shapes of the convolutions that the picture goes through, in their order."""
    found = {match["place"]: tuple(t.shape) for name, t in tensors.items() if (match := _HINT.fullmatch(name))}
    ends = {"conv_in": -math.inf, "conv_out": math.inf}
    return [found[place] for place in sorted(found, key=lambda place: ends.get(place) or int(place))]


_STUDENTS: dict[str, Any] = {
    "ControlNetModel": StudentControlNet,
    "FluxControlNetModel": StudentFluxControlNet,
    "ZImageControlNetModel": StudentZImageControlNet,
}


def load_controlnet(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The ControlNet in a folder that `bksdm adapt` wrote, or any other, on the CPU and in eval mode.

    Raises:
        InputError: There is none, it is damaged, or its weights are not safetensors.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"controlnet {folder} has no config.json; give the folder of a ControlNetModel")
    file, name = path / SELECTION_FILE, class_name(path)
    if name not in _STUDENTS:
        raise InputError(f"controlnet {folder} is a {name}; give one of {', '.join(_STUDENTS)}")
    kind = _STUDENTS[name]
    network = load_network(path, kind.__base__, dtype)
    network.__class__ = kind  # the same network, of which `forward` gives less
    network.selection = read_choice(file, kind.selects) if file.is_file() else None
    return network
