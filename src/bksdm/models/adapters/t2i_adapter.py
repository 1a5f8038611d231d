"""A T2I-Adapter (arXiv 2302.08453) of a teacher in front of its student.

It gives one residual for each down stage of a U-Net, which is added after the stage's last layer, and for some U-Nets
one for the middle. Stages keep their places, so that a student takes it as it is: what it gives for what went is not
asked for.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from bksdm.common.errors import InputError

_PLACE = r"(adapter\.)?body\.(?P<number>\d+)\."
# Light ones have narrower blocks inside; what comes out last counts.
_WIDTHS = (re.compile(_PLACE + r"(resnets\.\d+\.)?block2\.weight"), re.compile(_PLACE + r"out_conv\.weight"))
_FIRST = re.compile(r"(adapter\.)?(conv_in|body\.0\.in_conv)\.weight")


def widths_of(tensors: Mapping[str, Tensor], stages: int) -> list[int]:
    """The channels of what it gives to each of `stages` stages; its blocks are divided among them evenly."""
    blocks: dict[int, int] = {}
    for width in _WIDTHS:
        blocks |= {int(match["number"]): t.shape[0] for name, t in tensors.items() if (match := width.fullmatch(name))}
    if not blocks or len(blocks) % stages:
        return [blocks[number] for number in sorted(blocks)]
    return [blocks[number] for number in sorted(blocks)][:: len(blocks) // stages]


def check_scale(tensors: Mapping[str, Tensor], scale: int, source: object) -> None:
    """Refuse one whose first residual has not a side of 1 / `scale` of the picture's: it takes the pixels as channels.

    Raises:
        InputError: Naming how many channels it takes.
    """
    takes = next((tensor.shape[1] for name, tensor in tensors.items() if _FIRST.fullmatch(name)), None)
    if takes is not None and takes not in (wanted := (scale**2, 3 * scale**2)):
        raise InputError(
            f"T2I-Adapter {source} makes {takes} channels of a picture, and one of this teacher {wanted[0]} or "
            f"{wanted[1]}; it is of another family, so give one of this teacher"
        )
