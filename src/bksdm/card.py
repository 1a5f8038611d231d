"""The model card of a student: what was removed, what is left, how it was made."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bksdm.describe import Description


def model_card(
    description: Description, teacher: str, retraining: Mapping[str, Any] | None = None, call: str = ""
) -> str:
    """The text of `README.md` for a student's folder.

    Arguments:
        description: What the recipe does to the teacher.
        teacher: The MODEL that was pruned.
        retraining: Options of the retraining; None for a student that was only pruned.
        call: What a call of the pipeline needs besides the prompt, as Python.
    """
    environment = Environment(loader=PackageLoader("bksdm", "assets"), undefined=StrictUndefined, autoescape=False)
    template = environment.get_template("model_card.md.jinja")
    return template.render(
        description=description,
        recipe=description.pruning.recipe,
        teacher=teacher,
        retraining=retraining,
        call=call,
        drawing=description.drawing(),
    )
