"""A student that inherits the weights of its teacher (BK-SDM, arXiv 2305.15798, section 3.1)."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.common.hub import fetched, is_id
from bksdm.common.progress import say
from bksdm.common.runs import check_free, digest, run_files
from bksdm.families import derive, difference, family_of, family_of_pipeline, recipes_between
from bksdm.families.recipe import Config, Pruning, Recipe, load_recipe, published_recipes
from bksdm.models.card import drawing_call, model_card
from bksdm.models.configs import context_tokens, load_contents
from bksdm.models.parts import Tensors
from bksdm.models.pipelines import (
    Origin,
    denoiser,
    drawing_defaults,
    fingerprint,
    formats_of,
    open_pipeline,
    remark_on,
    save_pipeline,
    with_parts,
)
from bksdm.options import PruneOptions
from bksdm.pruning.describe import Description, describe, describe_config
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
    own = drawing_defaults(options.teacher)
    settings = dataclasses.asdict(options) | {
        "recipe_content": digest(recipe.to_dict()),
        "teacher_content": fingerprint(options.teacher),
        "sampling": as_files(own),
    }
    check_free(folder, "prune", settings, may_change=("json",))
    if (folder / RECIPE_FILE).exists():  # folders appear whole
        return describe(options.teacher, recipe)
    files = run_files("prune", settings) | as_files(own)
    teacher, weights = open_pipeline(options.teacher)
    remark_on(teacher)
    config = denoiser(teacher).config
    formats = formats_of(options.teacher, options.precision)
    smaller = Inheritance.of(config, weights, recipe, formats.get(family_of(config).denoiser))
    origin = Origin.of(teacher)
    description = describe_config(dict(config), recipe, context_tokens(options.teacher))
    save_student(
        with_denoiser(teacher, smaller.network if origin else smaller.loaded()),
        recipe,
        model_card(description, options.teacher, call=drawing_call(teacher, own)),
        folder,
        files,
        origin,
        formats,
        smaller,
    )
    return description


def save_student(
    student: DiffusionPipeline,
    recipe: Recipe,
    card: str,
    folder: Path,
    files: Mapping[str, str] | None = None,
    origin: Origin | None = None,
    formats: Mapping[str, torch.dtype] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a student's pipeline with its recipe, its card and other text files; see `save_pipeline`."""
    texts = {RECIPE_FILE: yaml.safe_dump(recipe.to_dict(), sort_keys=False), "README.md": card, **(files or {})}
    save_pipeline(student, folder, texts, origin, formats, weights)


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


def prune_unet(teacher: Any, recipe: Recipe) -> tuple[Any, Pruning]:
    """The smaller U-Net, every tensor of it a copy of the teacher's tensor that the recipe names.

    Raises:
        InputError: The teacher cannot satisfy the recipe.
    """
    student = Inheritance.of(teacher.config, teacher.state_dict(), recipe)
    return student.loaded(), student.pruning


@dataclass(frozen=True)
class Inheritance(Mapping[str, Tensor]):
    """The tensors of a student by name, each read from the teacher's when it is asked for.

    Attributes:
        pruning: What follows from the recipe.
        network: The student on the meta device.
        wanted: Its tensors, in their number formats.
        weights: The teacher's tensors.
    """

    pruning: Pruning
    network: Any
    wanted: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, teacher: Config, weights: Mapping[str, Tensor], recipe: Recipe, dtype: torch.dtype | None = None
    ) -> "Inheritance":
        """From the config of the teacher's denoiser and its tensors by name, of which only those that stay are read.

        Arguments:
            teacher: The config.
            weights: The tensors.
            recipe: What stays.
            dtype: Number format of the student; that of each tensor, if None.

        Raises:
            InputError: The teacher cannot satisfy the recipe.
        """
        pruning = derive(recipe, teacher)
        with torch.device("meta"):
            network = family_of(teacher).build(pruning.student_config)
        wanted = {}
        for key, tensor in network.state_dict().items():
            source = pruning.teacher_key(key)
            own = dtype or (weights.dtype(source) if isinstance(weights, Tensors) else weights[source].dtype)
            wanted[key] = tensor.to(own)
        network.load_state_dict(wanted, strict=True, assign=True)
        return cls(pruning, network.eval(), wanted, weights)

    def __getitem__(self, key: str) -> Tensor:
        return self._taken(key, copy=False)

    def _taken(self, key: str, *, copy: bool) -> Tensor:
        wanted, source = self.wanted[key], self.weights[self.pruning.teacher_key(key)]
        assert source.shape == wanted.shape, f"{key}: {tuple(wanted.shape)} from {tuple(source.shape)}"
        return source.detach().to(wanted.dtype, copy=copy)

    def __iter__(self) -> Iterator[str]:
        return iter(self.wanted)

    def __len__(self) -> int:
        return len(self.wanted)

    def loaded(self) -> Any:
        """The student with copies of all of them."""
        own = {key: self._taken(key, copy=True) for key in self}
        self.network.load_state_dict(own, strict=True, assign=True)
        return self.network


def with_denoiser(pipeline: DiffusionPipeline, denoiser: Any) -> DiffusionPipeline:
    """The same pipeline around another denoiser; everything else is shared."""
    return with_parts(pipeline, **{family_of_pipeline(pipeline).denoiser: denoiser})


def as_list(value: object) -> object:
    """An entry of a config as its file has it: files know no tuples."""
    return list(value) if isinstance(value, tuple) else value
