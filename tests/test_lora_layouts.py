"""LoRAs in every layout: what a format says is what `generate --lora` merges, and what `adapt` carries to a student."""

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from bksdm.families import derive
from bksdm.families.recipe import load_recipe
from bksdm.models.adapters.lora import merge_lora
from bksdm.models.adapters.run import adapt
from bksdm.models.pipelines import load_pipeline, save_pipeline
from bksdm.options.adapt import AdaptOptions
from lora_layouts import LAYOUTS, Made, kept, parameters
from tiny_models import V1_UNET, XL_UNET, build_pipeline, build_xl_pipeline
from verbs import make_student

RECIPES = {
    "v1": ("base", "small", "tiny"),
    "xl": ("base", "small", "ssd-1b", "vega", "koala-1b", "koala-700m", "comfy"),
}
OF_XL = ("kohya", "kohya, numbers of original checkpoints", "diffusers", "peft, folder")
CASES = [*(("v1", layout) for layout in LAYOUTS), *(("xl", layout) for layout in OF_XL)]
# What a layout says is read before a recipe is asked, so each meets one of the recipes in turn, and each recipe one.
CARRIED = [
    *(("v1", recipe, layout) for recipe, layout in zip(itertools.cycle(RECIPES["v1"]), LAYOUTS, strict=False)),
    *(("xl", recipe, layout) for recipe, layout in zip(RECIPES["xl"], itertools.cycle(OF_XL), strict=False)),
]


@dataclass(frozen=True)
class Models:
    """A teacher and its students: folders, and pipelines in double precision, where small changes are seen."""

    teacher: DiffusionPipeline
    folders: dict[str, Path]
    doubles: dict[str, DiffusionPipeline]


OfFamily = Callable[[str], Models]
Loras = Callable[[str, str], tuple[Made, Path]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> OfFamily:
    """Those of a family, by a short name; each is made once."""

    @cache
    def made(family: str) -> Models:
        folder = tmp_path_factory.mktemp(family)
        teacher = build_pipeline(V1_UNET) if family == "v1" else build_xl_pipeline(XL_UNET)
        save_pipeline(teacher, folder / "teacher")
        students = {recipe: make_student(teacher, folder / recipe, recipe) for recipe in RECIPES[family]}
        folders = {"teacher": folder / "teacher", **students}
        return Models(teacher, folders, {name: load_pipeline(path, torch.float64) for name, path in folders.items()})

    return made


@pytest.fixture(scope="module")
def loras(models: OfFamily, tmp_path_factory: pytest.TempPathFactory) -> Loras:
    """A LoRA of a family's teacher in a layout, and where it lies; each is made once."""

    @cache
    def made(family: str, layout: str) -> tuple[Made, Path]:
        torch.manual_seed(zlib.crc32(layout.encode()))
        lora = LAYOUTS[layout](models(family).teacher)
        return lora, lora.write(tmp_path_factory.mktemp("lora") / "it")

    return made


def check(pipeline: DiffusionPipeline, lora: Path, wanted: dict[str, Tensor]) -> None:
    """Merging adds to every parameter what is wanted, and to all others nothing."""
    was = {name: parameter.clone() for name, parameter in parameters(pipeline).items()}
    now = parameters(merge_lora(pipeline, lora))
    try:
        for name, parameter in now.items():
            change = parameter - was[name]
            if name not in wanted:
                assert not change.any(), name
            else:
                assert (change - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
        assert set(wanted) <= set(now)
    finally:
        for name, parameter in now.items():
            parameter.copy_(was[name])


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_lora_adds_to_the_teacher_what_its_format_says(
    models: OfFamily, loras: Loras, family: str, layout: str
) -> None:
    lora, file = loras(family, layout)
    check(models(family).doubles["teacher"], file, lora.changes)


@pytest.mark.parametrize(("family", "recipe", "layout"), CARRIED)
def test_a_student_gets_the_same_in_every_layer_that_stays(
    models: OfFamily,
    loras: Loras,
    tmp_path: Path,
    family: str,
    recipe: str,
    layout: str,
) -> None:
    (lora, file), own = loras(family, layout), models(family)
    folders = own.folders
    result = adapt(AdaptOptions(str(file), str(folders[recipe]), str(folders["teacher"]), str(tmp_path / "out")))
    pruning = derive(load_recipe(recipe), own.teacher.unet.config)
    wanted = kept(lora.changes, pruning)
    gone = {name.rpartition(".")[0] for name in lora.changes if not kept({name: lora.changes[name]}, pruning)}
    assert set(result.dropped) == gone
    check(own.doubles[recipe], result.out, wanted)
