"""Recipes: those that ship, recipes from files, and what is refused with which words."""

from pathlib import Path

import pytest

from bksdm.common.errors import InputError
from bksdm.families.recipe import Pruning, Recipe, load_recipe, published_recipes

PUBLISHED = {
    "base": Recipe("base", down=(0,), up=(0, -1)),
    "small": Recipe("small", down=(0,), up=(0, -1), mid=False),
    "tiny": Recipe("tiny", down=(0,), up=(0, -1), mid=False, drop_innermost=1),
}
SIX, FIVE, FOUR = tuple(range(6)), tuple(range(5)), tuple(range(4))
OF_SDXL = {
    "comfy": Recipe("comfy", mid="resnet", up_transformers=("all", (0,), FOUR)),
    "koala-1b": Recipe(
        "koala-1b",
        down=(0,),
        up=(0, -1),
        mid=SIX,
        down_transformers=("all", "all", SIX),
        up_transformers=("all", "all", SIX),
    ),
    "koala-700m": Recipe(
        "koala-700m",
        down=(0,),
        up=(0, -1),
        mid=False,
        down_transformers=("all", "all", FIVE),
        up_transformers=("all", "all", FIVE),
    ),
    "ssd-1b": Recipe(
        "ssd-1b",
        mid="resnet",
        down_transformers=("all", "all", FOUR),
        up_transformers=("all", ("all", (0,), (0,)), (FOUR, FOUR, "all")),
    ),
    "vega": Recipe(
        "vega", mid="resnet", down_transformers=("all", (0,), (0, 1)), up_transformers=("all", (0,), (0, 1))
    ),
}

OF_TRANSFORMERS = {
    "flux-lite": Recipe("flux-lite", blocks=(("transformer_blocks", 8), ("single_transformer_blocks", "all"))),
    "flux-mini": Recipe("flux-mini", blocks=(("transformer_blocks", 5), ("single_transformer_blocks", 10))),
    "half": Recipe("half", blocks="1/2"),
    "two-thirds": Recipe("two-thirds", blocks="2/3"),
}


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_the_recipes_that_ship() -> None:
    assert published_recipes() == sorted([*PUBLISHED, *OF_SDXL, *OF_TRANSFORMERS])


@pytest.mark.parametrize("name", [*OF_SDXL, *OF_TRANSFORMERS])
def test_a_recipe_of_other_families_loads_by_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe == (OF_SDXL | OF_TRANSFORMERS)[name]
    assert recipe.summary
    assert Recipe.from_dict(recipe.to_dict(), name) == recipe


def test_a_recipe_that_says_nothing_of_depth_is_written_as_ever() -> None:
    assert list(PUBLISHED["small"].to_dict()) == ["name", "summary", "down", "up", "mid", "drop_innermost"]


def test_depth_may_differ_between_stages_and_between_attentions(tmp_path: Path) -> None:
    text = "name: mine\nmid: [0, 2]\ndown_transformers: [0, -1]\nup_transformers: [all, [0], [all, [1, 2], [0]]]\n"
    assert load_recipe(written(tmp_path, text)) == Recipe(
        "mine", mid=(0, 2), down_transformers=(0, -1), up_transformers=("all", (0,), ("all", (1, 2), (0,)))
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_loads_by_name_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe == PUBLISHED[name]
    assert recipe.summary.endswith(f"(BK-SDM-{name.capitalize()}).")


@pytest.mark.parametrize("form", [str, Path])
def test_a_recipe_loads_from_a_file(tmp_path: Path, form: type) -> None:
    path = written(tmp_path, "name: mine\nsummary: My own.\ndown: [0, 1]\nup: all\nmid: false\ndrop_innermost: 1\n")
    recipe = load_recipe(form(path))
    assert recipe == Recipe("mine", down=(0, 1), up="all", mid=False, drop_innermost=1)
    assert recipe.summary == "My own."


def test_what_a_file_leaves_out_stays_in_the_teacher(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "name: whole\n")) == Recipe("whole", "all", "all", True, 0)


def test_layers_may_differ_between_stages(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "name: mine\ndown: [[0], [0, 1]]\nup: [[0, -1], [0, 1, 2]]\n"))
    assert recipe.down == ((0,), (0, 1))
    assert [recipe.down_layers(stage, 2) for stage in (0, 1)] == [(0,), (0, 1)]
    assert [recipe.up_layers(stage, 3) for stage in (0, 1)] == [(0, -1), (0, 1, 2)]


def test_layers_of_a_stage() -> None:
    assert Recipe("mine", down="all").down_layers(2, 3) == (0, 1, 2)
    assert Recipe("mine", down=(0, -1)).down_layers(2, 3) == (0, -1)


@pytest.mark.parametrize(
    "recipe",
    [*PUBLISHED.values(), *OF_SDXL.values(), Recipe("mine"), Recipe("mine", down=((0,), (0, 1)), summary="Differs.")],
)
def test_plain_values_make_the_same_recipe_again(recipe: Recipe) -> None:
    again = Recipe.from_dict(recipe.to_dict(), "there")
    assert again == recipe
    assert again.summary == recipe.summary


