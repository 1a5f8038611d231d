"""A ControlNet of a teacher that is stacks of blocks, in front of its student.

It gives residuals that are added after blocks of the teacher, by their numbers. Flux.1 has fewer residuals than blocks
and spreads them by dividing numbers, so that a shallower model meets others than its teacher did, and some never;
Z-Image has them by number, so that those of higher numbers than a model has blocks are lost. Here each block of the
student is given what the teacher's block was given. What Z-Image added after a block that went is added after the one
before it, if nothing else is.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import FluxControlNetModel, ZImageControlNetModel
from diffusers.models.controlnets.controlnet_flux import FluxControlNetOutput
from torch import Tensor

from bksdm.families.recipe import Pruning

DOUBLE, SINGLE, ONLY = "transformer_blocks", "single_transformer_blocks", "layers"


@dataclass(frozen=True)
class Places:
    """Whose residual each block of a student takes.

    Attributes:
        blocks: By the stack, for each block the number of the teacher's; None for nothing.
        depths: By the stack, how many blocks the teacher has.
    """

    blocks: Mapping[str, tuple[int | None, ...]]
    depths: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {"blocks": {stack: list(own) for stack, own in self.blocks.items()}, "depths": dict(self.depths)}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> "Places":
        """Undo `to_dict`."""
        blocks = {stack: tuple(n if n is None else int(n) for n in own) for stack, own in values["blocks"].items()}
        return cls(blocks, {stack: int(depth) for stack, depth in values["depths"].items()})


def inherited(pruning: Pruning, depths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Which of the teacher's blocks each of the student's is, by the stack.

    Arguments:
        pruning: What the recipe does.
        depths: By the stack, how many blocks the student has.
    """
    return {
        stack: tuple(int(pruning.teacher_key(f"{stack}.{number}").rpartition(".")[2]) for number in range(depth))
        for stack, depth in depths.items()
    }


def with_those_that_went(kept: Sequence[int], places: Iterable[int]) -> tuple[int | None, ...]:
    """Whose residual each block takes, where a teacher has residuals at some places alone.

    Arguments:
        kept: The teacher's blocks that a student has, ascending.
        places: The teacher's blocks with residuals.
    """
    taken: dict[int, int] = {}
    for place in sorted(places, key=lambda place: place not in kept):  # what stays comes first
        before = max((number for number in kept if number <= place), default=None)
        if before is not None:
            taken.setdefault(before, place)
    return tuple(taken.get(number) for number in kept)


class StudentFluxControlNet(FluxControlNetModel):  # type: ignore[misc]
    """One that gives a residual for each block of a student; stock pipelines take it for one of theirs."""

    selection: Places | None = None
    selects = Places.of_dict

    def forward(self, *given: Any, return_dict: bool = True, **more: Any) -> Any:
        """As that of `FluxControlNetModel`, with as many residuals as the student has blocks."""
        double, single = super().forward(*given, return_dict=False, **more)
        if self.selection is not None:
            again = self.input_hint_block is not None  # the pipeline goes over the residuals of such again and again
            double, single = self._spread(DOUBLE, double, again=again), self._spread(SINGLE, single, again=False)
        if not return_dict:
            return double, single
        return FluxControlNetOutput(controlnet_block_samples=double, controlnet_single_block_samples=single)

    def _spread(self, stack: str, residuals: Sequence[Tensor] | None, *, again: bool) -> list[Tensor] | None:
        """A residual for each block: that which diffusers adds after the teacher's."""
        assert self.selection is not None
        if residuals is None:
            return None
        each = math.ceil(self.selection.depths[stack] / len(residuals))
        numbers = [number or 0 for number in self.selection.blocks[stack]]
        return [residuals[number % len(residuals) if again else number // each] for number in numbers]


class StudentZImageControlNet(ZImageControlNetModel):  # type: ignore[misc]
    """The same for Z-Image."""

    selection: Places | None = None
    selects = Places.of_dict

    def forward(self, *given: Any, **more: Any) -> dict[int, Tensor]:
        """As that of `ZImageControlNetModel`, by the numbers of the student's blocks."""
        found: dict[int, Tensor] = super().forward(*given, **more)
        if self.selection is None:
            return found
        return {own: found[number] for own, number in enumerate(self.selection.blocks[ONLY]) if number is not None}
