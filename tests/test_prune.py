"""A student inherits: the right tensors, as copies, in a pipeline that every other tool loads."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import published
from bksdm.common.errors import InputError
from bksdm.families.recipe import Pruning, Recipe, load_recipe
from bksdm.models.pipelines import load_pipeline, save_pipeline
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.inherit import prune_unet, with_denoiser
from bksdm.pruning.run import prune
from bksdm.pruning.told import read_recipe
from fast import slow
from published import RECIPES
from tiny_models import (
    CAPTIONS,
    LATENT,
    age,
    build_tokenizer,
    random_inputs,
    run_randomly,
    tokenize,
)

every_recipe = pytest.mark.parametrize("recipe", RECIPES)
STUDENTS = [*published.STUDENTS, ("xl", "comfy")]
every_student = pytest.mark.parametrize(("version", "recipe"), STUDENTS)
# Without layers, without a stage, and of every family: which tensors a student has is asked of each.
SHOWN = [("v1", "small"), ("v1", "tiny"), ("v2", "base"), ("xl", "ssd-1b")]
SHOWN_OR_SLOW = [(pytest.param if student in SHOWN else slow)(*student) for student in STUDENTS]
Pruned = Callable[[str, str], tuple[UNet2DConditionModel, Pruning]]


@pytest.fixture(scope="module")
def pruned(request: pytest.FixtureRequest) -> Pruned:
    """Students of the teachers, each made once. Not to be changed."""
    return cache(
        lambda version, recipe: prune_unet(request.getfixturevalue(f"{version}_teacher").unet, load_recipe(recipe))
    )


@every_student
def test_every_tensor_is_the_one_that_the_published_map_names(
    pruned: Pruned, version_teacher: DiffusionPipeline, version: str, recipe: str
) -> None:
    student, _ = pruned(version, recipe)
    weights = version_teacher.unet.state_dict()
    for key, tensor in student.state_dict().items():
        assert torch.equal(tensor, weights[published.teacher_key(key, recipe, version)]), key


@pytest.mark.parametrize(("version", "recipe"), SHOWN_OR_SLOW)
def test_a_stock_unet_with_the_teachers_tensors_answers_alike(
    pruned: Pruned, version_teacher: DiffusionPipeline, version: str, recipe: str
) -> None:
    student, pruning = pruned(version, recipe)
    weights = version_teacher.unet.state_dict()
    stock = UNet2DConditionModel.from_config(pruning.student_config).eval()
    stock.load_state_dict({key: weights[published.teacher_key(key, recipe, version)] for key in stock.state_dict()})
    with torch.no_grad():
        answer = run_randomly(student)
        assert torch.equal(answer, run_randomly(stock))
    assert answer.isfinite().all()


@every_recipe
def test_the_student_shares_no_memory_with_the_teacher(teacher: StableDiffusionPipeline, recipe: str) -> None:
    student, _ = prune_unet(teacher.unet, load_recipe(recipe))
    teachers = {tensor.data_ptr() for tensor in teacher.unet.state_dict().values()}
    students = [tensor.data_ptr() for tensor in student.state_dict().values()]
    assert teachers.isdisjoint(students)
    assert len(set(students)) == len(students)


@every_recipe
def test_training_the_student_leaves_the_teacher_alone(teacher: StableDiffusionPipeline, recipe: str) -> None:
    before = copy.deepcopy(teacher.unet.state_dict())
    student, _ = prune_unet(teacher.unet, load_recipe(recipe))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(before[key], tensor) for key, tensor in teacher.unet.state_dict().items())


@every_recipe
def test_the_student_is_a_whole_unet_that_runs(teacher: StableDiffusionPipeline, recipe: str) -> None:
    student, pruning = prune_unet(teacher.unet, load_recipe(recipe))
    assert isinstance(student, UNet2DConditionModel)
    assert not student.training
    assert not any(tensor.is_meta for tensor in [*student.parameters(), *student.buffers()])
    assert {key: student.config[key] for key in pruning.student_config if not key.startswith("_")} == {
        key: value for key, value in pruning.student_config.items() if not key.startswith("_")
    }
    with torch.no_grad():
        output = student(*random_inputs()).sample
    assert output.shape == (2, 4, LATENT, LATENT)
    assert output.isfinite().all()


@every_recipe
def test_the_student_can_be_trained(teacher: StableDiffusionPipeline, recipe: str) -> None:
    student, _ = prune_unet(teacher.unet, load_recipe(recipe))
    student.train()(*random_inputs()).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@every_recipe
def test_a_config_that_leaves_out_the_defaults_means_the_same(folder: Path, recipe: str) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text())
    for key in ("mid_block_type", "layers_per_block", "down_block_types", "up_block_types"):
        del config[key]  # SD 1.4's own config names no middle block
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    student, _ = prune_unet(UNet2DConditionModel.from_pretrained(folder / "unet"), load_recipe(recipe))
    changes = published.FACTS["student_config"][recipe]
    assert {key: student.config[key] for key in changes if key != "block_out_channels"} == {
        key: value for key, value in changes.items() if key != "block_out_channels"
    }


def test_a_recipe_that_keeps_all_gives_the_same_function(teacher: StableDiffusionPipeline) -> None:
    student, _ = prune_unet(teacher.unet, Recipe("whole"))
    with torch.no_grad():
        assert torch.equal(student(*random_inputs()).sample, teacher.unet(*random_inputs()).sample)


def test_the_number_format_is_the_teachers(v1_teacher: StableDiffusionPipeline) -> None:
    half = copy.deepcopy(v1_teacher.unet).to(torch.float16)
    student, _ = prune_unet(half, load_recipe("small"))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float16}


def test_a_recipe_that_does_not_fit_is_refused(v1_teacher: StableDiffusionPipeline) -> None:
    with pytest.raises(InputError, match=r"it keeps layer 5 of down_blocks\.0, which has 2 layers"):
        prune_unet(v1_teacher.unet, Recipe("mine", down=(5,)))


def test_the_pipeline_around_the_student_shares_all_else(teacher: StableDiffusionPipeline) -> None:
    student, _ = prune_unet(teacher.unet, load_recipe("base"))
    smaller = with_denoiser(teacher, student)
    assert smaller.unet is student
    assert all(smaller.components[name] is part for name, part in teacher.components.items() if name != "unet")
    assert smaller.config.requires_safety_checker is False


# What is saved


@pytest.fixture(
    scope="module",
    params=[(pytest.param if student in SHOWN else slow)(student) for student in STUDENTS],
    ids="-".join,
)
def saved(
    request: pytest.FixtureRequest, pruned: Pruned, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DiffusionPipeline, Path]:
    """A student's pipeline and the folder it was saved to."""
    version, recipe = request.param
    teacher = request.getfixturevalue(f"{version}_teacher")
    smaller, folder = with_denoiser(teacher, pruned(version, recipe)[0]), tmp_path_factory.mktemp("students") / recipe
    save_pipeline(smaller, folder)
    return smaller, folder


