"""How far the models of an evaluation are from their teacher, beside how far pruning alone took them.

The just-pruned network is made in memory of the teacher's own weights, by the recipe that made the student. Errors of
every picture are kept as features are, in blocks beside those of the model, and no network is loaded where none is
missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.common.processes import processes
from bksdm.common.progress import say
from bksdm.data.source import Source
from bksdm.evaluate.blocks import Blocks, Look, open_together, spans
from bksdm.evaluate.output_error import LEVELS, answered, errors, noise_levels
from bksdm.evaluate.scores import KINDS, LEFT, LEFT_UNSEEN, OUTPUT_ERROR, ErrorLeft, Weighted, mean_of
from bksdm.evaluate.sources import Drawn
from bksdm.families import difference
from bksdm.families.recipe import Recipe
from bksdm.models.configs import load_denoiser_config
from bksdm.models.folders import fingerprint
from bksdm.models.pipelines import denoiser, load_denoiser, load_pipeline
from bksdm.pruning.inherit import Inheritance
from bksdm.pruning.told import checked_pruning

# Blocks of pictures, the teacher's answers to which wait in main memory while one network after another is loaded.
# All networks at once would fill a GPU with large students; the teacher asked again for each would cost more than a
# student does; and its answers to all pictures have no bound: those to 256, at ten noise levels of 512 px, are 0.4 GiB
# with their latents. Loading a network for each 256 pictures is little beside the 2,560 answers that it then gives.
_AT_ONCE = 4

# What the errors of a picture are called in the blocks on the disk.
_ERRORS, _LOST, _LEVELS = "errors", "lost", "levels"


@dataclass(frozen=True)
class FromTeacher:
    """What a teacher is asked for.

    Attributes:
        teacher: The MODEL.
        content: Its fingerprint.
        students: The models that draw, by name; their errors are kept beside the features of their pictures.
        recipes: Which of them were made of it by which recipe; None is the teacher itself.
        scores: Names of the scores that are wanted, of those that ask a teacher.
        device: Where.
    """

    teacher: str
    content: str | None
    students: Mapping[str, Drawn]
    recipes: Mapping[str, Recipe | None]
    scores: Sequence[str]
    device: torch.device

    @classmethod
    def of(
        cls,
        teacher: str,
        content: str | None,
        students: Mapping[str, Drawn],
        scores: Sequence[str],
        device: torch.device,
        *,
        asked: bool,
    ) -> "FromTeacher":
        """A teacher and the models that are held against it.

        Arguments:
            teacher: The MODEL.
            content: Its fingerprint.
            students: The models that draw, by name.
            scores: Names of all scores.
            device: Where.
            asked: Whether the user named the scores; else a model that was not pruned from the teacher has fewer.

        Raises:
            InputError: A score was asked for that a model cannot have.
        """
        recipes: dict[str, Recipe | None] = {}
        wanted = " and ".join(name for name in (LEFT, LEFT_UNSEEN) if name in scores)
        for name, student in students.items() if wanted else ():
            try:
                recipes[name] = _recipe(teacher, student.model)
            except InputError as error:
                if asked:
                    raise InputError(f"scores has {wanted}, which {name} cannot have: {error}") from error
                say(f"{name} has no {wanted}: {error}")
        return cls(teacher, content, students, recipes, scores, device)

    def outputs(self, pictures: Mapping[str, Source]) -> dict[str, dict[str, Weighted]]:
        """Scores by the name of the model and their own; errors that are kept are not computed again.

        Arguments:
            pictures: By score, the captioned pictures that it is of: held-out ones, or what the teacher drew.

        Raises:
            InputError: What is kept is of another recipe or of other pictures, or cannot be read.
        """
        found: dict[str, dict[str, Weighted]] = {name: {} for name in self.students}
        teacher = _Teacher(self.teacher, self.device)
        for score in self.scores:
            if score in pictures and pictures[score].pictures:
                for name, blocks in self._errors(score, pictures[score], teacher).items():
                    found[name][score] = _weighted(blocks)
        return found

    def _errors(self, score: str, source: Source, teacher: "_Teacher") -> dict[str, Blocks]:
        """What a score is made of, by the name of the model; what is missing is computed."""
        found = {
            name: self._kept(name, score, source) for name in (self.students if score == OUTPUT_ERROR else self.recipes)
        }
        for numbers in spans(len(source.pictures), _AT_ONCE * processes().count):
            asked = _Asked(teacher, source, _levels_of(score))
            for name, blocks in found.items():
                blocks.fill(self._look(name, score, asked), f"{KINDS[score].title} of {name}", numbers)
        return found

    def _kept(self, name: str, score: str, source: Source) -> Blocks:
        student = self.students[name]
        recipe = None if score == OUTPUT_ERROR else self.recipes[name]
        folder = student.folder.parent / score
        settings = {
            "teacher": self.content or self.teacher,
            "student": student.digest,
            "recipe": recipe and replace(recipe, summary="").to_dict(),  # words change no number
            "pictures": source.digest,
            "levels": _levels_of(score),
        }
        open_together(folder, "hold a model against its teacher", settings)
        return Blocks(folder, len(source.pictures))

    def _look(self, name: str, score: str, asked: "_Asked") -> Look:
        """What fills the blocks of a model, which is loaded when the first is missing, and let go with this."""
        model = self.students[name].model
        network = cache(lambda: load_denoiser(model, torch.float32).to(self.device))
        if score == OUTPUT_ERROR:
            return lambda numbers: {_ERRORS: asked.errors(network(), numbers)[:, 0].contiguous()}
        recipe = self.recipes[name]
        if recipe is None:
            return asked.without_error
        return lambda numbers: asked.beside_pruned(network(), recipe, numbers)


def _levels_of(score: str) -> int | None:
    """At how many noise levels a score asks about a picture; None for once, at any."""
    return None if score == OUTPUT_ERROR else LEVELS


class _Teacher:
    """A teacher, loaded when it is first asked, and just-pruned networks on its memory."""

    def __init__(self, model: str, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._pruned: dict[Recipe, Any] = {}

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        return load_pipeline(self._model).to(self._device)

    @cached_property
    def levels(self) -> Tensor:
        """First and last timestep of each of L noise levels, with shape (L, 2)."""
        parts = noise_levels(self.pipeline, LEVELS)
        return torch.tensor([(float(part[0]), float(part[-1])) for part in parts], dtype=torch.float64)

    def pruned(self, recipe: Recipe) -> Any:
        """The student of a recipe before any retraining."""
        if recipe not in self._pruned:
            whole = denoiser(self.pipeline)
            self._pruned[recipe] = Inheritance.of(whole.config, whole.state_dict(), recipe).loaded(copy=False)
        return self._pruned[recipe]


class _Asked:
    """Some pictures, about which the teacher, and each recipe's just-pruned network, is asked once for all models."""

    def __init__(self, teacher: _Teacher, source: Source, levels: int | None) -> None:
        answers = cache(lambda numbers: list(answered(teacher.pipeline, source.pictures, numbers, levels)))
        self._teacher = teacher
        self._answers = answers
        self._lost = cache(lambda recipe, numbers: errors(teacher.pruned(recipe), answers(numbers)))

    def errors(self, network: Any, numbers: range) -> Tensor:
        """Those of the pictures with these numbers, with shape (n, L)."""
        return errors(network, self._answers(numbers))

    def without_error(self, numbers: range) -> dict[str, Tensor]:
        """What is kept of the teacher itself."""
        levels = self._levels(numbers)
        return {_ERRORS: torch.zeros(levels.shape[:2], dtype=torch.float64), _LEVELS: levels}

    def beside_pruned(self, network: Any, recipe: Recipe, numbers: range) -> dict[str, Tensor]:
        """What is kept of a student."""
        lost = self._lost(recipe, numbers)
        as_pruned = _same(network, self._teacher.pruned(recipe))
        own = lost.clone() if as_pruned else self.errors(network, numbers)
        return {_ERRORS: own, _LOST: lost, _LEVELS: self._levels(numbers)}

    def _levels(self, numbers: range) -> Tensor:
        """With shape (n, L, 2); the same for every picture."""
        return self._teacher.levels.repeat(len(numbers), 1, 1)


def _weighted(blocks: Blocks) -> Weighted:
    """The score that kept errors give."""
    own, lost, levels = (blocks.rows(name) for name in (_ERRORS, _LOST, _LEVELS))
    assert own
    if not levels:
        return mean_of(own[:])
    return ErrorLeft(own[:], lost[:] if lost else None, levels[:1][0].tolist())


def _recipe(teacher: str, model: str) -> Recipe | None:
    """The recipe that a model was made by; None where it is the teacher itself.

    Raises:
        InputError: It was not pruned from the teacher, or does not tell how.
    """
    configs = load_denoiser_config(teacher), load_denoiser_config(model)
    if difference(dict(configs[0]), configs[1]) is not None:
        return checked_pruning(teacher, model, *configs).recipe
    if model != teacher and fingerprint(model) != fingerprint(teacher):
        raise InputError(f"{model} has as many blocks as teacher {teacher}, so pruning took nothing from it")
    return None


def _same(network: Any, other: Any) -> bool:
    """Whether two networks of one config have the same weights, up to the first that differ."""
    others = other.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in network.state_dict().items())
