"""What a recipe means for the U-Nets of Stable Diffusion and of SDXL: the published students, and any other."""

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import published
from bksdm.common.errors import InputError
from bksdm.families import derive, difference
from bksdm.families.recipe import Pruning, Recipe, Stage, load_recipe
from fast import slow
from published import FACTS, RECIPES, STUDENTS, TEACHERS, UNETS, XL

WHOLE = Recipe("whole")
every_published_student = pytest.mark.parametrize(("version", "recipe"), STUDENTS)


@cache
def pruned(version: str, recipe: str) -> Pruning:
    return derive(load_recipe(recipe), TEACHERS[version])


# The U-Net of SDXL's refiner.
REFINER = {
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 4,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}


def unet(widths: tuple[int, ...], **more: object) -> dict:
    """The config of a U-Net with attention in all stages but the innermost."""
    inner = len(widths) - 1
    config = {
        "block_out_channels": list(widths),
        "down_block_types": ["CrossAttnDownBlock2D"] * inner + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * inner,
        "layers_per_block": 2,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "sample_size": 8,
    }
    return config | more


@cache
def _shapes(frozen: tuple) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config({key: _thawed(value) for key, value in frozen})
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def _thawed(value: object) -> object:
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


def _frozen(value: object) -> object:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def shapes(config: dict) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of the stock U-Net with this config."""
    return _shapes(tuple((key, _frozen(value)) for key, value in config.items()))


def assert_inherits(pruning: Pruning, config: dict) -> None:
    """Every tensor of the student is one of the teacher's, in shape too, and none serves twice."""
    teacher, student = shapes(config), shapes(pruning.student_config)
    sources = [pruning.teacher_key(key) for key in student]
    assert len(set(sources)) == len(sources)
    assert {key: teacher[pruning.teacher_key(key)] for key in student} == student


@every_published_student
def test_the_students_config_is_the_published_one(version: str, recipe: str) -> None:
    found, wanted = pruned(version, recipe).student_config, published.student_config(version, recipe)
    assert difference(found, wanted) is None
    assert difference(wanted, found) is None
    assert shapes(found) == shapes(wanted)
    assert recipe == "ssd-1b" or found == wanted, "SSD-1B's has 2 layers a stage where one number says so"


@every_published_student
def test_every_weight_comes_from_where_the_published_map_says(version: str, recipe: str) -> None:
    pruning = pruned(version, recipe)
    keys = shapes(pruning.student_config)
    assert {key: pruning.teacher_key(key) for key in keys} == {
        key: published.teacher_key(key, recipe, version) for key in keys
    }


@every_published_student
def test_every_inherited_tensor_has_the_students_shape(version: str, recipe: str) -> None:
    assert_inherits(pruned(version, recipe), TEACHERS[version])


@every_published_student
def test_taps_are_the_published_ones(version: str, recipe: str) -> None:
    assert [(tap.teacher, tap.student) for tap in pruned(version, recipe).taps] == published.taps(recipe, version)


