"""What original checkpoints call the layers of a denoiser, one of which may be several in diffusers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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

    def made(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A tensor of the layer, of those of diffusers by name."""
        import torch

        whole = torch.cat([tensors[part] for part in self.parts]) if len(self.parts) > 1 else tensors[self.parts[0]]
        return torch.cat(whole.chunk(2)[::-1]) if self.turned else whole


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


def original_tensors(
    layers: Mapping[str, Joined], others: Mapping[str, str], names: Collection[str]
) -> tuple[dict[str, Joined], set[str]]:
    """The tensors of a network by their original names, and those that have none.

    Arguments:
        layers: As for `joined_layers`.
        others: Names of tensors that are of no such layer, by their original names; `{n}` as before.
        names: Of the tensors of the network.
    """
    made = {}
    for layer, joined in joined_layers(layers, {name.rpartition(".")[0] for name in names}).items():
        for kind in ("weight", "bias"):
            parts = tuple(f"{part}.{kind}" for part in joined.parts)
            if all(part in names for part in parts):
                made[f"{layer}.{kind}"] = Joined(parts, joined.turned)
    made |= joined_layers({name: Joined((other,)) for name, other in others.items()}, names)
    return made, set(names) - {part for joined in made.values() for part in joined.parts}
