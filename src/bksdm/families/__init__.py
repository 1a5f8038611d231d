"""Model families: what a recipe means for one kind of model, what that is told, and what it answers.

Everything above asks here, by a denoiser's config or by a pipeline, and knows no family by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from bksdm.common.errors import InputError
from bksdm.families.family import Family
from bksdm.families.flux import Flux
from bksdm.families.flux2 import Flux2, Flux2Klein
from bksdm.families.reader import Reader
from bksdm.families.recipe import Config, Pruning, Recipe
from bksdm.families.sd import StableDiffusion
from bksdm.families.sdxl import StableDiffusionXL
from bksdm.families.single_file import FileShapes, Layout
from bksdm.families.stack.refused import REFUSED
from bksdm.families.units import Names, Removals, Unit
from bksdm.families.zimage import ZImage

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

# The last takes what no other does, and CLIP alone.
FAMILIES: tuple[Family, ...] = (
    Flux(),
    Flux2(),
    Flux2Klein(),
    ZImage(),
    StableDiffusionXL(),
    StableDiffusion(),
)

_KNOWN = "give a model shaped like Stable Diffusion 1.x or 2.x, SDXL, Flux.1, FLUX.2 or Z-Image"


def families_for(verb: str) -> tuple[Family, ...]:
    """The families that go through a verb."""
    return tuple(family for family in FAMILIES if verb not in family.unready)


def family_claiming(config: Config) -> Family:
    """The family that a denoiser with this config, which may leave out defaults, is of, if of any."""
    return next(family for family in FAMILIES if family.claims(config))


def family_of(config: Config) -> Family:
    """The family of a denoiser with this config.

    Raises:
        InputError: The family is not known.
    """
    family, kind = family_claiming(config), config.get("_class_name")
    if kind in REFUSED:
        raise InputError(f"a {kind} cannot be pruned: {REFUSED[kind]}; {_KNOWN}")
    reason = family.why_not(config)
    if reason:
        raise InputError(f"this {family.noun} cannot be pruned: {reason}; {_KNOWN}")
    return family


def family_of_class(name: object) -> Family | None:
    """The family whose pipelines a class of diffusers is one of; None where there is none."""
    return next((f for f in FAMILIES if name in (f.pipeline, f.from_image, f.under_mask)), None)


def family_of_pipeline(pipeline: DiffusionPipeline) -> Family:
    """The family of a pipeline."""
    family = family_of_class(type(pipeline).__name__)
    assert family, f"{type(pipeline).__name__} is of no family"
    return family


def layout_of(shapes: FileShapes) -> tuple[Family, Layout]:
    """The family of a single file with these tensors, if it is of any, and where they lie."""
    found = ((family, family.layout_of(shapes)) for family in FAMILIES)
    return next((family, layout) for family, layout in found if layout)


def derive(recipe: Recipe, teacher_config: Config) -> Pruning:
    """What follows from `recipe` for a teacher with this denoiser's config.

    Raises:
        InputError: The family is not known, or the teacher cannot satisfy the recipe.
    """
    return family_of(teacher_config).derive(recipe, teacher_config)


def units(config: Config) -> tuple[Unit, ...]:
    """The parts that this denoiser can run without, one at a time, in the order in which the data meets them.

    Raises:
        InputError: The family is not known.
    """
    return family_of(config).units(config)


def removals(config: Config) -> tuple[Removals, ...]:
    """Which of them recipes can remove together.

    Raises:
        InputError: The family is not known.
    """
    return family_of(config).removals(config)


def recipe_without(config: Config, names: Names, name: str, summary: str = "") -> Recipe:
    """The recipe, called `name`, that removes the units with these names and nothing else.

    Raises:
        InputError: The family is not known.
    """
    return family_of(config).recipe_without(config, names, name, summary)


def recipes_between(teacher_config: Config, student_config: Config, name: str) -> list[Recipe]:
    """The recipes, called `name`, that make a denoiser with the student's config out of one with the teacher's.

    Raises:
        InputError: The family is not known.
    """
    family, other = family_of(teacher_config), family_of(student_config)
    return family.recipes_between(teacher_config, student_config, name) if family is other else []


def difference(wanted: Config, found: Config) -> tuple[str, Any, Any] | None:
    """Name and both values of an entry in which the config of a denoiser is not the wanted one, if there is one."""
    return family_of(wanted).difference(wanted, found)


def skip_connections(config: Config) -> tuple[str, ...]:
    """Paths of the modules whose outputs a denoiser keeps for later layers, in the order in which it makes them.

    Raises:
        InputError: The family is not known.
    """
    return family_of(config).skip_connections(config)


def bypassed(denoiser: nn.Module, units: Iterable[Unit]) -> AbstractContextManager[nn.Module]:
    """The network without these of its units inside a `with` block, in memory; afterwards it is as it was."""
    config: Any = denoiser.config
    return family_of(config).bypassed(denoiser, units)


def readers(config: Config) -> list[Reader]:
    """What is known of programs and a denoiser with this config."""
    return family_of(config).readers(config)
