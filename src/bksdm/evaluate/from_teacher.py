"""How far the models of an evaluation are from their teacher, beside how far pruning alone took them.

The just-pruned network is made in memory of the teacher's own weights, by the recipe that made the student.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.data.pictures import Picture
from bksdm.evaluate.output_error import errors_by_noise, noise_levels, output_errors
from bksdm.evaluate.scores import LEFT, LEFT_UNSEEN, ErrorLeft, Weighted, mean_of
from bksdm.families import difference
from bksdm.families.recipe import Recipe
from bksdm.models.configs import load_denoiser_config
from bksdm.models.folders import fingerprint
from bksdm.models.pipelines import denoiser, load_denoiser, load_pipeline
from bksdm.pruning.inherit import Inheritance
from bksdm.pruning.told import checked_pruning

_OUTPUT_ERROR = "output_error"


@dataclass(frozen=True)
class FromTeacher:
    """What a teacher is asked for.

    Attributes:
        teacher: The MODEL.
        students: The models that draw, by name.
        recipes: Which of them were made of it by which recipe; None is the teacher itself.
        scores: Names of the scores that are wanted, of those that ask a teacher.
        device: Where.
    """

    teacher: str
    students: Mapping[str, str]
    recipes: Mapping[str, Recipe | None]
    scores: Sequence[str]
    device: torch.device

    @classmethod
    def of(
        cls, teacher: str, students: Mapping[str, str], scores: Sequence[str], device: torch.device, *, asked: bool
    ) -> "FromTeacher":
        """A teacher and the models that are held against it.

        Arguments:
            teacher: The MODEL.
            students: The models that draw, by name.
            scores: Names of all scores.
            device: Where.
            asked: Whether the user named the scores; else a model that was not pruned from the teacher has fewer.

        Raises:
            InputError: A score was asked for that a model cannot have.
        """
        recipes: dict[str, Recipe | None] = {}
        wanted = " and ".join(name for name in (LEFT, LEFT_UNSEEN) if name in scores)
        for name, model in students.items() if wanted else ():
            try:
                recipes[name] = _recipe(teacher, model)
            except InputError as error:
                if asked:
                    raise InputError(f"scores has {wanted}, which {name} cannot have: {error}") from error
                say(f"{name} has no {wanted}: {error}")
        return cls(teacher, students, recipes, scores, device)

    def outputs(self, held_out: Sequence[Picture], unseen: Sequence[Picture]) -> dict[str, dict[str, Weighted]]:
        """Scores by the name of the model and their own.

        Arguments:
            held_out: Captioned pictures, if there are any.
            unseen: What the teacher drew of captions that have no pictures, likewise.
        """
        found: dict[str, dict[str, Weighted]] = {name: {} for name in self.students}
        teacher = load_pipeline(self.teacher).to(self.device)
        networks = {name: load_denoiser(model, torch.float32).to(self.device) for name, model in self.students.items()}
        if _OUTPUT_ERROR in self.scores and held_out:
            for name, network in networks.items():
                found[name][_OUTPUT_ERROR] = mean_of(output_errors(network, teacher, held_out))
        pruned = {recipe: _just_pruned(teacher, recipe) for recipe in self.recipes.values() if recipe}
        for score, entries in ((LEFT, held_out), (LEFT_UNSEEN, unseen)):
            if score in self.scores and entries:
                for name, left in self._left(networks, pruned, teacher, entries).items():
                    found[name][score] = left
        return found

    def _left(
        self,
        networks: Mapping[str, Any],
        pruned: Mapping[Recipe, Any],
        teacher: DiffusionPipeline,
        entries: Sequence[Picture],
    ) -> dict[str, ErrorLeft]:
        """Of the models whose recipe is known, by name; the just-pruned network of a recipe is asked once for all."""
        made = {name: recipe for name, recipe in self.recipes.items() if recipe}
        retrained = [name for name, recipe in made.items() if not _same(networks[name], pruned[recipe])]
        asked = [*(networks[name] for name in retrained), *pruned.values()]
        errors = errors_by_noise(asked, teacher, entries) if asked else ()
        lost = dict(zip(pruned, errors[len(retrained) :], strict=True))
        own = dict(zip(retrained, errors[: len(retrained)], strict=True))
        levels = tuple((float(part[0]), float(part[-1])) for part in noise_levels(teacher))
        none = torch.zeros(len(entries), len(levels), dtype=torch.float64)
        found = {name: ErrorLeft(none, None, levels) for name in self.recipes}
        for name, recipe in made.items():
            found[name] = ErrorLeft(own.get(name, lost[recipe]), lost[recipe], levels)
        return found


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


def _just_pruned(teacher: DiffusionPipeline, recipe: Recipe) -> Any:
    """The student of a recipe before any retraining, on the teacher's own weights."""
    whole = denoiser(teacher)
    return Inheritance.of(whole.config, whole.state_dict(), recipe).loaded(copy=False)


def _same(network: Any, other: Any) -> bool:
    """Whether two networks of one config have the same weights, up to the first that differ."""
    others = other.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in network.state_dict().items())
