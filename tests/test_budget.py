"""Recipes under a budget: exact costs, least loss, and what is impossible."""

import random
import re
from functools import cache

import pytest

from bksdm.common.errors import InputError
from bksdm.families import derive, recipe_without, units
from bksdm.families.recipe import load_recipe
from bksdm.families.units import Names
from bksdm.pruning.budget import Budget, What
from bksdm.pruning.cost import UNetCost, parts_cost, unet_cost
from bksdm.pruning.describe import describe_config
from published import RECIPES, UNETS, XL
from removable import all_sets
from tiny_models import V1_UNET, V2_UNET, XL_UNET

FULL = {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}
FULL |= {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
CONFIGS = {
    "v2": V2_UNET | FULL,
    "uneven": V1_UNET | FULL | {"layers_per_block": (2, 3, 1, 1)},
    "xl": XL_UNET | {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 2)},
}
every_budget = pytest.mark.parametrize(("name", "what"), [("v2", "params"), ("uneven", "gmacs"), ("xl", "gmacs")])


@cache
def budget(name: str, what: What) -> Budget:
    return Budget.of(CONFIGS[name], what, tokens=8)


@cache
def reckoned(name: str, what: What) -> dict[Names, int]:
    """What is left to pay for without each set of units."""
    found = budget(name, what)
    saved = {kind.always: saves for kind, saves in found.frames}
    costs = {}
    for names in all_sets(CONFIGS[name]):
        always = max((kind for kind in saved if kind <= names), key=len)
        costs[names] = found.whole - saved[always] - sum(found.saves[unit] for unit in names - always)
    return costs


def count(cost: UNetCost, what: str) -> int:
    return cost.params if what == "params" else cost.macs_modules


def random_importance(config: dict, seed: int) -> dict[str, float]:
    rng = random.Random(seed)
    return {unit.name: rng.choice([-0.1, 0.0, 1.0]) + rng.random() for unit in units(config)}


@every_budget
def test_no_recipe_within_the_budget_loses_less(name: str, what: What) -> None:
    found, costs = budget(name, what), reckoned(name, what)
    for seed, share in enumerate([0.5, 0.65, 0.8, 0.95]):
        importance = random_importance(CONFIGS[name], seed)
        able = [names for names, cost in costs.items() if cost <= share * found.whole]
        if not able:
            with pytest.raises(InputError, match=f"^{what} is {share}, and the smallest recipe keeps"):
                found.choose(share, importance, "mine")
            continue
        choice = found.choose(share, importance, "mine")
        assert choice.share <= share
        assert choice.loses == pytest.approx(min(sum(importance[unit] for unit in names) for names in able))
        assert choice.loses == pytest.approx(sum(importance[unit] for unit in choice.removed))
        assert choice.recipe == recipe_without(CONFIGS[name], choice.removed, "mine")


@every_budget
def test_what_a_recipe_is_reckoned_to_cost_is_what_it_costs(name: str, what: What) -> None:
    costs = reckoned(name, what)
    for names in list(costs)[2 :: len(costs) // 3]:
        assert_costs(name, what, names)


def test_removing_more_may_cost_more() -> None:
    """Without the innermost stage, the middle block works on larger latents."""
    found = budget("uneven", "gmacs")
    assert found.whole == unet_cost(CONFIGS["uneven"], tokens=8).macs_modules
    assert min(saved for _, saved in found.frames) < 0


@pytest.mark.slow
@every_budget
def test_what_many_recipes_are_reckoned_to_cost_is_what_they_cost(name: str, what: What) -> None:
    for names in list(reckoned(name, what))[::5]:
        assert_costs(name, what, names)


def assert_costs(name: str, what: What, names: Names) -> None:
    left = derive(recipe_without(CONFIGS[name], names, "mine"), CONFIGS[name]).student_config
    assert reckoned(name, what)[names] == count(unet_cost(left, tokens=8), what)


@pytest.mark.parametrize("recipe", RECIPES)
def test_at_a_published_recipes_share_what_is_chosen_is_no_larger_and_loses_no_more(recipe: str) -> None:
    config, found = CONFIGS["v2"], budget("v2", "params")
    wanted = derive(load_recipe(recipe), config).key_map
    published = next(
        names for names in all_sets(config) if derive(recipe_without(config, names, recipe), config).key_map == wanted
    )
    params = reckoned("v2", "params")[published]
    for seed in range(5):
        importance = random_importance(config, seed)
        choice = found.choose(params / found.whole, importance, "mine")
        assert choice.cost <= params
        assert choice.loses <= sum(importance[unit] for unit in published) + 1e-9


@pytest.mark.slow
def test_the_smallest_recipe_of_stable_diffusion_is_tiny() -> None:
    found = Budget.of(UNETS["v1"], "params")
    tiny = describe_config(UNETS["v1"], load_recipe("tiny"))
    assert found.whole == tiny.teacher.params
    assert found.smallest == pytest.approx(tiny.student.params / tiny.teacher.params, rel=1e-12)
    with pytest.raises(InputError, match=r"^params is 0.37, and the smallest recipe keeps 0.3763 of this U-Net's para"):
        found.check(0.37)


@pytest.mark.slow
def test_a_recipe_of_sdxl_is_chosen_among_seventy_transformer_layers() -> None:
    found = Budget.of(XL, "params")
    choice = found.choose(0.4, random_importance(XL, 0), "mine")
    assert choice.share <= 0.4
    assert sum("transformer" in name for name in choice.removed) > 5
    assert choice.cost == unet_cost(derive(choice.recipe, XL).student_config).params


@every_budget
def test_the_smallest_share_that_is_named_is_possible_and_nothing_below_is(name: str, what: What) -> None:
    found = budget(name, what)
    assert found.smallest == pytest.approx(min(reckoned(name, what).values()) / found.whole)
    importance = random_importance(CONFIGS[name], 0)
    assert found.choose(found.smallest, importance, "mine").cost == min(reckoned(name, what).values())
    with pytest.raises(InputError, match="the smallest recipe keeps") as refused:
        found.check(0.9 * found.smallest)
    named = re.search(r"keeps (0\.\d+) of this U-Net's (parameters|multiply-accumulates); give", str(refused.value))
    assert named
    found.check(float(named[1]))


@pytest.mark.parametrize("share", [-0.5, 0, 1, 1.5, float("nan")])
def test_a_budget_is_a_share(share: float) -> None:
    with pytest.raises(InputError, match=f"^params is {share}; .* between 0 and 1"):
        budget("v2", "params").check(share)


def test_the_parts_of_a_unet_cost_what_the_whole_costs() -> None:
    parts = {"down": ["down_blocks"], "mid": ["mid_block"], "up": ["up_blocks"]}
    rest = ["conv_in", "time_embedding", "conv_norm_out", "conv_out"]
    found = parts_cost(CONFIGS["v2"], parts | {"rest": rest}, tokens=8)
    whole = unet_cost(CONFIGS["v2"], tokens=8)
    for figure in ("params", "macs_modules", "macs_attention"):
        assert sum(getattr(cost, figure) for cost in found.values()) == getattr(whole, figure)


def test_a_part_is_named_by_whole_words_of_its_path() -> None:
    parts = {"whole": ["down_blocks.0.resnets.1"], "cut short": ["down_blocks.0.resnets.1".removesuffix("s.1")]}
    found = parts_cost(CONFIGS["v2"], parts, tokens=8)
    assert found["whole"].params > found["cut short"].params == 0
