"""Model families: what a recipe means for one kind of U-Net, and what that can lose. Nothing above knows more."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from diffusers import UNet2DConditionModel

from bksdm.common.errors import InputError
from bksdm.families.recipe import Config, Pruning, Recipe
from bksdm.families.unet import bypass, structure
from bksdm.families.unet import units as unet_units
from bksdm.families.units import Names, Removals, Unit


def derive(recipe: Recipe, teacher_config: Config) -> Pruning:
    """What follows from `recipe` for a teacher with this U-Net config.

    Raises:
        InputError: The family is not known, or the teacher cannot satisfy the recipe.
    """
    _check(teacher_config)
    return structure.derive(recipe, teacher_config)


def units(config: Config) -> tuple[Unit, ...]:
    """The parts that this U-Net can run without, one at a time, in the order in which the data meets them.

    Raises:
        InputError: The family is not known.
    """
    _check(config)
    return unet_units.units(config)


def removals(config: Config) -> tuple[Removals, ...]:
    """Which of them recipes can remove together.

    Raises:
        InputError: The family is not known.
    """
    _check(config)
    return tuple(unet_units.removals(config))


def recipe_without(config: Config, names: Names, name: str, summary: str = "") -> Recipe:
    """The recipe, called `name`, that removes the units with these names and nothing else.

    Raises:
        InputError: The family is not known.
    """
    _check(config)
    return unet_units.recipe_without(config, names, name, summary)


def recipes_between(teacher_config: Config, student_config: Config, name: str) -> list[Recipe]:
    """The recipes, called `name`, that make a U-Net with the student's config out of one with the teacher's.

    Raises:
        InputError: The family is not known.
    """
    _check(teacher_config)
    _check(student_config)
    return list(unet_units.recipes_between(teacher_config, student_config, name))


def difference(wanted: Config, found: Config) -> tuple[str, Any, Any] | None:
    """Name and both values of an entry in which the config of a U-Net is not the wanted one, if there is one."""
    return structure.difference(wanted, found)


def skip_connections(config: Config) -> tuple[str, ...]:
    """Paths of the modules whose outputs a U-Net keeps for its way up, in the order in which it makes them.

    Raises:
        InputError: The family is not known.
    """
    _check(config)
    return structure.skip_connections(config)


def bypassed(unet: UNet2DConditionModel, units: Iterable[Unit]) -> AbstractContextManager[UNet2DConditionModel]:
    """`unet` without these of its units inside a `with` block, in memory; afterwards it is as it was."""
    return bypass.bypassed(unet, units)


def _check(config: Config) -> None:
    reason = structure.why_not(config)
    if reason:
        raise InputError(
            f"this U-Net cannot be pruned: {reason}; give a model shaped like Stable Diffusion 1.x or 2.x, or SDXL"
        )
