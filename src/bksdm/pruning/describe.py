"""What a recipe does to a teacher, for people and for programs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bksdm.families import derive, family_of, readers
from bksdm.families.reader import Reader
from bksdm.families.recipe import Pruning, Recipe, Stage, load_recipe
from bksdm.models.configs import context_tokens, load_structure
from bksdm.pruning.cost import TOKENS, UNetCost, unet_cost

_DEEP = re.compile(r"A\d")
_DEPTHS = " (A10 of ten transformer layers, A4/10 of which four stay)"

_A_LINE = 20  # blocks

WHOLE = Recipe(name="whole", summary="The model as it is.")


@dataclass(frozen=True)
class Description:
    """A U-Net and what a recipe leaves of it.

    Attributes:
        pruning: What follows from the recipe.
        teacher: Cost of the U-Net as it is.
        student: Cost of what is left.
    """

    pruning: Pruning
    teacher: UNetCost
    student: UNetCost

    def to_dict(self) -> dict[str, Any]:
        """The object that `bksdm describe --json` prints."""
        noun = family_of(self.pruning.student_config).denoiser
        height, width = self.teacher.latent_size
        return {
            "recipe": self.pruning.recipe.to_dict(),
            "latent_size": height if height == width else [height, width],
            noun: _cost(self.student),
            f"teacher_{noun}": _cost(self.teacher),
            "removed": list(self.pruning.removed),
            "taps": [{"teacher": tap.teacher, "student": tap.student} for tap in self.pruning.taps],
            "read_by": [reader.to_dict() for reader in self.readers()],
        }

    def readers(self) -> list[Reader]:
        """What is known of programs that may read the student."""
        return readers(self.pruning.student_config)

    def text(self) -> str:
        """The drawing, what it costs, and which programs read what a recipe leaves."""
        lines = [self.drawing(), ""]
        if self.student == self.teacher:
            lines.append(_line(family_of(self.pruning.student_config).noun, self.teacher))
        else:
            share = 1 - self.student.params / self.teacher.params
            lines += [_line("teacher", self.teacher), _line("student", self.student)]
            gone = len(self.pruning.removed)
            lines.append(f"{share:.1%} of the parameters removed, {gone} module{'' if gone == 1 else 's'}")
            lines += ["", "who reads it", *(f"- {reader}" for reader in self.readers())]
        return "\n".join(lines)

    def drawing(self) -> str:
        """The network in text, as it is drawn: a stack in a line, a U-Net as a U."""
        return _stacked(self.pruning.stacks) if self.pruning.stacks else self._u()

    def _u(self) -> str:
        """Outermost stages on top, down to the left, up to the right."""
        rows = [
            (f"{down.name:<13}", f"{down.channels:>5}", _boxes(down), _boxes(up), up.name)
            for down, up in zip(self.pruning.down, self.pruning.up, strict=True)
        ]
        left, right = (max(len(row[column]) for row in rows) for column in (2, 3))
        lines = [f"{name}{width}  {down:<{left}}  {up:>{right}}  {path}" for name, width, down, up, path in rows]
        if self.pruning.mid:
            middle = _boxes(self.pruning.mid)
            lines.append(f"{'mid_block':<13}{self.pruning.mid.channels:>5}  {middle:^{left + right + 2}}")
        legend = "R ResNet block, A attention" + (_DEPTHS if _DEEP.search("".join(lines)) else "")
        return "\n".join([*lines, f"{legend}, ... removed"])


def describe(model: str | Path, recipe: Recipe | str | Path | None = None) -> Description:
    """What `recipe` (or the one of that name or file) leaves of MODEL's U-Net, or the U-Net as it is; reads no weights.

    Raises:
        InputError: There is no such model, or the recipe does not fit it.
    """
    if isinstance(recipe, (str, Path)):
        recipe = load_recipe(recipe)
    return describe_config(load_structure(model), recipe, context_tokens(model))


def describe_config(config: dict[str, Any], recipe: Recipe | None = None, tokens: int = TOKENS) -> Description:
    """As `describe`, from the config of a U-Net and the number of tokens of a caption."""
    pruning = derive(recipe or WHOLE, config)
    teacher = unet_cost(config, tokens=tokens)
    student = unet_cost(pruning.student_config, tokens=tokens) if recipe else teacher
    return Description(pruning, teacher, student)


def _cost(cost: UNetCost) -> dict[str, float]:
    return {
        "params": cost.params,
        "gmacs_modules": round(cost.gmacs_modules, 6),
        "gmacs_all": round(cost.gmacs_all, 6),
    }


def _line(name: str, cost: UNetCost) -> str:
    return (
        f"{name:<8} {cost.params / 1e6:8.1f} M parameters  {cost.gmacs_modules:8.2f} GMACs "
        f"({cost.gmacs_all:.2f} with attention products) at {cost.latent_size[0]}x{cost.latent_size[1]} latents"
    )


def _stacked(stacks: Sequence[Stage]) -> str:
    """Each stack in lines of as many blocks as are easily counted."""
    wide = max(len(stack.name) for stack in stacks)
    lines = []
    for stack in stacks:
        kept = sum(stays for _, stays in stack.layers)
        count = f"{kept}/{len(stack.layers)}" if kept < len(stack.layers) else str(kept)
        drawn = "".join("[B]" if stays else " . " for _, stays in stack.layers)
        rows = [drawn[at : at + 3 * _A_LINE] for at in range(0, len(drawn), 3 * _A_LINE)]
        head = f"{stack.name:<{wide}}{stack.channels:>6}{count:>7}  "
        lines += [head + rows[0], *(" " * len(head) + row for row in rows[1:])]
    return "\n".join([*lines, "B block, . removed"])


def _boxes(stage: Stage) -> str:
    return " ".join(f"[{kinds}]" if stays else " " + "." * len(kinds) + " " for kinds, stays in stage.layers)
