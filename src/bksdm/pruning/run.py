"""A student that inherits the weights of its teacher (BK-SDM, arXiv 2305.15798, section 3.1)."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.common.runs import check_free, digest, run_files, write_text
from bksdm.families.recipe import Recipe, load_recipe
from bksdm.models.card import drawing_call, model_card
from bksdm.models.configs import context_tokens
from bksdm.models.drawing import drawing_defaults
from bksdm.models.folders import fingerprint, located, new_folder
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.copied import Copy
from bksdm.pruning.describe import Description, describe, describe_config
from bksdm.pruning.told import RECIPE_FILE, student_texts
from bksdm.runtime.defaults import Defaults, as_files


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
    if folder.exists():
        check_free(folder, "prune", _settings(options, recipe, own), may_change=("json",))
    if (folder / RECIPE_FILE).exists():  # folders appear whole
        return describe(options.teacher, recipe)
    teacher = located(options.teacher)
    copy = Copy.of(teacher, options.teacher, recipe) if teacher.is_dir() and options.precision == "keep" else None
    if copy is None:
        from bksdm.pruning.inherit import prune_loaded

        return prune_loaded(options, recipe, own, _settings(options, recipe, own))
    return _copied(copy, options, recipe, own)


def _copied(copy: Copy, options: PruneOptions, recipe: Recipe, own: Defaults | None) -> Description:
    remark = copy.remark()
    if remark:
        say(remark)
    description = describe_config(copy.config, recipe, context_tokens(options.teacher))
    card = model_card(description, options.teacher, call=drawing_call(copy.family, copy.config, copy.pixels, own))
    with ThreadPoolExecutor(1) as beside, new_folder(Path(options.out)) as partial:
        # A digest of the teacher takes longer than copying it.
        settings = beside.submit(_settings, options, recipe, own)
        copy.write(partial)
        files = run_files("prune", settings.result()) | as_files(own)
        for name, text in student_texts(recipe, card, files).items():
            write_text(partial / name, text)
    return description


def _settings(options: PruneOptions, recipe: Recipe, own: Defaults | None) -> dict[str, Any]:
    """What a student is made from: the options, and what they name."""
    return dataclasses.asdict(options) | {
        "recipe_content": digest(recipe.to_dict()),
        "teacher_content": fingerprint(options.teacher),
        "sampling": as_files(own),
    }
