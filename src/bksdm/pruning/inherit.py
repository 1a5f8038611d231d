"""The weights that a student inherits of its teacher (BK-SDM, arXiv 2305.15798, section 3.1), as tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from bksdm.common.runs import run_files
from bksdm.families import derive, family_of, family_of_pipeline
from bksdm.families.recipe import Config, Pruning, Recipe
from bksdm.models.card import drawing_call, model_card
from bksdm.models.configs import context_tokens
from bksdm.models.parts import Tensors
from bksdm.models.pipelines import (
    Origin,
    denoiser,
    formats_of,
    open_pipeline,
    pixels_a_side,
    remark_on,
    save_pipeline,
    with_parts,
)
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.describe import Description, describe_config
from bksdm.pruning.told import student_texts
from bksdm.runtime.defaults import Defaults, as_files


def prune_loaded(
    options: PruneOptions,
    recipe: Recipe,
    own: Defaults | None,
    settings: Mapping[str, Any],
    changed: Mapping[str, Tensor] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Description:
    """`prune` for a teacher whose networks have to be built: a single file, a folder that is unusual, another format.

    Arguments:
        options: Of the verb.
        recipe: What stays.
        own: What the teacher draws best with, where that is known.
        settings: What the student is made from.
        changed: Tensors of the student that are not its teacher's, by name.
        texts: Text files to put beside it.

    Raises:
        InputError: The teacher is damaged, or cannot satisfy the recipe.
    """
    files = run_files("prune", settings) | as_files(own) | dict(texts or {})
    teacher, weights = open_pipeline(options.teacher)
    remark_on(teacher)
    config, family = denoiser(teacher).config, family_of_pipeline(teacher)
    formats = formats_of(options.teacher, options.precision)
    smaller = replace(Inheritance.of(config, weights, recipe, formats.get(family.denoiser)), changed=changed or {})
    origin = Origin.of(teacher)
    description = describe_config(dict(config), recipe, context_tokens(options.teacher))
    call = drawing_call(family, config, pixels_a_side(teacher), own)
    save_student(
        with_denoiser(teacher, smaller.network if origin else smaller.loaded()),
        recipe,
        model_card(description, options.teacher, call=call),
        Path(options.out),
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
    save_pipeline(student, folder, student_texts(recipe, card, files or {}), origin, formats, weights)


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
        changed: Those of the student that are others, by its names.
    """

    pruning: Pruning
    network: Any
    wanted: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    changed: Mapping[str, Tensor] = field(default_factory=dict)

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
        network = family_of(teacher).outline(pruning.student_config)
        empty, wanted = network.state_dict(), {}
        for key, tensor in empty.items():
            source = pruning.teacher_key(key)
            own = dtype or (weights.dtype(source) if isinstance(weights, Tensors) else weights[source].dtype)
            wanted[key] = tensor.to(own)
        if any(wanted[key] is not tensor for key, tensor in empty.items()):
            network.load_state_dict(wanted, strict=True, assign=True)
        return cls(pruning, network.eval(), wanted, weights)

    def __getitem__(self, key: str) -> Tensor:
        return self._taken(key, copy=False)

    def _taken(self, key: str, *, copy: bool) -> Tensor:
        wanted = self.wanted[key]
        source = self.changed[key] if key in self.changed else self.weights[self.pruning.teacher_key(key)]
        assert source.shape == wanted.shape, f"{key}: {tuple(wanted.shape)} from {tuple(source.shape)}"
        return source.detach().to(wanted.dtype, copy=copy)

    def __iter__(self) -> Iterator[str]:
        return iter(self.wanted)

    def __len__(self) -> int:
        return len(self.wanted)

    def loaded(self, *, copy: bool = True) -> Any:
        """The student with copies of all of them; without, it and its teacher have one memory."""
        own = {key: self._taken(key, copy=copy) for key in self}
        self.network.load_state_dict(own, strict=True, assign=True)
        return self.network


def with_denoiser(pipeline: DiffusionPipeline, smaller: Any) -> DiffusionPipeline:
    """The same pipeline around another denoiser; everything else is shared."""
    return with_parts(pipeline, **{family_of_pipeline(pipeline).denoiser: smaller})
