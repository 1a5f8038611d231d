"""What can be taken out of a denoiser by itself, and what of it can go together, whatever the family."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["down", "mid", "innermost", "up", "block"]
Names = frozenset[str]


@dataclass(frozen=True)
class Unit:
    """A part of a denoiser that can be bypassed while the rest stays as it is.

    Attributes:
        name: For people and files, such as "down_blocks.0 layer 1" or "transformer_blocks 3".
        kind: Where it lies.
        paths: Paths of its modules.
        keeps_shortcut: Whether its ResNet's shortcut convolution stays in a bypass, since channels change there.
        why_it_stays: Why no recipe removes it; empty if one does.
    """

    name: str
    kind: Kind
    paths: tuple[str, ...]
    keeps_shortcut: bool = False
    why_it_stays: str = ""

    @property
    def removable(self) -> bool:
        """Whether a recipe can remove it, perhaps only together with others."""
        return not self.why_it_stays


@dataclass(frozen=True)
class Removals:
    """Units that can go together: those in `always`, and of every group what one of its choices names.

    Attributes:
        always: Names of units that go in any case.
        groups: For every independent part of the rest, its choices; of the first, nothing goes.
    """

    always: Names
    groups: tuple[tuple["Removals", ...], ...] = ()
