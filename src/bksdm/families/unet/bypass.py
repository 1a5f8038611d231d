"""The U-Net of Stable Diffusion or SDXL without some of its units, for a while and in memory.

A layer hands its hidden states on: in a down stage they are its skip connection too, in an up stage the skip
connection that it took is dropped. Where channels change, the ResNet's shortcut convolution alone stays. A transformer
layer hands on what it took. The middle block and the innermost stages are taken out, as in a student. No weight is
touched.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from bksdm.families.units import Unit


@contextmanager
def bypassed(unet: UNet2DConditionModel, units: Iterable[Unit]) -> Iterator[UNet2DConditionModel]:
    """`unet` without these of its units inside the block; what leaves the block is as it was.

    Arguments:
        unet: The whole network.
        units: From `families.units` of its config.
    """
    with ExitStack() as undo:
        for unit in sorted(units, key=_outside):
            for owner, name, instead in _changes(unet, unit):
                undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, instead)
        yield unet


def _outside(unit: Unit) -> tuple[bool, int]:
    """What goes later: a unit after those inside of it; last the innermost stages, which move the paths of others."""
    return unit.kind == "innermost", -unit.paths[0].count(".")


def _changes(unet: UNet2DConditionModel, unit: Unit) -> Iterator[tuple[nn.Module, str, Any]]:
    """(module, attribute, what stands there instead)."""
    if unit.paths == ("mid_block",):
        yield unet, "mid_block", None
    elif unit.kind == "innermost":
        dropped = sum(path.startswith("up_blocks.") for path in unit.paths)
        stages = len(unet.down_blocks) - dropped
        yield unet.down_blocks[stages - 1], "downsamplers", None
        yield unet, "down_blocks", unet.down_blocks[:stages]
        yield unet, "up_blocks", unet.up_blocks[dropped:]
        yield unet, "num_upsamplers", unet.num_upsamplers - dropped
    else:
        for path in unit.paths:
            owner, _, name = path.rpartition(".")
            yield unet.get_submodule(owner), name, _stand_in(unet.get_submodule(path), unit.keeps_shortcut)


def _stand_in(module: Any, keeps_shortcut: bool) -> nn.Module:
    if isinstance(module, BasicTransformerBlock):
        return _HiddenStates()
    if not hasattr(module, "conv1"):
        return _Through()
    return _Shortcut(module) if keeps_shortcut else _HiddenStates(module.out_channels)


class _HiddenStates(nn.Module):
    """Stands where a ResNet was, or a transformer layer: the hidden states, without a skip connection behind them."""

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self._channels = channels

    def forward(self, joined: Tensor, *_: Any, **__: Any) -> Tensor:
        return joined[:, : self._channels]


class _Shortcut(nn.Module):
    """Stands where a ResNet was whose channels change: its shortcut convolution alone."""

    def __init__(self, resnet: Any) -> None:
        super().__init__()
        self.conv_shortcut = resnet.conv_shortcut
        self._scale = resnet.output_scale_factor

    def forward(self, joined: Tensor, *_: Any, **__: Any) -> Tensor:
        shortened: Tensor = self.conv_shortcut(joined) / self._scale
        return shortened


class _Through(nn.Module):
    """Stands where an attention was."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (hidden_states,)
