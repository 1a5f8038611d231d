"""A student that inherits the weights of its teacher (BK-SDM, arXiv 2305.15798, section 3.1)."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from bksdm.pruning.repair.record import RECORD
from bksdm.pruning.told import RECIPE_FILE, student_texts
from bksdm.runtime.defaults import Defaults, as_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from bksdm.data.source import Source

_OF_REPAIR = ("repair_pictures", "ridge", "seed", "device")


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
    source = _source(options)
    if folder.exists():
        check_free(folder, "prune", _settings(options, recipe, own, source), may_change=("json", "device"))
    if (folder / RECIPE_FILE).exists():  # folders appear whole
        return describe(options.teacher, recipe)
    teacher = located(options.teacher)
    copies = teacher.is_dir() and options.precision == "keep" and source is None
    copy = Copy.of(teacher, options.teacher, recipe) if copies else None
    if copy is None:
        from bksdm.pruning.inherit import prune_loaded

        changed, record = _repaired(options, recipe, source)
        return prune_loaded(options, recipe, own, _settings(options, recipe, own, source), changed, record)
    return _copied(copy, options, recipe, own)


def _source(options: PruneOptions) -> "Source | None":
    """The data to repair by, where there is any to be.

    Raises:
        InputError: There is no such data, or options are given that mean nothing without.
    """
    if options.repair is not None:
        from bksdm.data.source import read_source

        return read_source(options.repair)
    usual = {field.name: field.default for field in dataclasses.fields(options)}
    for name in _OF_REPAIR:
        if (given := getattr(options, name)) != usual[name]:
            raise InputError(f"{name} is {given}, which is for --repair; give that too, or leave it out")
    return None


def _repaired(
    options: PruneOptions, recipe: Recipe, source: "Source | None"
) -> tuple["Mapping[str, Tensor]", dict[str, str]]:
    """Tensors of the student that a repair changes, and the text file that says what it did."""
    if source is None:
        return {}, {}
    from bksdm.pruning.repair.run import repair

    changed, record = repair(options, recipe, source)
    return changed, {RECORD: record.json()}


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


def _settings(
    options: PruneOptions, recipe: Recipe, own: Defaults | None, source: "Source | None" = None
) -> dict[str, Any]:
    """What a student is made from: the options, and what they name."""
    of_repair = {"data_content": source.digest} if source else {}
    plain = {name: value for name, value in dataclasses.asdict(options).items() if source or name not in _OF_REPAIR}
    return (
        plain
        | of_repair
        | {
            "recipe_content": digest(recipe.to_dict()),
            "teacher_content": fingerprint(options.teacher),
            "sampling": as_files(own),
        }
    )
