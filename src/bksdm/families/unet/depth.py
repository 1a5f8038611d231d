"""How many transformer layers the attentions of a `UNet2DConditionModel` hold, in its config.

`transformer_layers_per_block` has a number for each stage, or a list with one for each of its layers. It holds for the
up stages too, unless `reverse_transformer_layers_per_block`, innermost first, says otherwise. The middle block has no
entry of its own: its attention is as deep as the innermost stage's first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bksdm.families.recipe import Config

DOWN, UP = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
Counts = tuple[int, ...]


@dataclass(frozen=True)
class Depths:
    """Transformer layers of every attention.

    Attributes:
        down: Of a stage's attentions, outermost stage first; empty for a stage that has none.
        up: Likewise.
        mid: Of the middle block's attention; 0 where it has none.
    """

    down: tuple[Counts, ...]
    up: tuple[Counts, ...]
    mid: int

    @classmethod
    def of(
        cls, config: Config, layers: Sequence[int], down: Sequence[bool], up: Sequence[bool], *, mid: bool
    ) -> "Depths":
        """Read a config.

        Arguments:
            config: Of a U-Net.
            layers: Its layers a down stage.
            down, up: Whether the stages have attentions.
            mid: Whether the middle block has.
        """
        inward = listed(config.get(DOWN, 1), len(layers))
        outward = list(config.get(UP) or inward[::-1])[::-1]
        return cls(
            tuple(_counts(*stage) for stage in zip(inward, layers, down, strict=True)),
            tuple(_counts(entry, n + 1, attends) for entry, n, attends in zip(outward, layers, up, strict=True)),
            listed(inward[-1], 1)[0] if mid else 0,
        )

    def __iter__(self) -> Iterator[int]:
        """Every count, in the order of the data, but for stages inside out on the way up."""
        for stage in (*self.down, (self.mid,) if self.mid else (), *self.up):
            yield from stage

    def entries(self, config: Config) -> dict[str, Any]:
        """The entries of a config that say so; where there is no attention, what is in `config`."""
        idle = [listed(entry, 1)[0] for entry in listed(config.get(DOWN, 1), len(self.down))]
        idle[-1] = self.mid or idle[-1]
        down, up = ([_entry(*stage) for stage in zip(side, idle, strict=True)] for side in (self.down, self.up))
        if down == up and not config.get(UP) and all(isinstance(entry, int) for entry in down):
            return {DOWN: down}
        return {DOWN: down, UP: up[::-1]}


def objections(config: Config, layers: Sequence[int]) -> Iterator[str]:
    """Why the entries of a config with these layers in its down stages cannot be read, if they cannot."""
    inward, outward = config.get(DOWN, 1), config.get(UP)
    entries = listed(inward, len(layers))
    yield from _unreadable(DOWN, entries, layers)
    if outward:
        yield from _unreadable(UP, listed(outward, 1), [count + 1 for count in reversed(layers)])
    elif not all(isinstance(entry, int) for entry in entries):
        yield f"its {DOWN} is {inward}, and it has no {UP}"


def listed(value: Any, count: int) -> list[Any]:
    """An entry of a config that holds one value for all, or one for each of `count`."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _unreadable(key: str, entries: Sequence[Any], layers: Sequence[int]) -> Iterator[str]:
    if len(entries) != len(layers):
        yield f"its {key} lists {len(entries)} stages, and it has {len(layers)}"
    for entry, count in zip(entries, layers, strict=True):
        counts = listed(entry, count)
        if len(counts) < count or not all(type(one) is int and one >= 0 for one in counts):
            yield f"its {key} has {entry!r} for a stage of {count} layers"


def _counts(entry: Any, layers: int, attends: bool) -> Counts:
    return tuple(listed(entry, layers)[:layers]) if attends else ()


def _entry(counts: Counts, idle: int) -> int | list[int]:
    if len(set(counts)) > 1:
        return list(counts)
    return counts[0] if counts else idle
