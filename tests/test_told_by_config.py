"""A student without `recipe.yaml`: its U-Net's config and its teacher's tell how it was made, or nobody does."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from bksdm.common.errors import InputError
from bksdm.export.ldm import write_single_file
from bksdm.families import derive, recipes_between
from bksdm.families.recipe import Recipe, load_recipe
from bksdm.models.configs import load_denoiser_config
from bksdm.models.pipelines import load_pipeline
from bksdm.pruning.told import RECIPE_FILE, checked_pruning, read_recipe, recipe_of
from hub_cache import in_hub_cache
from published import STUDENTS, TEACHERS, UNETS, XL, student_config
from verbs import Run

pytest_plugins = ["verbs_fixtures"]

WHOLE_DOWN, WHOLE_UP = (0, 1), (0, 1, 2)
# One layer of the second stage: its first and last layers have shapes of their own, so that only one can go.
ONLY_ONE = Recipe("only", down=(WHOLE_DOWN, (0,), WHOLE_DOWN, WHOLE_DOWN), up=(WHOLE_UP, (0, 2), WHOLE_UP, WHOLE_UP))
NO_MIDDLE = Recipe("none", mid=False)
NO_ATTENTION = Recipe("resnet", mid="resnet")
# One layer of the outermost stage, whose two layers take the same channels.
EITHER = Recipe("either", down=((1,), *(WHOLE_DOWN,) * 3), up=((0, 2), *(WHOLE_UP,) * 3))


def without_recipe(student: Path, out: Path) -> Path:
    folder = Path(shutil.copytree(student, out))
    (folder / RECIPE_FILE).unlink()
    return folder


def bare(folder: Path, config: dict) -> Path:
    """A model of which nothing but the U-Net's config is here."""
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    return folder


def told(teacher: Path | str, student: Path | str) -> Recipe:
    configs = load_denoiser_config(teacher), load_denoiser_config(student)
    return checked_pruning(str(teacher), str(student), *configs).recipe


@pytest.mark.parametrize(("version", "recipe"), STUDENTS)
def test_the_published_students_are_known_by_their_configs(version: str, recipe: str, tmp_path: Path) -> None:
    teacher = bare(tmp_path / "teacher", TEACHERS[version])
    assert told(teacher, bare(tmp_path / "student", student_config(version, recipe))) == load_recipe(recipe)


@pytest.mark.parametrize(
    ("version", "kept"),
    [("v1", ONLY_ONE), ("v1", NO_MIDDLE), ("v1", NO_ATTENTION), ("xl", NO_MIDDLE), ("xl", NO_ATTENTION)],
    ids=lambda value: getattr(value, "name", value),
)
def test_where_one_recipe_gives_the_config_it_is_the_one(tmp_path: Path, version: str, kept: Recipe) -> None:
    teacher = TEACHERS[version]
    pruning = derive(kept, teacher)
    found = told(bare(tmp_path / "teacher", teacher), bare(tmp_path / "mine", pruning.student_config))
    assert found.name == "mine"
    assert derive(found, teacher).key_map == pruning.key_map


def test_which_transformer_layers_stayed_no_config_tells(tmp_path: Path) -> None:
    pruning = derive(Recipe("deep", up_transformers=("all", "all", (1, 3, 5))), XL)
    teacher, student = bare(tmp_path / "teacher", XL), bare(tmp_path / "mine", pruning.student_config)
    with pytest.raises(InputError, match="names no recipe, and several give its config; write the one") as refused:
        told(teacher, student)
    assert "up_transformers: [all, all, [0, 1, 2]]" in str(refused.value)