@pytest.fixture(scope="module")
def loaded(saved: tuple[DiffusionPipeline, Path]) -> DiffusionPipeline:
    """What diffusers loads from there."""
    smaller, folder = saved
    return type(smaller).from_pretrained(folder)


def test_diffusers_loads_the_same_pipeline(saved: tuple[DiffusionPipeline, Path], loaded: DiffusionPipeline) -> None:
    smaller, _ = saved
    assert public(loaded.unet.config) == public(smaller.unet.config)
    assert public(loaded.scheduler.config) == public(smaller.scheduler.config)
    for name, part in smaller.components.items():
        if isinstance(part, torch.nn.Module):
            assert_equal_tensors(part, loaded.components[name])


def test_the_saved_student_makes_the_same_picture(
    saved: tuple[DiffusionPipeline, Path], loaded: DiffusionPipeline
) -> None:
    smaller, _ = saved
    loaded.set_progress_bar_config(disable=True)
    first, second = (
        pipeline(
            "red apple", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        for pipeline in (smaller, loaded)
    )
    # Tensors from a file lie elsewhere in memory, which moves the last bit of a sum.
    assert abs(first - second).max() < 1e-4


def test_the_text_encoder_has_the_names_that_older_tools_look_for(saved: tuple[DiffusionPipeline, Path]) -> None:
    for path in saved[1].glob("text_encoder*/model.safetensors"):
        names = load_file(path).keys() - {"text_projection.weight"}
        assert names
        assert all(name.startswith("text_model.") and not name.startswith("text_model.text_model.") for name in names)


def test_the_tokenizer_has_the_files_that_older_tools_look_for(saved: tuple[DiffusionPipeline, Path]) -> None:
    folder = saved[1] / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert vocabulary == build_tokenizer().get_vocab()
    assert lines == ["#version: 0.2", "r e", "re d</w>", "c a", "ca r</w>", "g re", "e n</w>"]


def test_a_tokenizer_from_these_two_files_splits_text_alike(saved: tuple[DiffusionPipeline, Path]) -> None:
    folder = saved[1] / "tokenizer"
    older = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=8)
    for text in [*CAPTIONS, "", "Grün, été & 文字", "a very very long text that is cut"]:
        assert tokenize(older, text).tolist() == tokenize(build_tokenizer(), text).tolist()


