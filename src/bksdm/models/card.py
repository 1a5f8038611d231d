"""The model card of a student: what was removed, what is left, how it was made."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from bksdm.common.assets import asset
from bksdm.families import family_of
from bksdm.families.family import Family
from bksdm.pruning.describe import Description
from bksdm.runtime.defaults import Defaults


def model_card(
    description: Description, teacher: str, retraining: Mapping[str, Any] | None = None, own: Defaults | None = None
) -> str:
    """The text of `README.md` for a student's folder.

    Arguments:
        description: What the recipe does to the teacher.
        teacher: The MODEL that was pruned.
        retraining: Options of the retraining; None for a student that was only pruned.
        own: What the student draws best with, where that is known.
    """
    return _template("model_card.md.jinja").render(
        description=description,
        family=family_of(description.pruning.student_config),
        recipe=description.pruning.recipe,
        teacher=teacher,
        retraining=retraining,
        call=own.call() if own else "",
        drawing=description.drawing(),
    )


def personal_card(
    model: str, family: Family, prompt: str, options: Mapping[str, Any], *, lora: bool, own: Defaults | None = None
) -> str:
    """The text of `README.md` for what `bksdm personalize` made.

    Arguments:
        model: The MODEL that learnt.
        family: That it is of.
        prompt: What brings the subject out.
        options: Of the making.
        lora: Whether it is a LoRA.
        own: What the model draws best with, where that is known.
    """
    call = own.call() if own else ""
    given = {"model": model, "family": family, "prompt": prompt, "options": options}
    return _template("personal_card.md.jinja").render(**given, lora=lora, call=call)


def _template(name: str) -> Template:
    environment = Environment(loader=FileSystemLoader(asset()), undefined=StrictUndefined, autoescape=False)
    return environment.get_template(name)
