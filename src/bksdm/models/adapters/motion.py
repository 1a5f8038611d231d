"""Motion modules (AnimateDiff, arXiv 2307.04725) of a teacher for its student.

There is one behind each layer of a U-Net, under the number of its stage and layer. A student takes those of the layers
that it kept.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from torch import Tensor, nn

from bksdm.common.errors import InputError
from bksdm.families.recipe import Config, Pruning
from bksdm.families.weightless import without_weights

_MODULE = re.compile(r"(?P<before>.*?)(?P<stage>(?:down|up)_blocks\.\d+)\.motion_modules\.(?P<layer>\d+)\.(?P<rest>.+)")
_ATTENDS = "UNetMidBlock2DCrossAttn"
_MID = re.compile(r".*?mid_block\.motion_modules\..+")
_INPUT = re.compile(r"conv_in\.(weight|bias)")  # PIA's (arXiv 2312.13964), which no recipe moves


def renumbered(tensors: Mapping[str, Tensor], pruning: Pruning) -> tuple[dict[str, Tensor], dict[str, str | None]]:
    """Motion modules for a student, and what became of each of the teacher's.

    Arguments:
        tensors: Of the teacher's, in the names of AnimateDiff or of diffusers.
        pruning: Which layer is which.

    Returns:
        The tensors, and the teacher's modules with the student's or None.

    Raises:
        InputError: There are tensors besides, as in a whole U-Net or a SparseCtrl.
    """
    kept: dict[str, Tensor] = {}
    places: dict[str, str | None] = {}
    for name, tensor in tensors.items():
        if match := _MODULE.fullmatch(name):
            there = f"{match['stage']}.motion_modules.{match['layer']}"
            layer = pruning.student_key(f"{match['stage']}.resnets.{match['layer']}")
            here = None if layer is None else layer.replace("resnets", "motion_modules")
            places[there] = here
            if here is not None:
                kept[f"{match['before']}{here}.{match['rest']}"] = tensor
        elif _MID.fullmatch(name):
            stays = _mid_attends(pruning.student_config)
            places["mid_block.motion_modules"] = "mid_block.motion_modules" if stays else None
            if stays:
                kept[name] = tensor
        elif _INPUT.fullmatch(name):
            kept[name] = tensor
        else:
            raise InputError(f"it has {name}, which is no motion module's; give motion modules alone")
    return kept, places


def check_layers(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: Path) -> None:
    """Refuse motion modules for layers that a U-Net has not, or has with other widths.

    Arguments:
        tensors: The modules'.
        weights: The U-Net's, on any device.
        file: What to call them.

    Raises:
        InputError: Naming the first such module.
    """
    for name, tensor in tensors.items():
        match = _MODULE.fullmatch(name)
        if match and match["rest"].removeprefix("temporal_transformer.") == "norm.weight":
            layer = weights.get(f"{match['stage']}.resnets.{match['layer']}.conv2.weight")
            if layer is None or layer.shape[0] != tensor.shape[0]:
                there = "none" if layer is None else f"one of {layer.shape[0]}"
                raise InputError(
                    f"motion module {file} has a module of {tensor.shape[0]} channels behind layer {match['layer']} of "
                    f"{match['stage']}, where the teacher has {there}; it is of another family, so give one of "
                    f"this teacher"
                )


def student_config(config: Config, student: Config) -> dict[str, Any]:
    """The config of a `MotionAdapter` for a student's U-Net."""
    stages = len(student["block_out_channels"])
    cut = {key: list(value[:stages]) if isinstance(value, (list, tuple)) else value for key, value in config.items()}
    return cut | {
        "block_out_channels": list(student["block_out_channels"]),
        "motion_layers_per_block": student["layers_per_block"],
        "use_motion_mid_block": bool(config.get("use_motion_mid_block", True)) and _mid_attends(student),
    }


def motion_unet(unet: UNet2DConditionModel, motion: MotionAdapter) -> UNetMotionModel:
    """A U-Net with motion modules, for `AnimateDiffPipeline`, also where the middle block is gone or a ResNet alone.

    diffusers' own `UNetMotionModel.from_unet2d` fails there, and forgets how the U-Net is told of pooled captions.

    Arguments:
        unet: A teacher's or a student's; as many layers in every stage.
        motion: Made for it, as `bksdm adapt` writes it.
    """
    made = UNetMotionModel.from_unet2d(unet if _mid_attends(unet.config) else _with_mid(unet), motion)
    if not _mid_attends(unet.config):
        made.mid_block = None if unet.mid_block is None else _OneResNet(unet.mid_block.resnets[0])
    if hasattr(unet, "add_embedding"):  # whose weights diffusers leaves random
        made.add_embedding.load_state_dict(unet.add_embedding.state_dict())
    return made


def _with_mid(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same U-Net with a middle block of no worth."""
    with without_weights():
        whole = UNet2DConditionModel.from_config({**unet.config, "mid_block_type": _ATTENDS})
    whole.load_state_dict(unet.state_dict(), strict=False, assign=True)
    whole.mid_block.to_empty(device="cpu")
    return whole


def _mid_attends(config: Config) -> bool:
    """Whether the middle block has an attention, behind which motion modules stand."""
    return bool(config.get("mid_block_type", _ATTENDS) == _ATTENDS)


class _OneResNet(nn.Module):
    """A middle block that is a ResNet alone, and is told of captions and frames all the same."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.resnet = resnet

    def forward(self, hidden_states: Tensor, temb: Tensor, **_: Any) -> Tensor:
        hidden: Tensor = self.resnet(hidden_states, temb)
        return hidden