@pytest.mark.parametrize("version", UNETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_removed_is_what_the_published_student_lacks(version: str, recipe: str) -> None:
    assert list(pruned(version, recipe).removed) == FACTS["removed"][recipe]


@every_published_student
def test_removed_and_inherited_tensors_are_all_of_the_teachers(version: str, recipe: str) -> None:
    pruning = pruned(version, recipe)
    inherited = {pruning.teacher_key(key) for key in shapes(pruning.student_config)}
    removed = {
        key for key in shapes(TEACHERS[version]) if key.startswith(tuple(f"{path}." for path in pruning.removed))
    }
    assert inherited.isdisjoint(removed)
    assert inherited | removed == shapes(TEACHERS[version]).keys()


# Self-attentions


def self_attentions(config: dict) -> set[str]:
    """Paths of the modules of a U-Net that attend to themselves, as diffusers builds it."""
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    found = {path for path, module in model.named_modules() if path.endswith(".attn1")}
    return {path for path in found if model.get_submodule(path).to_k.in_features == model.get_submodule(path).query_dim}


def assert_attention_taps(pruning: Pruning, config: dict) -> None:
    """Each self-attention of the student once, with the teacher's that its weights come from."""
    students = [tap.student for tap in pruning.attention_taps]
    assert len(set(students)) == len(students)
    assert set(students) == self_attentions(pruning.student_config)
    for tap in pruning.attention_taps:
        assert pruning.teacher_key(f"{tap.student}.to_k.weight") == f"{tap.teacher}.to_k.weight"
    assert {tap.teacher for tap in pruning.attention_taps} <= self_attentions(config)


@pytest.mark.parametrize(
    ("version", "recipe"),
    [
        (pytest.param if student in {("v1", "base"), ("v1", "tiny"), ("xl", "ssd-1b")} else slow)(*student)
        for student in STUDENTS
    ],
)
def test_every_self_attention_that_stays_has_its_teachers(version: str, recipe: str) -> None:
    assert_attention_taps(pruned(version, recipe), TEACHERS[version])


def test_self_attentions_of_a_published_student() -> None:
    taps = {tap.student: tap.teacher for tap in pruned("v1", "tiny").attention_taps}
    assert len(taps) == 9
    assert taps["up_blocks.0.attentions.1.transformer_blocks.0.attn1"] == (
        "up_blocks.1.attentions.2.transformer_blocks.0.attn1"
    )
    assert [tap.student for tap in pruned("v1", "base").attention_taps][-1] == (
        "mid_block.attentions.0.transformer_blocks.0.attn1"
    )


@pytest.mark.parametrize(
    "layout",
    [
        {"transformer_layers_per_block": 2},
        {"transformer_layers_per_block": [1, 2, 3, 4]},
        {"transformer_layers_per_block": [1, 2, 1, 1], "reverse_transformer_layers_per_block": [3, 1, 2, 1]},
        {"only_cross_attention": [False, True, False, False], "cross_attention_dim": 24},
        {"mid_block_type": "UNetMidBlock2D"},
        {"mid_block_type": None},
        {
            "transformer_layers_per_block": [1, [2, 3], 1, 1],
            "reverse_transformer_layers_per_block": [1, [1, 2, 3], 2, 1],
        },
    ],
)
@pytest.mark.parametrize("recipe", [WHOLE, load_recipe("tiny")])
def test_transformers_of_every_depth_are_followed(recipe: Recipe, layout: dict) -> None:
    config = unet((16, 32, 32, 32), **layout)
    assert_attention_taps(derive(recipe, config), config)


def test_every_kind_of_taps_may_be_chosen() -> None:
    pruning = pruned("v1", "small")
    assert pruning.chosen_taps("layers") == pruning.layer_taps
    assert pruning.chosen_taps("stages") == pruning.taps
    assert pruning.chosen_taps("self_attention") == pruning.attention_taps
    assert pruning.chosen_taps("both") == pruning.taps + pruning.attention_taps


def test_a_student_without_self_attention_has_none_to_match() -> None:
    plain = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "mid_block_type": None}
    pruning = derive(load_recipe("small"), unet((16, 32), **plain))
    with pytest.raises(InputError, match="taps is self_attention, and recipe 'small' leaves no self-attention"):
        pruning.chosen_taps("self_attention")


def test_deriving_leaves_the_teachers_config_as_it_is() -> None:
    before = {key: list(value) if isinstance(value, list) else value for key, value in UNETS["v2"].items()}
    derive(load_recipe("tiny"), UNETS["v2"])
    assert UNETS["v2"] == before


def test_stages_tell_people_which_layers_stay() -> None:
    pruning = pruned("v1", "tiny")
    assert pruning.down == (
        Stage("down_blocks.0", 320, (("RA", True), ("RA", False))),
        Stage("down_blocks.1", 640, (("RA", True), ("RA", False))),
        Stage("down_blocks.2", 1280, (("RA", True), ("RA", False))),
        Stage("down_blocks.3", 1280, (("R", False), ("R", False))),
    )
    assert pruning.up == (
        Stage("up_blocks.3", 320, (("RA", True), ("RA", False), ("RA", True))),
        Stage("up_blocks.2", 640, (("RA", True), ("RA", False), ("RA", True))),
        Stage("up_blocks.1", 1280, (("RA", True), ("RA", False), ("RA", True))),
        Stage("up_blocks.0", 1280, (("R", False), ("R", False), ("R", False))),
    )
    assert pruning.mid == Stage("mid_block", 1280, (("RAR", False),))


