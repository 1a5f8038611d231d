"""What a U-Net can lose, and that running without it is what pruning makes of it."""

import copy
from functools import cache

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.families import bypassed, derive, recipe_without, removals, units
from bksdm.families.recipe import Recipe, load_recipe
from bksdm.families.units import Names
from bksdm.pruning.inherit import prune_unet
from fast import slow
from published import RECIPES, UNETS, XL, XL_FACTS
from removable import all_sets, named, single_choices
from tiny_models import V1_UNET, V2_UNET, XL_UNET, added_conditions, random_inputs, xl_unet


@cache
def network(**changes: object) -> UNet2DConditionModel:
    """A small U-Net with these changes to that of v1. Not to be changed."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**V1_UNET | changes).eval()


V1 = dict(network().config)
UNUSUAL = {
    "v1": {},
    "v2": V2_UNET,
    "three layers": {"layers_per_block": 3, "block_out_channels": (32, 32, 64, 64)},
    "uneven layers": {"layers_per_block": (1, 2, 3, 2)},
    "one width": {"block_out_channels": (32, 32, 32, 32)},
    "no middle": {"mid_block_type": None},
    "scaled": {"resnet_out_scale_factor": 2.0},
    "xl": XL_UNET | {"transformer_layers_per_block": (1, 2, 3), "layers_per_block": 1},
    "xl, two layers": XL_UNET | {"transformer_layers_per_block": (1, 1, 2)},
    "deep middle": {"transformer_layers_per_block": (1, 1, 1, 3)},
}


every_shape = pytest.mark.parametrize("changes", UNUSUAL.values(), ids=UNUSUAL)


@torch.no_grad()
def output(unet: UNet2DConditionModel) -> Tensor:
    return unet(*random_inputs(), added_cond_kwargs=added_conditions(unet.config)).sample


# What is there


@pytest.mark.parametrize("version", UNETS)
def test_the_units_of_stable_diffusion(version: str) -> None:
    found = units(UNETS[version])
    assert [sum(unit.kind == kind for unit in found) for kind in ("down", "mid", "innermost", "up")] == [8, 1, 1, 12]
    assert {unit.name for unit in found if unit.why_it_stays} == {
        "down_blocks.1 layer 0",
        "down_blocks.2 layer 0",
        "up_blocks.1 layer 2",
        "up_blocks.2 layer 0",
        "up_blocks.2 layer 2",
        "up_blocks.3 layer 0",
    }
    assert {unit.name for unit in found if unit.keeps_shortcut} == {
        "down_blocks.1 layer 0",
        "down_blocks.2 layer 0",
        "up_blocks.2 layer 0",
        "up_blocks.3 layer 0",
    }


def test_the_units_of_sdxl() -> None:
    """Layers and stages as ever, 70 transformer layers in attentions that have several, and the middle's attention."""
    found = {unit.name: unit for unit in units(XL)}
    assert len(found) == 6 + 9 + 1 + 1 + 70
    assert "innermost stage" not in found, "no two stages have one width"
    assert found["mid_block attention"].paths == ("mid_block.attentions.0", "mid_block.resnets.1")
    assert found["up_blocks.0 layer 2 transformer 9"].paths == ("up_blocks.0.attentions.2.transformer_blocks.9",)
    assert list(found)[2:6] == [
        "down_blocks.1 layer 0",
        "down_blocks.1 layer 0 transformer 0",
        "down_blocks.1 layer 0 transformer 1",
        "down_blocks.1 layer 1",
    ]


def test_all_units_of_a_deep_unet_can_be_bypassed_at_once() -> None:
    """A transformer layer may be inside of a layer that goes too."""
    unet = network(**UNUSUAL["xl"])
    before = output(unet)
    with bypassed(unet, units(unet.config)):
        assert not torch.allclose(output(unet), before, atol=1e-4)
    assert torch.equal(output(unet), before)


def test_a_unit_names_its_modules() -> None:
    paths = {unit.name: unit.paths for unit in units(UNETS["v1"])}
    assert paths["down_blocks.0 layer 1"] == ("down_blocks.0.resnets.1", "down_blocks.0.attentions.1")
    assert paths["up_blocks.0 layer 2"] == ("up_blocks.0.resnets.2",)
    assert paths["innermost stage"] == ("down_blocks.2.downsamplers", "down_blocks.3", "up_blocks.0")


