"""What original checkpoints call the layers of a denoiser, one of which may be several in diffusers."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class Joined:
    """A layer of an original checkpoint.

    Attributes:
        parts: Paths of the layers of diffusers whose outputs, one after the other, are its own.
        turned: Whether the halves of its outputs change places in diffusers.
    """

    parts: tuple[str, ...]
    turned: bool = False

    @property
    def as_it_is(self) -> bool:
        """Whether it is one layer here too."""
        return len(self.parts) == 1 and not self.turned


def joined_layers(names: Mapping[str, Joined], paths: Collection[str]) -> dict[str, Joined]:
    """The layers of a network by their original names.

    Arguments:
        names: Of its family; `{n}` stands for the number of a block.
        paths: Of the layers of the network.
    """
    made = {}
    for name, joined in names.items():
        for number in range(1) if "{n}" not in name else count():
            parts = tuple(part.replace("{n}", str(number)) for part in joined.parts)
            if not all(part in paths for part in parts):
                break
            made[name.replace("{n}", str(number))] = Joined(parts, joined.turned)
    return made