@pytest.mark.parametrize("version", TEACHERS)
def test_a_recipe_that_keeps_all_changes_nothing(version: str) -> None:
    pruning = derive(WHOLE, TEACHERS[version])
    assert pruning.student_config == TEACHERS[version]
    assert pruning.removed == ()
    assert all(pruning.teacher_key(key) == key for key in shapes(TEACHERS[version]))


def test_a_teacher_without_middle_block_can_be_pruned() -> None:
    config = UNETS["v1"] | {"mid_block_type": None}
    pruning = derive(load_recipe("base"), config)
    assert pruning.mid is None
    assert "mid_block" not in pruning.removed
    assert_inherits(pruning, config)


def test_a_middle_block_that_the_config_does_not_name_is_there() -> None:
    assert pruned("v1", "base").mid == Stage("mid_block", 1280, (("RAR", True),))


def test_the_path_of_the_teacher_is_not_passed_on() -> None:
    config = derive(load_recipe("base"), UNETS["v1"] | {"_name_or_path": "some/teacher"}).student_config
    assert "_name_or_path" not in config


@every_published_student
def test_values_that_diffusers_took_by_default_are_changed_too(version: str, recipe: str) -> None:
    defaults = ["mid_block_type", "layers_per_block", "up_block_types", "reverse_transformer_layers_per_block"]
    marked = TEACHERS[version] | {"_use_default_values": defaults}
    with torch.device("meta"):
        student = UNet2DConditionModel.from_config(derive(load_recipe(recipe), marked).student_config)
    assert sum(p.numel() for p in student.parameters()) == published.params(version, recipe)


# Other teachers


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("widths", [(16, 32, 32), (16, 32, 32, 32), (16, 32, 64, 64, 64)])
def test_any_number_of_stages(name: str, widths: tuple[int, ...]) -> None:
    config = unet(widths)
    pruning = derive(load_recipe(name), config)
    stages = len(widths) - (name == "tiny")
    assert len(pruning.student_config["block_out_channels"]) == stages
    assert len(pruning.taps) == 2 * stages
    assert_inherits(pruning, config)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("layers", "last_up_layers"),
    [
        (1, (1, 1, 1, 1)),
        (2, (2, 2, 2, 2)),
        (3, (3, 3, 3, 3)),
        ([1, 2, 3, 2], (1, 2, 3, 2)),
        ((2, 2, 2, 2), (2, 2, 2, 2)),
    ],
)
def test_any_number_of_layers(name: str, layers: object, last_up_layers: tuple[int, ...]) -> None:
    config = unet((16, 32, 32, 32), layers_per_block=layers)
    pruning = derive(load_recipe(name), config)
    assert pruning.student_config["layers_per_block"] == 1
    last = {pruning.teacher_key(f"up_blocks.{i}.resnets.1") for i in range(3 if name == "tiny" else 4)}
    assert last == {f"up_blocks.{3 - i}.resnets.{last_up_layers[i]}" for i in range(3 if name == "tiny" else 4)}
    assert_inherits(pruning, config)


def test_nothing_is_removed_from_stages_of_one_layer() -> None:
    assert derive(load_recipe("base"), unet((16, 32), layers_per_block=1)).removed == ()


def test_layers_that_differ_between_stages_give_a_list() -> None:
    config = unet((16, 32, 32))
    recipe = Recipe("mine", down=((0, 1), (0,), (0,)), up=((0, 1, 2), (0, 2), (0, -1)))
    pruning = derive(recipe, config)
    assert pruning.student_config["layers_per_block"] == [2, 1, 1]
    assert pruning.removed == (
        "down_blocks.1.resnets.1",
        "down_blocks.1.attentions.1",
        "down_blocks.2.resnets.1",
        "up_blocks.0.resnets.1",
        "up_blocks.1.resnets.1",
        "up_blocks.1.attentions.1",
    )
    assert_inherits(pruning, config)


