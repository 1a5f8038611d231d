"""What carries adapters over."""

from dataclasses import dataclass

from bksdm.options.shared import Printing, own_first


@own_first
@dataclass(frozen=True)
class AdaptOptions(Printing):
    """Carry a LoRA, a textual inversion or a ControlNet of a teacher over to its student.

    Attributes:
        adapter: LoRA or textual inversion (.safetensors file, or folder of a LoRA), or folder of a ControlNet.
        model: Folder of the student, that `bksdm prune` or `bksdm distill` wrote.
        teacher: Folder, .safetensors file, Hub id, 'emoji' or 'emoji-flow', that the student was made from.
        out: Folder for what becomes of it.
    """

    adapter: str
    model: str
    teacher: str
    out: str
