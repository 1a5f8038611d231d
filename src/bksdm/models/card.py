"""The model card of a student: what was removed, what is left, how it was made."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from bksdm.common.assets import asset
from bksdm.families import family_of
from bksdm.families.family import Family
from bksdm.families.recipe import Config
from bksdm.pruning.describe import Description
from bksdm.runtime.defaults import Defaults


def model_card(
    description: Description, teacher: str, retraining: Mapping[str, Any] | None = None, call: str = ""
) -> str:
    """The text of `README.md` for a student's folder.

    Arguments:
        description: What the recipe does to the teacher.
        teacher: The MODEL that was pruned.
        retraining: Options of the retraining; None for a student that was only pruned.
        call: What a call of its pipeline needs besides the prompt; see `drawing_call`.
    """
    return _template("model_card.md.jinja").render(
        description=description,
        family=family_of(description.pruning.student_config),
        recipe=description.pruning.recipe,
        teacher=teacher,
        retraining=retraining,
        call=call,
        drawing=description.drawing(),
    )


def personal_card(
    model: str, family: Family, prompt: str, options: Mapping[str, Any], *, lora: bool, call: str = ""
) -> str:
    """The text of `README.md` for what `bksdm personalize` made.

    Arguments:
        model: The MODEL that learnt.
        family: That it is of.
        prompt: What brings the subject out.
        options: Of the making.
        lora: Whether it is a LoRA.
        call: What a call of its pipeline needs besides the prompt; see `drawing_call`.
    """
    given = {"model": model, "family": family, "prompt": prompt, "options": options}
    return _template("personal_card.md.jinja").render(**given, lora=lora, call=call)


def drawing_call(family: Family, config: Config, pixels: int, own: Defaults | None) -> str:
    """What a call of a pipeline needs besides the prompt, as Python.

    Arguments:
        family: Of the pipeline.
        config: Of its denoiser.
        pixels: To a side of one of the denoiser's latents.
        own: What it draws best with, where that is known.
    """
    size = {}
    if not family.draws_its_size(config):
        height, width = family.latent_sides(config)
        size = {"height": height * pixels, "width": width * pixels}
    given = size | (own.arguments() if own else {})
    return "".join(f", {name}={value}" for name, value in given.items())


def _template(name: str) -> Template:
    environment = Environment(loader=FileSystemLoader(asset()), undefined=StrictUndefined, autoescape=False)
    return environment.get_template(name)
