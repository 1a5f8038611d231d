"""What the U-Net sees besides noise, from the frozen VAE and text encoder."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from bksdm.common.randomness import Draws
from bksdm.distill.conditions import Conditions
from tiny_models import CONTEXT, LATENT, MAX_TOKENS, PICTURE, tokenize


@pytest.fixture
def conditions(v1_teacher: StableDiffusionPipeline) -> Conditions:
    return Conditions(copy.deepcopy(v1_teacher.vae).train(), copy.deepcopy(v1_teacher.text_encoder).train())


def draws(seed: int = 0) -> Draws:
    return Draws(seed, "test")


def pixels(batch: int = 2) -> Tensor:
    return draws(1).uniform((batch, 3, PICTURE, PICTURE)) * 2 - 1


def test_both_networks_are_frozen(conditions: Conditions) -> None:
    for network in (conditions.vae, conditions.text_encoder):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_posterior_is_scaled_for_the_unet(conditions: Conditions) -> None:
    mean, std = conditions.posterior(pixels())
    wanted = conditions.vae.encode(pixels()).latent_dist
    assert mean.shape == std.shape == (2, 4, LATENT, LATENT)
    assert torch.allclose(mean, 0.18215 * wanted.mean)
    assert torch.allclose(std, 0.18215 * wanted.std)


def test_latents_are_a_sample_of_the_posterior(conditions: Conditions) -> None:
    mean, std = torch.full((4000, 1, 1, 1), 3.0), torch.full((4000, 1, 1, 1), 0.5)
    latents = conditions.latents({"latents_mean": mean, "latents_std": std}, draws())
    assert latents.mean().item() == pytest.approx(3.0, abs=0.05)
    assert latents.std().item() == pytest.approx(0.5, abs=0.05)


def test_pixels_and_their_posterior_give_the_same_latents(conditions: Conditions) -> None:
    mean, std = conditions.posterior(pixels())
    kept = conditions.latents({"latents_mean": mean, "latents_std": std}, draws())
    assert torch.equal(conditions.latents({"pixel_values": pixels()}, draws()), kept)


def test_the_sample_is_a_function_of_the_draws(conditions: Conditions) -> None:
    first, again, other = (conditions.latents({"pixel_values": pixels()}, draws(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_context_is_what_the_pipeline_gives_its_unet(
    conditions: Conditions, v1_teacher: StableDiffusionPipeline
) -> None:
    ids = torch.stack([tokenize(v1_teacher.tokenizer, text) for text in ("red apple", "")])
    context = conditions.context({"input_ids": ids})
    caption, empty = v1_teacher.encode_prompt("red apple", "cpu", 1, True, negative_prompt="")
    assert context.shape == (2, MAX_TOKENS, CONTEXT)
    assert torch.allclose(context, torch.cat([caption, empty]), atol=1e-6)


def test_a_context_that_is_there_is_taken(conditions: Conditions) -> None:
    context = torch.zeros(2, MAX_TOKENS, CONTEXT)
    assert conditions.context({"context": context}) is context


def test_latents_are_float32_whatever_the_vae_is(conditions: Conditions) -> None:
    conditions.vae.to(torch.bfloat16)
    assert conditions.latents({"pixel_values": pixels()}, draws()).dtype == torch.float32
