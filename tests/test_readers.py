"""Which programs read what a recipe leaves, by a table that is data."""

import pytest
import yaml

from bksdm.common.assets import asset
from bksdm.families import derive, readers
from bksdm.families.recipe import Recipe, load_recipe
from bksdm.pruning.describe import describe_config
from published import TEACHERS, UNETS, XL
from tiny_models import V1_UNET


def answers(config: dict, program: str) -> dict[str, str]:
    """What a program makes of a U-Net, by what it is given."""
    return {reader.file: reader.answer for reader in readers(config) if reader.program == program}


def student(version: str, recipe: str | Recipe) -> dict:
    own = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return derive(own, TEACHERS[version]).student_config


@pytest.mark.parametrize(
    ("recipe", "answer"),
    [
        ("base", "no"),
        ("small", "no"),
        ("ssd-1b", "yes"),
        ("vega", "yes"),
        ("koala-1b", "yes"),
        ("koala-700m", "yes"),
        ("comfy", "yes"),
    ],
)
def test_comfyui_reads_sdxl_by_its_way_down_alone(recipe: str, answer: str) -> None:
    assert answers(student("xl", recipe), "ComfyUI")["single file"] == answer


@pytest.mark.parametrize("mid", [True, "resnet", False])
def test_comfyui_does_not_look_at_the_middle_and_the_way_up(mid: object) -> None:
    assert answers(student("xl", Recipe("mine", mid=mid, up_transformers=(0,))), "ComfyUI") == {
        "single file": "yes",
        "folder": "no",
    }
    assert answers(student("xl", Recipe("mine", mid="resnet", down_transformers=(0,))), "ComfyUI") == {
        "single file": "no",
        "folder": "no",
    }


@pytest.mark.parametrize(
    ("version", "recipe", "file", "answer"),
    [
        ("xl", "ssd-1b", "single file", "yes"),
        ("xl", "vega", "single file", "yes"),
        ("xl", "koala-700m", "single file", "no"),
        ("xl", "koala-1b", "single file", "no"),
        ("xl", "comfy", "single file", "no"),
        ("v1", "base", "single file", "no"),
        ("v1", "tiny", "folder", "yes"),
        ("v1", "base", "folder", "no"),
    ],
)
def test_stable_diffusion_cpp_knows_few(version: str, recipe: str, file: str, answer: str) -> None:
    assert answers(student(version, recipe), "stable-diffusion.cpp")[file] == answer


@pytest.mark.parametrize("version", UNETS)
@pytest.mark.parametrize("recipe", ["base", "small", "tiny"])
def test_students_of_stable_diffusion_are_read_as_was_seen(version: str, recipe: str) -> None:
    found = {(reader.program, reader.file): reader for reader in readers(student(version, recipe))}
    assert (found["ComfyUI", "single file"].answer, found["ComfyUI", "single file"].seen) == ("yes", "run")
    assert found["ComfyUI", "folder"].answer == "no"
    assert found["diffusers from_single_file", "single file"].answer == "with config="


def test_what_was_not_run_says_so() -> None:
    line = next(str(reader) for reader in readers(student("xl", "comfy")) if reader.program == "ComfyUI")
    assert line == "ComfyUI, single file: yes, it knows this way down and counts the rest (from its code, not run)"


def test_of_other_widths_nothing_is_known_but_diffusers() -> None:
    for config in (V1_UNET | {"down_block_types": UNETS["v1"]["down_block_types"]}, UNETS["v1"] | {"in_channels": 9}):
        full = UNETS["v1"] | config
        assert [reader.program for reader in readers(full)] == ["diffusers"]


def test_the_description_of_a_student_names_its_readers() -> None:
    made = describe_config(XL, load_recipe("vega"))
    assert "- ComfyUI, folder: yes, it is in its list as Vega (from its code, not run)" in made.text().splitlines()
    assert {"program": "diffusers", "file": "folder", "answer": "yes", "seen": "run", "why": ""} in (
        made.to_dict()["read_by"]
    )
    assert "who reads it" not in describe_config(UNETS["v1"] | {"sample_size": 8}).text()


def test_every_rule_names_facts_that_there_are() -> None:
    for entry in yaml.safe_load(asset("readers.yaml").read_text(encoding="utf-8")):
        for rule in entry["rules"]:
            assert rule.keys() <= {"model", "layers", "down", "up", "mid", "answer", "why", "seen"}
            assert rule["seen"] in ("run", "code")
            assert isinstance(rule["answer"], str)