@every_shape
def test_what_recipes_can_remove_is_what_is_called_removable(changes: dict) -> None:
    config = dict(network(**changes).config)
    assert frozenset().union(*all_sets(config)) == {unit.name for unit in units(config) if unit.removable}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_published_recipes_are_among_what_can_be_removed(recipe: str) -> None:
    wanted = derive(load_recipe(recipe), UNETS["v1"])
    found = [derive(recipe_without(UNETS["v1"], names, recipe), UNETS["v1"]) for names in all_sets(UNETS["v1"])]
    assert any((item.student_config, item.key_map) == (wanted.student_config, wanted.key_map) for item in found)


@every_shape
def test_what_can_be_removed_derives_and_is_the_modules_of_its_units(changes: dict) -> None:
    config = dict(network(**changes).config)
    sets = list(all_sets(config))
    assert len(sets) == len(set(sets)) > 1
    for names in [*single_choices(config), *sets[:: len(sets) // 50 + 1]]:
        removed = derive(recipe_without(config, names, "mine"), config).removed
        wanted = tuple(f"{path}." for unit in named(config, names) for path in unit.paths)
        assert all(f"{path}.".startswith(wanted) for path in removed)
        assert all(any(f"{path}.".startswith(part) for path in removed) for part in wanted)


def test_nothing_is_removed_by_the_recipe_without_nothing() -> None:
    assert derive(recipe_without(UNETS["v1"], frozenset(), "whole"), UNETS["v1"]).removed == ()


def test_other_families_are_refused() -> None:
    for function in (units, removals):
        with pytest.raises(InputError, match="cannot be pruned: it takes class labels"):
            function(V1 | {"num_class_embeds": 10})


# Running without it


@pytest.mark.parametrize("shape", [slow("three layers"), "uneven layers", "xl", slow("xl, two layers"), "deep middle"])
def test_the_bypassed_teacher_is_the_pruned_student(shape: str) -> None:
    teacher = network(**UNUSUAL[shape])
    sets = list(single_choices(dict(teacher.config)))
    for names in sets[1 :: len(sets) // 4]:
        assert_bypassed_is_pruned(teacher, names)


@pytest.mark.slow
@every_shape
def test_the_bypassed_teacher_is_the_pruned_student_in_all_cases(changes: dict) -> None:
    teacher = network(**changes)
    sets = sorted(single_choices(dict(teacher.config)), key=sorted)
    for names in sets[:: len(sets) // 200 + 1]:
        assert_bypassed_is_pruned(teacher, names)


def assert_bypassed_is_pruned(teacher: UNet2DConditionModel, names: Names) -> None:
    config, whole = dict(teacher.config), output(teacher)
    student, _ = prune_unet(teacher, recipe_without(config, names, "mine"))
    with bypassed(teacher, named(config, names)):
        without = output(teacher)
    torch.testing.assert_close(without, output(student), atol=1e-5, rtol=1e-5)
    assert not names or not torch.allclose(without, whole, atol=1e-4), names


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_teacher_without_all_that_a_published_recipe_removes_is_its_student(
    teacher: StableDiffusionPipeline, recipe: str
) -> None:
    config = dict(teacher.unet.config)
    student, pruning = prune_unet(teacher.unet, load_recipe(recipe))
    gone = [unit for unit in units(config) if unit.removable and set(unit.paths) <= set(pruning.removed)]
    if recipe == "tiny":
        gone = [unit for unit in gone if not unit.name.startswith(("down_blocks.3", "up_blocks.0"))]
        gone += named(config, ["innermost stage"])
    with bypassed(teacher.unet, gone):
        torch.testing.assert_close(output(teacher.unet), output(student), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", XL_FACTS["student_config"])
def test_sdxl_without_all_that_a_published_recipe_removes_is_its_student(recipe: str) -> None:
    teacher = xl_unet()
    student, pruning = prune_unet(teacher, load_recipe(recipe))
    gone = [unit for unit in units(teacher.config) if set(unit.paths) <= set(pruning.removed)]
    with bypassed(teacher, gone):
        torch.testing.assert_close(output(teacher), output(student), atol=1e-5, rtol=1e-5)
    wanted = derive(recipe_without(dict(teacher.config), frozenset(unit.name for unit in gone), recipe), teacher.config)
    assert (wanted.student_config, wanted.key_map) == (pruning.student_config, pruning.key_map)


def test_a_down_layer_hands_its_hidden_states_on_and_into_the_skip_connection(
    v1_teacher: StableDiffusionPipeline,
) -> None:
    stage = v1_teacher.unet.down_blocks[0]
    with torch.no_grad(), bypassed(v1_teacher.unet, named(V1, ["down_blocks.0 layer 1"])):
        _, skips = stage(torch.randn(2, 32, 8, 8), torch.randn(2, 128), random_inputs()[2])
    assert torch.equal(skips[0], skips[1])


def test_an_up_layer_drops_the_skip_connection_that_it_took(v1_teacher: StableDiffusionPipeline) -> None:
    stage = v1_teacher.unet.up_blocks[0]
    hidden, time = torch.randn(2, 64, 1, 1), torch.randn(2, 128)
    skips = [torch.randn(2, 64, 1, 1) for _ in range(3)]

    @torch.no_grad()
    def run(*given: Tensor) -> Tensor:
        return stage(hidden, tuple(given), time)

    other = torch.randn(2, 64, 1, 1)
    assert not torch.allclose(run(*skips), run(skips[0], other, skips[2]))
    with bypassed(v1_teacher.unet, named(V1, ["up_blocks.0 layer 1"])):
        assert torch.equal(run(*skips), run(skips[0], other, skips[2]))
        assert not torch.allclose(run(*skips), run(other, *skips[1:]))


@pytest.mark.parametrize("changes", [{}, UNUSUAL["scaled"]], ids=["v1", "scaled"])
def test_where_channels_change_the_shortcut_stays(changes: dict) -> None:
    unet, (latents, time, context) = copy.deepcopy(network(**changes)), random_inputs()
    kept = [unit for unit in units(unet.config) if unit.keeps_shortcut]
    assert [unit.name for unit in kept] == ["down_blocks.1 layer 0", "up_blocks.3 layer 0"]
    seen = {}
    resnet = unet.down_blocks[1].resnets[0]
    stage = unet.down_blocks[1]
    stage.register_forward_pre_hook(lambda _, args, given: seen.update(takes=given["hidden_states"]), with_kwargs=True)
    stage.register_forward_hook(lambda _, args, given: seen.update(gives=given[1][0]))
    with torch.no_grad(), bypassed(unet, kept[:1]):
        unet(latents, time, context)
        torch.testing.assert_close(seen["gives"], resnet.conv_shortcut(seen["takes"]) / resnet.output_scale_factor)


@pytest.mark.parametrize("version", ["v1", slow("v2")])
def test_every_unit_of_every_teacher_can_be_bypassed_and_comes_back(version_teacher: StableDiffusionPipeline) -> None:
    assert_units_come_back(version_teacher.unet)


def test_every_unit_of_a_deep_unet_can_be_bypassed_and_comes_back() -> None:
    assert_units_come_back(network(**UNUSUAL["xl"]))


def assert_units_come_back(unet: UNet2DConditionModel) -> None:
    before, modules = output(unet), dict(unet.named_modules())
    weights = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    for unit in units(unet.config):
        with bypassed(unet, [unit]):
            assert not torch.allclose(output(unet), before, atol=1e-5), unit.name
        assert dict(unet.named_modules()) == modules
        assert torch.equal(output(unet), before)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in unet.state_dict().items())


def test_a_bypass_that_ends_in_an_error_is_undone(v1_teacher: StableDiffusionPipeline) -> None:
    before = output(v1_teacher.unet)
    with pytest.raises(KeyError), bypassed(v1_teacher.unet, units(V1)):
        raise KeyError
    assert torch.equal(output(v1_teacher.unet), before)


def test_the_recipe_without_units_names_the_layers_that_stay() -> None:
    names = frozenset(["mid_block", "innermost stage", "down_blocks.0 layer 0", "up_blocks.3 layer 1"])
    assert recipe_without(UNETS["v1"], names, "mine", "For a test.") == Recipe(
        name="mine",
        down=((1,), (0, 1), (0, 1)),
        up=((0, 2), (0, 1, 2), (0, 1, 2)),
        mid=False,
        drop_innermost=1,
    )