# The verb


@pytest.mark.parametrize(("version", "recipe"), [*(("v1", recipe) for recipe in RECIPES), ("xl", "vega")])
def test_a_students_folder_says_how_it_was_made(
    request: pytest.FixtureRequest, tmp_path: Path, version: str, recipe: str
) -> None:
    out, teacher = tmp_path / "student", request.getfixturevalue(f"{version}_folder")
    description = prune(PruneOptions(str(teacher), recipe, str(out)))
    assert description.pruning.recipe == load_recipe(recipe)
    assert description.student.params == sum(p.numel() for p in load_pipeline(out).unet.parameters())
    assert description.student.params < description.teacher.params
    assert {"config.yaml", "provenance.json", "recipe.yaml", "README.md"} <= {path.name for path in out.iterdir()}
    assert read_recipe(out) == load_recipe(recipe)
    assert str(teacher) in (out / "README.md").read_text()


@pytest.mark.parametrize("recipe", ["small", *(slow(recipe) for recipe in RECIPES if recipe != "small")])
def test_a_teacher_folder_as_sd_1_4_has_it_gives_the_same_student(
    folder: Path, v1_teacher: StableDiffusionPipeline, tmp_path: Path, recipe: str
) -> None:
    prune(PruneOptions(str(age(folder)), recipe, str(tmp_path / "student")))
    student = load_pipeline(tmp_path / "student")
    assert_equal_tensors(student.unet, prune_unet(v1_teacher.unet, load_recipe(recipe))[0])
    assert student.safety_checker is not None


def test_a_recipe_of_ones_own_goes_with_the_student(v1_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\nmid: false\n")
    prune(PruneOptions(str(v1_folder), str(mine), str(tmp_path / "student")))
    mine.unlink()
    assert read_recipe(tmp_path / "student") == Recipe("mine", mid=False)


def test_the_same_command_may_run_again_and_another_may_not(v1_folder: Path, tmp_path: Path) -> None:
    options = PruneOptions(str(v1_folder), "base", str(tmp_path / "student"))
    prune(options)
    prune(replace(options, json=True))
    with pytest.raises(InputError, match=r"holds another run \(recipe: 'base' there, 'tiny' now\)"):
        prune(replace(options, recipe="tiny"))
    assert read_recipe(tmp_path / "student") == load_recipe("base")


def test_what_is_there_is_not_made_again(v1_folder: Path, tmp_path: Path) -> None:
    options = PruneOptions(str(v1_folder), "base", str(tmp_path / "student"))
    first = prune(options)
    (tmp_path / "student" / "notes.txt").write_text("mine")
    assert prune(options) == first
    assert (tmp_path / "student" / "notes.txt").read_text() == "mine"


def test_a_recipe_or_teacher_that_changed_makes_another_student(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nmid: false\n")
    options = PruneOptions(str(folder), str(recipe), str(tmp_path / "student"))
    prune(options)
    recipe.write_text("name: mine\ndown: [0]\nup: [0, -1]\n")
    with pytest.raises(InputError, match="the content of recipe has changed since"):
        prune(options)
    recipe.write_text("name: mine\nmid: false\n")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("epsilon", "v_prediction"))
    with pytest.raises(InputError, match="the content of teacher has changed since"):
        prune(options)


def test_a_folder_of_something_else_is_left_alone(v1_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and holds no run of bksdm; choose another --out"):
        prune(PruneOptions(str(v1_folder), "base", str(tmp_path)))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_without_recipe_is_not_a_students(v1_folder: Path) -> None:
    with pytest.raises(InputError, match=r"has no recipe.yaml, so it was not made by bksdm prune; run that first"):
        read_recipe(v1_folder)


def public(config: dict) -> dict:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if not key.startswith("_")
    }


def assert_equal_tensors(first: torch.nn.Module, second: torch.nn.Module) -> None:
    theirs = second.state_dict()
    assert first.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in first.state_dict().items())
