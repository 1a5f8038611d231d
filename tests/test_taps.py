"""Features: what is recorded, when, and that nothing else changes."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from bksdm.families import derive
from bksdm.families.recipe import Pruning, Tap, load_recipe
from bksdm.pruning.inherit import prune_unet
from bksdm.pruning.taps import Features
from fast import slow
from published import RECIPES, STUDENTS, taps
from tiny_models import added_conditions, random_inputs, xl_unet

SHOWN = (("v1", "base"), ("v1", "tiny"), ("xl", "ssd-1b"))
PATHS = list(dict.fromkeys(teacher for recipe in RECIPES for teacher, _ in taps(recipe)))


@pytest.fixture
def unet(v1_teacher: StableDiffusionPipeline) -> UNet2DConditionModel:
    return copy.deepcopy(v1_teacher.unet).train()


def recorded_by_hand(unet: UNet2DConditionModel, path: str) -> Tensor:
    """The output of one module, or the first of its outputs, by a hook of the test's own."""
    seen = []
    handle = unet.get_submodule(path).register_forward_hook(lambda _module, _args, output: seen.append(output))
    with torch.no_grad():
        unet(*random_inputs())
    handle.remove()
    assert len(seen) == 1
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_output_of_every_tap_is_recorded(unet: UNet2DConditionModel, checkpointing: bool) -> None:
    wanted = {path: recorded_by_hand(unet, path) for path in PATHS}
    if checkpointing:
        unet.enable_gradient_checkpointing()
    features = Features(unet, PATHS)
    with features.recording() as seen:
        unet(*random_inputs())
    assert seen.keys() == set(PATHS)
    for path in PATHS:
        assert torch.equal(seen[path], wanted[path]), path


@pytest.fixture(scope="module")
def teachers(request: pytest.FixtureRequest) -> Callable[[str], tuple[UNet2DConditionModel, dict[str, torch.Size]]]:
    """A version's U-Net, and the shapes of what any recipe matches, from one pass for all recipes."""

    @cache
    def found(version: str) -> tuple[UNet2DConditionModel, dict[str, torch.Size]]:
        unet = xl_unet() if version == "xl" else request.getfixturevalue(f"{version}_teacher").unet
        recipes = [load_recipe(recipe) for own, recipe in STUDENTS if own == version]
        paths = [tap.teacher for recipe in recipes for tap in matched(derive(recipe, unet.config))]
        return unet, shapes(copy.deepcopy(unet), paths)

    return found


def matched(pruning: Pruning) -> list[Tap]:
    return [*pruning.chosen_taps("both"), *pruning.chosen_taps("layers")]


def shapes(unet: UNet2DConditionModel, paths: list[str]) -> dict[str, torch.Size]:
    """Those of features, by their paths, in a pass with checkpointed gradients."""
    unet.train().enable_gradient_checkpointing()
    with Features(unet, paths).recording() as found:
        unet(*random_inputs(), added_cond_kwargs=added_conditions(unet.config))
    return {path: found[path].shape for path in paths}


@pytest.mark.parametrize(
    ("version", "recipe"), [(pytest.param if student in SHOWN else slow)(*student) for student in STUDENTS]
)
def test_what_is_matched_has_one_shape(
    teachers: Callable[[str], tuple[UNet2DConditionModel, dict[str, torch.Size]]], version: str, recipe: str
) -> None:
    unet, whole = teachers(version)
    student, pruning = prune_unet(unet, load_recipe(recipe))
    taps = matched(pruning)
    found = shapes(student, [tap.student for tap in taps])
    assert [found[tap.student] for tap in taps] == [whole[tap.teacher] for tap in taps]


def test_of_a_block_that_returns_a_tuple_the_hidden_states_are_read(unet: UNet2DConditionModel) -> None:
    features = Features(unet, ["down_blocks.0", "down_blocks.3", "up_blocks.3"])
    with features.recording() as seen, torch.no_grad():
        unet(*random_inputs())
    assert [tuple(feature.shape) for feature in seen.values()] == [(2, 32, 4, 4), (2, 64, 1, 1), (2, 32, 8, 8)]


def test_nothing_is_recorded_outside(unet: UNet2DConditionModel) -> None:
    features = Features(unet, PATHS)
    with torch.no_grad():
        unet(*random_inputs())
        with features.recording() as seen:
            assert seen == {}
        unet(*random_inputs())
    assert seen == {}


def test_a_later_pass_does_not_change_what_was_recorded(unet: UNet2DConditionModel) -> None:
    features = Features(unet, ["up_blocks.0"])
    with torch.no_grad():
        with features.recording() as first:
            unet(*random_inputs(seed=0))
        kept = first["up_blocks.0"].clone()
        with features.recording() as second:
            unet(*random_inputs(seed=1))
    assert torch.equal(first["up_blocks.0"], kept)
    assert not torch.equal(second["up_blocks.0"], kept)


def test_the_second_run_of_gradient_checkpointing_is_not_recorded(unet: UNet2DConditionModel) -> None:
    unet.enable_gradient_checkpointing()
    features = Features(unet, PATHS)
    with features.recording() as seen:
        output = unet(*random_inputs()).sample
    before = dict(seen)
    output.square().mean().backward()
    assert seen.keys() == before.keys()
    assert all(seen[path] is before[path] for path in before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recorded_features_carry_gradients(unet: UNet2DConditionModel, checkpointing: bool) -> None:
    if checkpointing:
        unet.enable_gradient_checkpointing()
    features = Features(unet, PATHS)
    with features.recording() as seen:
        unet(*random_inputs())
    for path in PATHS:
        (gradient,) = torch.autograd.grad(seen[path].square().mean(), unet.conv_in.weight, retain_graph=True)
        assert gradient.abs().max() > 0, path


def test_recording_ends_when_a_pass_fails(unet: UNet2DConditionModel) -> None:
    features = Features(unet, ["up_blocks.0"])
    with pytest.raises(RuntimeError), features.recording() as seen:
        unet(torch.zeros(1, 3, 8, 8), 0, torch.zeros(1, 8, 32))
    with torch.no_grad():
        unet(*random_inputs())
    assert seen == {}


def test_watching_changes_no_output(unet: UNet2DConditionModel) -> None:
    with torch.no_grad():
        alone = unet(*random_inputs()).sample
        with Features(unet, PATHS).recording():
            watched = unet(*random_inputs()).sample
    assert torch.equal(alone, watched)


def test_removed_hooks_record_nothing(unet: UNet2DConditionModel) -> None:
    features = Features(unet, PATHS)
    features.remove()
    with features.recording() as seen, torch.no_grad():
        unet(*random_inputs())
    assert seen == {}
    assert not any(module._forward_hooks for module in unet.modules())


def test_a_path_that_comes_twice_has_one_hook() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    Features(model, ["0", "0"])
    assert len(model[0]._forward_hooks) == 1


def test_a_path_that_names_no_module_is_an_error(unet: UNet2DConditionModel) -> None:
    with pytest.raises(AttributeError):
        Features(unet, ["down_blocks.9"])
