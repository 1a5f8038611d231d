"""A student that inherits the weights of its teacher (BK-SDM, arXiv 2305.15798, section 3.1)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from bksdm.card import model_card
from bksdm.describe import Description, describe, describe_config
from bksdm.errors import InputError
from bksdm.families import derive
from bksdm.models import (
    drawing_defaults,
    fingerprint,
    load_contents,
    load_pipeline,
    save_pipeline,
    with_parts,
)
from bksdm.options import PruneOptions
from bksdm.recipe import Config, Pruning, Recipe, load_recipe
from bksdm.runs import check_free, digest, run_files
from bksdm.runtime.defaults import as_files

RECIPE_FILE = "recipe.yaml"


def prune(options: PruneOptions) -> Description:
    """Make a student's folder: the teacher's pipeline with the smaller U-Net, the recipe and a model card.

    A folder that the same options made is left as it is.

    Raises:
        InputError: The teacher, the recipe or the folder is unfit; see the message.
    """
    recipe, folder = load_recipe(options.recipe), Path(options.out)
    if folder.resolve() == Path.cwd():
        raise InputError(f"out is {options.out}, the folder that you are in; name a new one")
    settings = dataclasses.asdict(options) | {
        "recipe_content": digest(recipe.to_dict()),
        "teacher_content": fingerprint(options.teacher),
    }
    check_free(folder, "prune", settings, may_change=("json",))
    if (folder / RECIPE_FILE).exists():  # folders appear whole
        return describe(options.teacher, recipe)
    own = drawing_defaults(options.teacher)
    files = run_files("prune", settings) | as_files(own)
    teacher = load_pipeline(options.teacher)
    unet, pruning = prune_unet(teacher.unet, recipe)
    description = describe_config(
        dict(teacher.unet.config), pruning.recipe, teacher.text_encoder.config.max_position_embeddings
    )
    save_student(with_unet(teacher, unet), recipe, model_card(description, options.teacher, own=own), folder, files)
    return description


def save_student(
    student: StableDiffusionPipeline,
    recipe: Recipe,
    card: str,
    folder: Path,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a student's pipeline with its recipe, its card and other text files."""
    recipe_text = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
    save_pipeline(student, folder, {RECIPE_FILE: recipe_text, "README.md": card, **(files or {})})


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
    path = Path(model)
    if path.is_file():
        values = load_contents(path).recipe
        return None if values is None else Recipe.from_dict(values, str(model))
    return load_recipe(path / RECIPE_FILE) if (path / RECIPE_FILE).is_file() else None


def checked_pruning(teacher: str, student: str, teacher_config: Config, student_config: Config) -> Pruning:
    """What a student's recipe says, held against what the student is.

    Arguments:
        teacher, student: The MODELs.
        teacher_config, student_config: Of their U-Nets.

    Raises:
        InputError: The student was not made from the teacher.
    """
    pruning = derive(read_recipe(student), teacher_config)
    for key, expected in pruning.student_config.items():
        actual = student_config.get(key, expected)
        if not key.startswith("_") and as_list(actual) != as_list(expected):
            raise InputError(
                f"student {student} was not made from teacher {teacher}: "
                f"its {key} is {actual}, and its recipe gives {expected}"
            )
    return pruning


def prune_unet(teacher: UNet2DConditionModel, recipe: Recipe) -> tuple[UNet2DConditionModel, Pruning]:
    """The smaller U-Net, every tensor of it a copy of the teacher's tensor that the recipe names.

    Raises:
        InputError: The teacher cannot satisfy the recipe.
    """
    pruning = derive(recipe, teacher.config)
    with torch.device("meta"):
        student = UNet2DConditionModel.from_config(pruning.student_config)
    weights = teacher.state_dict()
    inherited = {}
    for key, wanted in student.state_dict().items():
        source = weights[pruning.teacher_key(key)]
        assert source.shape == wanted.shape, f"{key}: {tuple(wanted.shape)} from {tuple(source.shape)}"
        inherited[key] = source.detach().clone()
    student.load_state_dict(inherited, strict=True, assign=True)
    return student.eval(), pruning


def with_unet(pipeline: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The same pipeline around another U-Net; everything else is shared."""
    return with_parts(pipeline, unet=unet)


def as_list(value: object) -> object:
    """An entry of a config as its file has it: files know no tuples."""
    return list(value) if isinstance(value, tuple) else value
