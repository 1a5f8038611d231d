"""Which recipe a student was made by, as far as it tells."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from bksdm.common.errors import InputError
from bksdm.common.hub import fetched, is_id
from bksdm.common.progress import say
from bksdm.families import derive, difference, family_of, recipes_between
from bksdm.families.recipe import Config, Pruning, Recipe, load_recipe, published_recipes
from bksdm.models.configs import load_contents

RECIPE_FILE = "recipe.yaml"


def student_texts(recipe: Recipe, card: str, files: Mapping[str, str]) -> dict[str, str]:
    """The text files of a student's folder, name -> content: its recipe, its card and others."""
    return {RECIPE_FILE: yaml.safe_dump(recipe.to_dict(), sort_keys=False), "README.md": card, **files}


def read_recipe(student: str | Path) -> Recipe:
    """The recipe that a student's folder, or its single file, was made with.

    Raises:
        InputError: There is none.
    """
    recipe = recipe_of(student)
    if recipe is None and Path(student).is_file():
        raise InputError(f"{student} names no recipe in its header, so it is no student that bksdm export wrote")
    if recipe is None:
        raise InputError(f"{student} has no {RECIPE_FILE}, so it was not made by bksdm prune; run that first")
    return recipe


def recipe_of(model: str | Path) -> Recipe | None:
    """The recipe that MODEL was pruned by, as far as it tells.

    Raises:
        InputError: What tells is no recipe.
    """
    path = Path(model).expanduser()
    if path.is_file():
        values = load_contents(path).recipe
        return None if values is None else Recipe.from_dict(values, str(model))
    file = fetched(str(model), RECIPE_FILE) if not path.is_dir() and is_id(model) else path / RECIPE_FILE
    return load_recipe(file) if file and file.is_file() else None


def checked_pruning(teacher: str, student: str, teacher_config: Config, student_config: Config) -> Pruning:
    """What a student's recipe says, held against what the student is; without one, the recipe that its config tells.

    Arguments:
        teacher, student: The MODELs.
        teacher_config, student_config: Of their U-Nets.

    Raises:
        InputError: The student was not made from the teacher, or its config does not tell how.
    """
    families = [family_of(config).name for config in (teacher_config, student_config)]
    if len(set(families)) > 1:
        raise InputError(
            f"student {student} is of {families[1]}, and teacher {teacher} of {families[0]}; give a student of its own"
        )
    recipe = recipe_of(student) or _told_by_config(teacher, student, teacher_config, student_config)
    pruning = derive(recipe, teacher_config)
    differs = difference(pruning.student_config, student_config)
    if differs:
        key, expected, actual = differs
        raise InputError(
            f"student {student} was not made from teacher {teacher}: "
            f"its {key} is {actual}, and its recipe gives {expected}"
        )
    return pruning


def _told_by_config(teacher: str, student: str, teacher_config: Config, student_config: Config) -> Recipe:
    """The recipe of a student that names none: the published one that gives its config, or else the only one."""
    without = f"student {student} names no recipe"
    if difference(dict(teacher_config), student_config) is None:
        raise InputError(f"{without} and has as many blocks as its teacher; run bksdm prune first")
    for recipe in map(load_recipe, published_recipes()):
        if _gives(recipe, teacher_config, student_config):
            say(f"{without}; its config is the one that recipe {recipe.name!r} gives")
            return recipe
    found = recipes_between(teacher_config, student_config, Path(student).name.removesuffix(".safetensors"))
    if not found:
        raise InputError(f"{without}, and none makes its U-Net out of that of teacher {teacher}; give its own teacher")
    example = yaml.safe_dump(found[0].to_dict(), default_flow_style=True, sort_keys=False, width=1000).strip()
    if len(found) > 1:
        raise InputError(
            f"{without}, and several give its config; write the one that it was made by into the file "
            f"{RECIPE_FILE} of its folder, such as {example}"
        )
    say(f"{without}; its config is the one that this gives: {example}")
    return found[0]


def _gives(recipe: Recipe, teacher: Config, student: Config) -> bool:
    """Whether the recipe makes a U-Net with the student's config out of one with the teacher's."""
    try:
        return difference(derive(recipe, teacher).student_config, student) is None
    except InputError:
        return False