def test_a_middle_layer_of_an_up_stage_may_be_chosen() -> None:
    config = unet((16, 32, 32), layers_per_block=3)
    pruning = derive(Recipe("mine", down=(0, 2), up=(0, 2, 3)), config)
    assert pruning.teacher_key("up_blocks.1.attentions.1.proj_in.weight") == "up_blocks.1.attentions.2.proj_in.weight"
    assert pruning.teacher_key("down_blocks.1.resnets.1.conv1.bias") == "down_blocks.1.resnets.2.conv1.bias"
    assert_inherits(pruning, config)


def test_two_stages_may_go() -> None:
    config = unet((16, 32, 32, 32, 32))
    pruning = derive(Recipe("mine", down=(0,), up=(0, -1), mid=False, drop_innermost=2), config)
    assert pruning.teacher_key("up_blocks.0.resnets.1.conv1.weight") == "up_blocks.2.resnets.2.conv1.weight"
    assert {"up_blocks.0.upsamplers", "up_blocks.1.upsamplers", "down_blocks.2.downsamplers"} <= set(pruning.removed)
    assert_inherits(pruning, config)


def test_the_middle_block_may_move_out_where_the_widths_meet() -> None:
    config = unet((16, 32, 32))
    pruning = derive(Recipe("mine", drop_innermost=1), config)
    assert "mid_block" not in pruning.removed
    assert_inherits(pruning, config)


def test_the_cut_stage_without_attention_is_tapped_at_its_last_layer() -> None:
    config = unet(
        (16, 32, 32),
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    )
    taps = derive(load_recipe("tiny"), config).taps
    assert (taps[1].teacher, taps[1].student) == ("down_blocks.1.resnets.1", "down_blocks.1.resnets.0")


def test_lists_with_one_entry_a_stage_are_cut_with_the_stages() -> None:
    per_stage = {
        "attention_head_dim": [2, 4, 8, 8],
        "cross_attention_dim": [16, 16, 24, 24],
        "only_cross_attention": [False, True, False, False],
        "transformer_layers_per_block": [1, 2, 1, 1],
        "reverse_transformer_layers_per_block": [3, 1, 2, 1],
    }
    student = derive(load_recipe("tiny"), unet((16, 32, 32, 32), **per_stage)).student_config
    assert {key: student[key] for key in per_stage} == {
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": [16, 16, 24],
        "only_cross_attention": [False, True, False],
        "transformer_layers_per_block": [1, 2, 1],
        "reverse_transformer_layers_per_block": [1, 2, 1],
    }


def test_deeper_attention_is_inherited_whole() -> None:
    config = unet((16, 32, 32), transformer_layers_per_block=[1, 2, 1])
    pruning = derive(load_recipe("base"), config)
    deep = "attentions.1.transformer_blocks.1.attn1.to_q.weight"
    assert pruning.teacher_key(f"up_blocks.1.{deep}") == "up_blocks.1." + deep.replace("attentions.1", "attentions.2")
    assert_inherits(pruning, config)


@pytest.mark.parametrize(("version", "name"), [("v1", "base"), ("v1", "small"), ("v1", "tiny"), ("xl", "ssd-1b")])
def test_an_inpainting_unet_keeps_its_nine_channels(version: str, name: str) -> None:
    config = TEACHERS[version] | {"in_channels": 9}
    pruning = derive(load_recipe(name), config)
    assert shapes(pruning.student_config)["conv_in.weight"] == (320, 9, 3, 3)
    assert_inherits(pruning, config)


# Depth


def deep(counts: object = (1, 2, 3), **more: object) -> dict:
    """The config of a U-Net with three stages like SDXL's."""
    attends = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": list(counts),  # type: ignore[call-overload]
    }
    return unet((16, 32, 64), **attends | more)


