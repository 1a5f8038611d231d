"""A T2I-Adapter (arXiv 2302.08453) of a teacher in front of its student.

It gives one residual for each down stage of a U-Net, which is added after the stage's last layer. Stages keep their
places, so that a student takes it as it is: what it gives for a stage that went is not asked for.
"""

import re
from collections.abc import Mapping

from torch import Tensor

_PLACE = r"(adapter\.)?body\.(?P<number>\d+)\."
# Light ones have narrower blocks inside; what comes out last counts.
_WIDTHS = (re.compile(_PLACE + r"(resnets\.\d+\.)?block2\.weight"), re.compile(_PLACE + r"out_conv\.weight"))


def stage_widths(tensors: Mapping[str, Tensor], stages: int) -> list[int]:
    """The channels of what it gives to each of `stages` stages; its blocks are divided among them evenly."""
    blocks: dict[int, int] = {}
    for width in _WIDTHS:
        blocks |= {int(match["number"]): t.shape[0] for name, t in tensors.items() if (match := width.fullmatch(name))}
    if not blocks or len(blocks) % stages:
        return [blocks[number] for number in sorted(blocks)]
    return [blocks[number] for number in sorted(blocks)][:: len(blocks) // stages]
