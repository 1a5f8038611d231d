"""LoRAs in every layout: what a format says is what `generate --lora` merges, and what `adapt` carries to a student."""

import zlib
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from bksdm.families import derive
from bksdm.families.recipe import load_recipe
from bksdm.models.adapters.lora import merge_lora
from bksdm.models.adapters.run import adapt
from bksdm.models.pipelines import load_pipeline
from bksdm.options import AdaptOptions
from lora_layouts import LAYOUTS, Made, parameters
from verbs import make_student

RECIPES = ("base", "small", "tiny")


@pytest.fixture(scope="module")
def students(v1_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    return {recipe: make_student(v1_teacher, folder / recipe, recipe) for recipe in RECIPES}


@pytest.fixture(scope="module")
def doubles(v1_folder: Path, students: dict[str, Path]) -> dict[str, StableDiffusionPipeline]:
    """Teacher and students in double precision, in which small changes of large weights are seen."""
    folders = {"teacher": v1_folder, **students}
    return {name: load_pipeline(folder, torch.float64) for name, folder in folders.items()}


@pytest.fixture(scope="module", params=LAYOUTS)
def made(
    request: pytest.FixtureRequest, v1_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Made, Path]:
    """A LoRA of the teacher in each layout, and where it lies."""
    torch.manual_seed(zlib.crc32(request.param.encode()))
    lora = LAYOUTS[request.param](v1_teacher)
    return lora, lora.write(tmp_path_factory.mktemp("lora") / "it")


def check(pipeline: StableDiffusionPipeline, lora: Path, wanted: dict[str, Tensor]) -> None:
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


def test_a_lora_adds_to_the_teacher_what_its_format_says(
    made: tuple[Made, Path], doubles: dict[str, StableDiffusionPipeline]
) -> None:
    lora, file = made
    check(doubles["teacher"], file, lora.changes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_student_gets_the_same_in_every_layer_that_stays(
    made: tuple[Made, Path],
    v1_teacher: StableDiffusionPipeline,
    v1_folder: Path,
    students: dict[str, Path],
    doubles: dict[str, StableDiffusionPipeline],
    tmp_path: Path,
    recipe: str,
) -> None:
    lora, file = made
    result = adapt(AdaptOptions(str(file), str(students[recipe]), str(v1_folder), str(tmp_path / "out")))
    pruning = derive(load_recipe(recipe), v1_teacher.unet.config)
    wanted, gone = {}, set()
    for name, change in lora.changes.items():
        part, _, path = name.partition(".")
        here = pruning.student_key(path) if part == "unet" else path
        if here is None:
            gone.add(name.rpartition(".")[0])
        else:
            wanted[f"{part}.{here}"] = change
    assert set(result.dropped) == gone
    check(doubles[recipe], result.out, wanted)