def test_where_several_do_a_person_has_to_say_which(tmp_path: Path) -> None:
    pruning = derive(EITHER, UNETS["v1"])
    teacher, student = bare(tmp_path / "teacher", UNETS["v1"]), bare(tmp_path / "mine", pruning.student_config)
    with pytest.raises(InputError) as refused:
        told(teacher, student)
    said, _, example = str(refused.value).partition(", such as ")
    assert said == (
        f"student {student} names no recipe, and several give its config; write the one that it was made by into the "
        f"file recipe.yaml of its folder"
    )
    candidates = recipes_between(UNETS["v1"], pruning.student_config, "mine")
    assert pruning.key_map in [derive(candidate, UNETS["v1"]).key_map for candidate in candidates]
    (student / RECIPE_FILE).write_text(example)  # what is shown is what can be written
    assert told(teacher, student) == candidates[0]


def test_configs_of_old_leave_out_what_was_always_so(tmp_path: Path) -> None:
    assert "mid_block_type" not in UNETS["v1"], "SD 1.4's own config names no middle block"
    teacher = bare(tmp_path / "teacher", UNETS["v1"] | {"mid_block_type": "UNetMidBlock2DCrossAttn"})
    student = derive(load_recipe("base"), UNETS["v1"]).student_config
    assert told(teacher, bare(tmp_path / "student", student)) == load_recipe("base")


def test_layers_may_be_listed_stage_by_stage(tmp_path: Path) -> None:
    student = student_config("v1", "small") | {"layers_per_block": [1, 1, 1, 1]}
    found = told(bare(tmp_path / "teacher", UNETS["v1"]), bare(tmp_path / "student", student))
    assert found == load_recipe("small")


def test_a_student_of_another_teacher_is_none(v1_folder: Path, v2_student: Path, tmp_path: Path) -> None:
    student = without_recipe(v2_student, tmp_path / "student")
    with pytest.raises(InputError) as refused:
        told(v1_folder, student)
    assert str(refused.value) == (
        f"student {student} names no recipe, and none makes its U-Net out of that of teacher {v1_folder}; give its own "
        f"teacher"
    )


def test_a_student_with_attentions_that_its_teacher_lacks_is_none(tmp_path: Path) -> None:
    student = UNETS["v1"] | {"down_block_types": ["CrossAttnDownBlock2D"] * 4, "layers_per_block": 1}
    with pytest.raises(InputError, match="names no recipe, and none makes its U-Net"):
        told(bare(tmp_path / "teacher", UNETS["v1"]), bare(tmp_path / "student", student))


def test_a_run_says_what_it_found_and_writes_it_down(
    run: Run, v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path
) -> None:
    student = without_recipe(v1_student, tmp_path / "student")
    words = ["--student", student, "--data", pictures, "--out", tmp_path / "run", "--steps", 1, "--batch_size", 1]
    outcome = run("distill", v1_folder, *words, "--accumulation", 1, "--sample_every", 0, "--precision", "fp32")
    assert outcome.code == 0
    assert f"student {student} names no recipe; its config is the one that recipe 'small' gives" in outcome.said
    assert read_recipe(tmp_path / "run" / "student") == load_recipe("small")


def test_a_single_file_of_others_is_known_too(v1_folder: Path, v1_student: Path, tmp_path: Path) -> None:
    write_single_file(load_pipeline(v1_student), tmp_path / "student.safetensors")
    assert told(v1_folder, tmp_path / "student.safetensors") == load_recipe("small")


@pytest.mark.parametrize("has_recipe", [True, False])
def test_a_student_on_the_hub_is_one_like_any_other(
    v1_folder: Path,
    v1_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_recipe: bool,
) -> None:
    student = without_recipe(v1_student, tmp_path / "student")
    if has_recipe:
        (student / RECIPE_FILE).write_text(yaml.safe_dump(load_recipe("small").to_dict() | {"name": "mine"}))
    in_hub_cache(student, "someone/small", tmp_path / "cache", monkeypatch)
    own = recipe_of("someone/small")
    assert (own.name if own else None) == ("mine" if has_recipe else None)
    assert told(v1_folder, "someone/small") == (own or load_recipe("small"))