def deep_shape(config: dict) -> tuple[list[list[int]], int, list[list[int]]]:
    """Transformer layers of the attentions of the stock U-Net with this config: down, middle, up as data meets them."""
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)

    def counts(block: Any) -> list[int]:
        return [len(attention.transformer_blocks) for attention in getattr(block, "attentions", ())]

    mid = sum(counts(model.mid_block))
    return [counts(block) for block in model.down_blocks], mid, [counts(block) for block in model.up_blocks]


@pytest.mark.parametrize(
    ("recipe", "left"),
    [
        (Recipe("mine", mid="resnet", down_transformers=(0,)), ([[], [1, 1], [1, 1]], 0, [[3] * 3, [2] * 3, []])),
        (Recipe("mine", up_transformers=((-1,))), ([[], [2, 2], [3, 3]], 3, [[1] * 3, [1] * 3, []])),
        (
            Recipe("mine", mid=(0, 2), down_transformers=("all", (1,), ((1, 2), "all"))),
            ([[], [1, 1], [2, 3]], 2, [[3] * 3, [2] * 3, []]),
        ),
        (
            Recipe("mine", down=(0,), up=(0, -1), mid=False, up_transformers=("all", "all", ((0, 2), (1,)))),
            ([[], [2], [3]], 0, [[2, 1], [2, 2], []]),
        ),
        (
            Recipe("mine", mid=(1,), down_transformers=("all", "all", (0,)), up_transformers=("all", "all", (2,))),
            ([[], [2, 2], [1, 1]], 1, [[1] * 3, [2] * 3, []]),
        ),
    ],
)
def test_any_transformer_layers_may_stay(recipe: Recipe, left: tuple) -> None:
    config = deep()
    pruning = derive(recipe, config)
    assert deep_shape(pruning.student_config) == left
    assert_inherits(pruning, config)
    assert_attention_taps(pruning, config)
    assert derive(WHOLE, pruning.student_config).student_config == pruning.student_config


@pytest.mark.parametrize("seed", range(6))
def test_random_recipes_of_random_shapes_inherit(seed: int) -> None:
    rng = random.Random(seed)
    layers, counts = rng.choice([1, 2, [1, 2, 3]]), [rng.randint(1, 4) for _ in range(3)]
    widths = tuple(rng.choice([(16, 32, 64), (16, 16, 32), (32, 32, 32)]))
    config = deep(counts, block_out_channels=list(widths), layers_per_block=layers)

    def some(depth: int) -> tuple[int, ...]:
        return tuple(sorted(rng.sample(range(depth), rng.randint(1, depth))))

    alike = rng.random() < 0.5  # the middle is as deep as the innermost stage's first attention
    inner = some(counts[2])
    recipe = Recipe(
        "mine",
        down=(0,),
        up=(0, -1),
        mid=inner if alike else rng.choice(["resnet", False]),
        down_transformers=("all", some(counts[1]), inner),
        up_transformers=("all", (some(counts[1]), some(counts[1])), (some(counts[2]), some(counts[2]))),
    )
    pruning = derive(recipe, config)
    assert_inherits(pruning, config)
    assert_attention_taps(pruning, config)
    kept = {pruning.teacher_key(key) for key in shapes(pruning.student_config)}
    gone = {key for key in shapes(config) if key.startswith(tuple(f"{path}." for path in pruning.removed))}
    assert kept | gone == shapes(config).keys()
    assert kept.isdisjoint(gone)


def test_the_transformer_layers_that_stay_are_those_that_are_named() -> None:
    pruning = derive(Recipe("mine", down=(0,), up=(0, -1), mid=False, up_transformers=("all", "all", (0, 2))), deep())
    inside = "transformer_blocks.1.attn1.to_q.weight"
    assert pruning.teacher_key(f"up_blocks.0.attentions.1.{inside}") == (
        "up_blocks.0.attentions.2.transformer_blocks.2.attn1.to_q.weight"
    )
    assert pruning.student_key("up_blocks.0.attentions.2.transformer_blocks.1.norm1.weight") is None
    assert pruning.student_key("up_blocks.0.attentions.2.proj_in.weight") == "up_blocks.0.attentions.1.proj_in.weight"
    assert "up_blocks.0.attentions.0.transformer_blocks.1" in pruning.removed


