"""Parameters and multiply-accumulates: the published counts, and an independent counter's."""

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.utils.flop_counter import FlopCounterMode

import published
from bksdm.common.errors import InputError
from bksdm.pruning.cost import UNetCost, unet_cost
from published import FACTS, RECIPES, STUDENTS, TEACHERS, UNETS
from tiny_models import XL_UNET, added_conditions

TOKENS = 77
MODULES = {"convolution", "addmm", "mm"}
every_unet = pytest.mark.parametrize(
    ("version", "recipe"), [(version, recipe) for version in UNETS for recipe in ("whole", *RECIPES)]
)
every_unet_of_both_families = pytest.mark.parametrize(
    ("version", "recipe"), [*((version, "whole") for version in TEACHERS), *STUDENTS]
)


def config(version: str, recipe: str) -> dict:
    return TEACHERS[version] if recipe == "whole" else published.student_config(version, recipe)


@cache
def cost(version: str, recipe: str) -> UNetCost:
    return unet_cost(config(version, recipe))


def counted_macs(unet_config: dict, processor: object, latent_size: int = 64) -> dict[str, int]:
    """Half the floating-point operations of a forward pass by kind of operation, as PyTorch's own counter sees them."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = UNet2DConditionModel.from_config(unet_config)
        unet.set_attn_processor(processor)
        context = torch.empty(1, TOKENS, unet_config["cross_attention_dim"])
        latents, added = torch.empty(1, 4, latent_size, latent_size), added_conditions(unet.config, 1)
        unet(latents, torch.empty(1, dtype=torch.long), context, added_cond_kwargs=added)
    return {str(op).removeprefix("aten."): flops // 2 for op, flops in counter.get_flop_counts()["Global"].items()}


@every_unet_of_both_families
def test_parameters_are_the_published_ones(version: str, recipe: str) -> None:
    assert cost(version, recipe).params == published.params(version, recipe)


@every_unet
def test_macs_of_everything_are_the_published_ones(version: str, recipe: str) -> None:
    assert cost(version, recipe).gmacs_all == pytest.approx(
        FACTS["unets"][f"{version}-{recipe}"]["gmacs_all"], abs=0.05
    )


@every_unet
def test_macs_of_modules_are_the_published_ones(version: str, recipe: str) -> None:
    wanted = FACTS["unets"][f"{version}-{recipe}"]["gmacs_modules"]
    # The published counter leaves out up to 0.12 G that an exact count of convolutions and linear layers has.
    assert cost(version, recipe).gmacs_modules == pytest.approx(wanted, abs=0.12)


def test_macs_of_sdxl_are_the_known_ones() -> None:
    wanted, found = published.XL_FACTS["gmacs"], cost("xl", "whole")
    assert (found.gmacs_modules, found.gmacs_all) == (
        pytest.approx(wanted["modules"], abs=5),
        pytest.approx(wanted["all"], abs=5),
    )


@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0()], ids=["plain", "fused"])
@pytest.mark.parametrize(("version", "recipe"), [("v1", "whole"), ("v2", "tiny"), ("xl", "vega")])
def test_an_independent_counter_agrees(version: str, recipe: str, processor: object) -> None:
    counted = counted_macs(config(version, recipe), processor)
    modules = sum(macs for op, macs in counted.items() if op in MODULES)
    found = unet_cost(config(version, recipe), latent_size=64)
    assert found.macs_modules == modules
    assert found.macs_modules + found.macs_attention == sum(counted.values())


def test_the_config_says_the_size_of_the_latents() -> None:
    config = UNETS["v1"] | {"block_out_channels": [32, 32, 32, 32], "sample_size": 16}
    assert unet_cost(config).latent_size == (16, 16)
    assert unet_cost(config) == unet_cost(config, latent_size=16)


def test_more_latents_cost_more_and_parameters_stay() -> None:
    config = UNETS["v1"] | {"block_out_channels": [32, 32, 32, 32]}
    small, large = unet_cost(config, latent_size=32), unet_cost(config, latent_size=64)
    assert large.params == small.params
    assert large.latent_size == (64, 64)
    assert 3 * small.macs_modules < large.macs_modules < 4 * small.macs_modules
    assert 4 * small.macs_attention < large.macs_attention < 16 * small.macs_attention


def test_latents_need_not_be_square() -> None:
    config = UNETS["v1"] | {"block_out_channels": [32, 32, 32, 32]}
    wide, tall = unet_cost(config | {"sample_size": [16, 64]}), unet_cost(config, (64, 16))
    assert (wide.macs_modules, wide.macs_attention) == (tall.macs_modules, tall.macs_attention)
    assert wide.macs_attention == unet_cost(config, 32).macs_attention, "as many latents cost as much"


def test_a_longer_text_costs_more() -> None:
    config = UNETS["v1"] | {"block_out_channels": [32, 32, 32, 32], "sample_size": 16}
    assert unet_cost(config, tokens=154).macs_attention > unet_cost(config, tokens=77).macs_attention


def test_gmacs_are_macs_in_thousand_millions() -> None:
    cost = UNetCost(params=1, macs_modules=2_000_000_000, macs_attention=500_000_000, latent_size=(8, 8))
    assert (cost.gmacs_modules, cost.gmacs_all) == (2.0, 2.5)


def test_deeper_attention_and_added_conditions_cost_what_they_have() -> None:
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(XL_UNET)
    assert unet_cost(XL_UNET).params == sum(parameter.numel() for parameter in network.parameters())
    shallow = unet_cost(XL_UNET | {"transformer_layers_per_block": [1, 2, 9]})
    one = network.mid_block.attentions[0].transformer_blocks[0]
    assert unet_cost(XL_UNET).params - shallow.params == 6 * sum(parameter.numel() for parameter in one.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": None}, "sample_size is None"),
        ({"sample_size": [64]}, r"sample_size is \[64\] in the config of the U-Net; write .* such as \[64, 96\]"),
        ({"norm_num_groups": 7}, "does not make a network that runs"),
        ({"attention_head_dim": [8, 8]}, "does not make a network that runs"),
    ],
)
def test_a_config_that_makes_no_unet_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        unet_cost(config("v1", "whole") | changes)


def test_a_context_width_for_every_stage_may_be_listed() -> None:
    whole = config("v1", "whole")
    listed = whole | {"cross_attention_dim": [whole["cross_attention_dim"]] * 4}
    assert unet_cost(listed) == unet_cost(whole)