@pytest.mark.parametrize("name", ["huge", "Base", "no/such/file.yaml", ""])
def test_an_unknown_recipe_is_refused_with_the_known_names(name: str) -> None:
    with pytest.raises(InputError, match=f"unknown recipe '{name}'; give .*base, .*small, .*tiny, .*or the path"):
        load_recipe(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [mine", "is not YAML"),
        ("name: mine\n\tdown: [0]\n", "is not YAML"),
        ("- 0\n- 1\n", "is not a mapping; write lines such as"),
        ("", "is not a mapping"),
        ("just words", "is not a mapping"),
        ("down: [0]\n", "has no name; add a line 'name: ...'"),
        (
            "name: mine\nupp: [0]\n",
            "has the unknown key 'upp'; known are blocks, down, down_transformers, drop_innermost, mid, ",
        ),
        ("name: mine\n7: [0]\n", "has the unknown key '7'"),
        ("name: 7\n", "name is 7; write a text"),
        ("name: mine\nsummary: [x]\n", "summary is ['x']; write a text"),
        ("name: mine\nmid: 1\n", "mid is 1; write true or false"),
        ("name: mine\ndrop_innermost: one\n", "drop_innermost is 'one'; write a whole number"),
        ("name: mine\ndrop_innermost: true\n", "drop_innermost is True; write a whole number"),
        ("name: mine\ndrop_innermost: 0.5\n", "drop_innermost is 0.5; write a whole number"),
        ("name: mine\ndown: 0\n", "down is 0; write all, or the layers that stay, such as [0, -1]"),
        ("name: mine\ndown: []\n", "down is []; write all"),
        ("name: mine\nup: [0, true]\n", "up is [0, True]; write all"),
        ("name: mine\nup: [0, [1]]\n", "up is [0, [1]]; write all"),
        ("name: mine\nup: [[0], []]\n", "up is [[0], []]; write all"),
        ("name: mine\nup: none\n", "up is 'none'; write all"),
        ("name: mine\nup: [0.5]\n", "up is [0.5]; write all"),
        ("name: mine\nup: [all, [0]]\n", "up is ['all', [0]]; write all"),
        ("name: mine\nmid: all\n", "mid is 'all'; write true or false, resnet, or the transformer layers that stay"),
        ("name: mine\nmid: []\n", "mid is []; write true or false, resnet, or the transformer layers that stay"),
        ("name: mine\nmid: [[0]]\n", "mid is [[0]]; write true or false, resnet, or"),
        (
            "name: mine\ndown_transformers: 4\n",
            "down_transformers is 4; write all, or the transformer layers that stay, such as [0, 1], or such an entry "
            "for every stage",
        ),
        ("name: mine\nup_transformers: [all, [[0], 1]]\n", "up_transformers is ['all', [[0], 1]]; write all"),
        ("name: mine\nup_transformers: [all, [[[0]]]]\n", "up_transformers is ['all', [[[0]]]]; write all"),
        ("name: mine\nup_transformers: [all, []]\n", "up_transformers is ['all', []]; write all"),
        ("name: mine\nup_transformers: [0, all]\n", "up_transformers is [0, 'all']; write all"),
        ("name: mine\nblocks: 3/2\n", "blocks is '3/2'; write all, a number or a share such as 1/2"),
        ("name: mine\nblocks: 1/0\n", "blocks is '1/0'; write all"),
        ("name: mine\nblocks: 0.5\n", "blocks is 0.5; write all"),
        ("name: mine\nblocks: []\n", "blocks is []; write all"),
        ("name: mine\nblocks: {}\n", "blocks is {}; write all"),
        ("name: mine\nblocks: true\n", "blocks is True; write all"),
        ("name: mine\nblocks: {layers: [0, x]}\n", "blocks is {'layers': [0, 'x']}; write all"),
        ("name: mine\nblocks: 1/2\nmid: false\n", "says blocks, of a transformer, and mid, of a U-Net"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_mend(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as refused:
        load_recipe(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(InputError, match=r"mine\.yaml is not text; give a YAML file"):
        load_recipe(path)


def test_text_with_a_control_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not YAML"):
        load_recipe(written(tmp_path, "name: a\x00b\n"))


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown recipe"):
        load_recipe(tmp_path)


def test_the_longest_prefix_decides_where_a_weight_comes_from() -> None:
    key_map = {"up_blocks.0": "up_blocks.1", "up_blocks.0.resnets.1": "up_blocks.1.resnets.2"}
    pruning = Pruning(Recipe("mine"), {}, key_map, (), (), (), (), None)
    assert pruning.teacher_key("up_blocks.0.resnets.1.conv1.weight") == "up_blocks.1.resnets.2.conv1.weight"
    assert pruning.teacher_key("up_blocks.0.resnets.10.conv1.weight") == "up_blocks.1.resnets.10.conv1.weight"
    assert pruning.teacher_key("up_blocks.00.conv.bias") == "up_blocks.00.conv.bias"