def test_a_middle_block_keeps_its_first_resnet_alone() -> None:
    pruning = derive(Recipe("mine", mid="resnet"), deep())
    assert pruning.removed == ("mid_block.attentions.0", "mid_block.resnets.1")
    assert pruning.student_key("mid_block.resnets.1.conv1.weight") is None
    assert pruning.mid == Stage("mid_block", 64, (("R", True), ("A3R", False)))
    assert derive(Recipe("mine", mid="resnet"), pruning.student_config).removed == ()


def test_a_student_of_a_student_keeps_what_its_teacher_had_left() -> None:
    """SSD-1B's attentions differ within a stage, and those of the layers that stay keep their depths."""
    teacher = derive(load_recipe("ssd-1b"), XL).student_config
    pruning = derive(load_recipe("base"), teacher)
    assert deep_shape(pruning.student_config) == ([[], [2], [4]], 0, [[4, 10], [2, 1], []])
    assert_inherits(pruning, teacher)


def test_depth_may_be_written_in_several_ways() -> None:
    one, other = {"transformer_layers_per_block": 2}, {"transformer_layers_per_block": [9, [2, 2], [2, 2]]}
    other["reverse_transformer_layers_per_block"] = [2, [2, 2, 2], 9]
    assert difference(deep() | one, deep() | other) is None
    assert difference(deep(), deep() | one) == ("transformer_layers_per_block", [1, 2, 3], 2)
    without = {key: value for key, value in UNETS["v1"].items() if key != "down_block_types"}
    assert difference(UNETS["v1"], without) is None, "old configs leave out what was always so"


def test_depth_is_drawn_where_there_is_any() -> None:
    pruning = pruned("xl", "ssd-1b")
    assert pruning.down[2] == Stage("down_blocks.2", 1280, (("RA4/10", True), ("RA4/10", True)))
    assert pruning.up[1] == Stage("up_blocks.1", 640, (("RA2", True), ("RA1/2", True), ("RA1/2", True)))


def test_layers_of_a_published_student_are_matched_one_by_one() -> None:
    """SSD-1B's 26 taps: ten on the way down, the middle as one, and fifteen on the way up."""
    taps = [(tap.teacher, tap.student) for tap in pruned("xl", "ssd-1b").layer_taps]
    assert len(taps) == 26
    assert all(teacher == student for teacher, student in taps)
    paths = [path.split(".")[0] for path, _ in taps]
    assert [paths.count(side) for side in ("down_blocks", "mid_block", "up_blocks")] == [10, 1, 15]
    assert ("up_blocks.1.attentions.2", "up_blocks.1.attentions.1") in [
        (tap.teacher, tap.student) for tap in pruned("v1", "small").layer_taps
    ]


def test_a_middle_block_that_works_on_larger_latents_is_not_matched() -> None:
    pruning = derive(Recipe("mine", drop_innermost=1), unet((16, 32, 32)))
    assert not any("mid_block" in tap.teacher for tap in (*pruning.layer_taps, *pruning.attention_taps))


# What is refused


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe("mine", down=(2,)), "it keeps layer 2 of down_blocks.0, which has 2 layers"),
        (Recipe("mine", down=(-3,)), "it keeps layer -3 of down_blocks.0, which has 2 layers"),
        (Recipe("mine", down=(0,), up=(0, 3)), "it keeps layer 3 of up_blocks.3, which has 3 layers"),
        (
            Recipe("mine", down=(1, -1)),
            "it keeps layers [1, -1] of down_blocks.0, which has 2; name each once, in order",
        ),
        (Recipe("mine", down=(1, 0)), "it keeps layers [1, 0] of down_blocks.0, which has 2; name each once, in order"),
        (Recipe("mine", down=(0,)), "up_blocks.3 keeps 3 layers and down_blocks.0 keeps 1; an up stage has one more"),
        (Recipe("mine", up=(0, -1)), "up_blocks.3 keeps 2 layers and down_blocks.0 keeps 2; an up stage has one more"),
        (Recipe("mine", drop_innermost=4), "drop_innermost is 4, and the teacher has 4 stages"),
        (Recipe("mine", drop_innermost=-1), "drop_innermost is -1, and the teacher has 4 stages"),
        (Recipe("mine", down=((0, 1),) * 3), "down lists 3 stages, and 4 remain of the teacher's"),
        (Recipe("mine", up=((0, 1, 2),) * 4, drop_innermost=1), "up lists 4 stages, and 3 remain of the teacher's"),
        (
            Recipe("mine", drop_innermost=2),
            "layer 0 of up_blocks.2 takes 1920 channels, and in its place ",
        ),
        (Recipe("mine", down=(1,), up=(0, -1)), "layer 1 of down_blocks.1 takes 640 channels, and in its place"),
        (Recipe("mine", down=(0,), up=(0, 1)), "layer 1 of up_blocks.2 takes 1280 channels, and in its place"),
        (Recipe("mine", down=(0,), up=(1, 2)), "layer 1 of up_blocks.3 takes 640 channels, and in its place"),
    ],
)
def test_a_recipe_that_sd_v1_cannot_satisfy(recipe: Recipe, reason: str) -> None:
    with pytest.raises(InputError) as refused:
        derive(recipe, UNETS["v1"])
    assert reason in str(refused.value)
    assert str(refused.value).startswith("recipe 'mine' does not fit this teacher: ")


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (
            load_recipe("tiny"),
            "'tiny' does not fit this teacher: layer 0 of up_blocks.1 takes 1920 channels, and in its place 1280 would",
        ),
        (
            Recipe("mine", down_transformers=("all", "all", (10,))),
            "it keeps transformer layer 10 of down_blocks.2.attentions.0, which has 10 transformer layers",
        ),
        (
            Recipe("mine", up_transformers=("all", (1, 0), "all")),
            "it keeps transformer layers [1, 0] of up_blocks.1.attentions.0, which has 2; name each once, in order",
        ),
        (
            Recipe("mine", up_transformers=("all", (0,))),
            "up_transformers lists 2 stages, and 3 remain of the teacher's",
        ),
        (
            Recipe("mine", up_transformers=("all", "all", ((0,), (0,)))),
            "up_transformers lists 2 attentions of up_blocks.0, and 3 of its layers stay",
        ),
        (
            Recipe("mine", down_transformers=((0,), "all", "all")),
            "down_transformers names transformer layers of down_blocks.0, which has no attention; write all",
        ),
        (
            Recipe("mine", mid=(0, 1)),
            "the middle block has 2 transformer layers, and diffusers gives it the 10 of the first attention of "
            "down_blocks.2; keep as many in both, or mid: resnet",
        ),
        (
            Recipe("mine", down_transformers=("all", "all", (0, 1))),
            "the middle block has 10 transformer layers, and diffusers gives it the 2 of the first attention of",
        ),
    ],
)
def test_a_recipe_that_sdxl_cannot_satisfy(recipe: Recipe, reason: str) -> None:
    with pytest.raises(InputError) as refused:
        derive(recipe, XL)
    assert reason in str(refused.value)


@pytest.mark.parametrize("name", ["ssd-1b", "vega", "koala-1b", "koala-700m", "comfy"])
def test_recipes_of_sdxl_fit_no_other_teacher(name: str) -> None:
    with pytest.raises(InputError, match=rf"'{name}' does not fit this teacher: .*lists 3 stages, and 4 remain"):
        derive(load_recipe(name), UNETS["v1"])


def test_a_middle_block_without_attention_has_no_transformer_layers() -> None:
    config = UNETS["v1"] | {"mid_block_type": "UNetMidBlock2D"}
    with pytest.raises(InputError, match=r"mid is \[0\], and the teacher's middle block has no attention; write true"):
        derive(Recipe("mine", mid=(0,)), config)


def test_dropping_a_stage_needs_widths_that_meet() -> None:
    with pytest.raises(
        InputError, match=r"'tiny' does not fit .* layer 0 of up_blocks\.1 takes 224 channels, .* 192 would"
    ):
        derive(load_recipe("tiny"), unet((32, 64, 96, 128)))


def test_the_middle_block_needs_its_width() -> None:
    config = unet((16, 32), layers_per_block=1)
    with pytest.raises(InputError, match="does not fit this teacher: "):
        derive(Recipe("mine", drop_innermost=1), config)


@pytest.mark.parametrize("per_stage", [{"attention_head_dim": [2, 4, 8]}, {"transformer_layers_per_block": [1, 1, 2]}])
def test_the_middle_block_needs_its_attention(per_stage: dict) -> None:
    with pytest.raises(InputError, match=r"does not fit this teacher: .*middle block"):
        derive(Recipe("mine", drop_innermost=1), unet((16, 32, 32), **per_stage))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"addition_embed_type": "text_image"},
            r"it takes added conditions of another kind \(addition_embed_type is text_image\)",
        ),
        (
            {"addition_embed_type": "text_time"},
            "its addition_time_embed_dim is None and its projection_class_embeddings_input_dim None, which leaves no",
        ),
        (REFINER, r"it is shaped like SDXL's refiner, which takes five numbers about the picture, an aesthetic score"),
        ({"transformer_layers_per_block": [1, 2]}, "its transformer_layers_per_block lists 2 stages, and it has 4"),
        ({"transformer_layers_per_block": 0}, "it has attentions without a transformer layer"),
        ({"transformer_layers_per_block": "2"}, "its transformer_layers_per_block has '2' for a stage of 2 layers"),
        (
            {"transformer_layers_per_block": [1, [1], 1, 1], "reverse_transformer_layers_per_block": [1, 1, 1, 1]},
            r"its transformer_layers_per_block has \[1\] for a stage of 2 layers",
        ),
        (
            {"transformer_layers_per_block": [1, [1, 2], 1, 1]},
            r"its transformer_layers_per_block is \[1, \[1, 2\], 1, 1\], and it has no reverse_transformer",
        ),
        ({"reverse_transformer_layers_per_block": 2}, "its reverse_transformer_layers_per_block lists 1 stages, and"),
        ({"layers_per_block": 0}, "its layers_per_block is 0; each stage has one layer or more"),
        ({"_class_name": "UNetSpatioTemporalConditionModel"}, "it is a UNetSpatioTemporalConditionModel"),
        (
            {"down_block_types": ["AttnDownBlock2D"] + ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"]},
            "it has blocks of type AttnDownBlock2D",
        ),
        (
            {"up_block_types": ["UpBlock2D"] * 3 + ["SimpleCrossAttnUpBlock2D"]},
            "it has blocks of type SimpleCrossAttnUpBlock2D",
        ),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "it has blocks of type UNetMidBlock2DSimpleCrossAttn"),
        ({"block_out_channels": [320, 640]}, "does not list as many widths and up stages as down stages"),
        ({"up_block_types": ["UpBlock2D"]}, "does not list as many widths and up stages as down stages"),
        ({"down_block_types": None}, "its down_block_types is None, not a list"),
        ({"block_out_channels": 320}, "its block_out_channels is 320, not a list"),
        ({"num_class_embeds": 10}, r"it takes class labels \(num_class_embeds is 10\)"),
        ({"encoder_hid_dim": 64}, r"it takes embeddings of another kind \(encoder_hid_dim is 64\)"),
    ],
)
def test_a_unet_of_another_family(changes: dict, reason: str) -> None:
    with pytest.raises(InputError, match=f"this U-Net cannot be pruned: .*{reason}.*; give a model shaped like Stable"):
        derive(load_recipe("base"), UNETS["v1"] | changes)


def test_a_list_of_layers_that_is_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="this U-Net cannot be pruned"):
        derive(load_recipe("base"), UNETS["v1"] | {"layers_per_block": [2, 2]})


def test_what_people_read_is_not_part_of_what_a_recipe_is() -> None:
    assert replace(WHOLE, summary="Other words.") == WHOLE
