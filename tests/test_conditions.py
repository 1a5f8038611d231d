"""What the U-Net sees besides noise, from the VAE and the text encoders, in every family."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from bksdm.common.randomness import Draws
from bksdm.distill.conditions import Conditions, without_caption
from bksdm.models.pipelines import tokenizing
from tiny_models import CONTEXT, LATENT, MAX_TOKENS, PICTURE


@pytest.fixture
def conditions(kind_teacher: DiffusionPipeline) -> Conditions:
    return trained(kind_teacher)


@pytest.fixture
def xl_conditions(xl_teacher: StableDiffusionXLPipeline) -> Conditions:
    return trained(xl_teacher)


def trained(pipeline: DiffusionPipeline) -> Conditions:
    """Those of a copy of a pipeline, whose networks were in training mode."""
    own = copy.deepcopy(pipeline)
    for part in own.components.values():
        if isinstance(part, nn.Module):
            part.train()
    return Conditions.of(own)


def draws(seed: int = 0) -> Draws:
    return Draws(seed, "test")


def pixels(batch: int = 2) -> Tensor:
    return draws(1).uniform((batch, 3, PICTURE, PICTURE)) * 2 - 1


def test_no_network_learns(conditions: Conditions) -> None:
    for network in (conditions.vae, *conditions.encoders):
        assert not any(module.training for module in network.modules())
        assert all(parameter.requires_grad for parameter in network.parameters())  # as the pipeline's owner left them
    tokens = torch.randint(500, (2, len(conditions.encoders), MAX_TOKENS)).squeeze(1)
    found = (*conditions.posterior(pixels()), *conditions.embedded(tokens).values())
    assert not any(value.requires_grad for value in found)


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


def prompted(pipeline: DiffusionPipeline, texts: list[str]) -> list[dict[str, Tensor]]:
    """What stock diffusers tells its U-Net of captions, and then of the empty prompt under guidance."""
    names = ["context", "context", "text_embeds", "text_embeds"]
    made = pipeline.encode_prompt(texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    return [dict(zip(names[offset::2], made[offset::2], strict=False)) for offset in (0, 1)]


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in ours.items())


def test_captions_give_what_the_pipeline_gives_its_unet(
    conditions: Conditions, kind_teacher: DiffusionPipeline
) -> None:
    tokenize, texts = tokenizing(kind_teacher), ["red apple", "a green"]
    told = conditions.captions({"input_ids": torch.stack([tokenize(text) for text in texts])})
    wanted, _ = prompted(kind_teacher, texts)
    assert_near(told, wanted)
    assert told["context"].shape == (2, MAX_TOKENS, CONTEXT)


@pytest.mark.parametrize("zeros", [True, False])
def test_without_a_caption_the_unet_is_told_what_guidance_tells_it(
    kind_teacher: DiffusionPipeline, zeros: bool
) -> None:
    pipeline = copy.deepcopy(kind_teacher)
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    _, wanted = prompted(pipeline, ["red apple"])
    assert_near(without_caption(pipeline, Conditions.of(pipeline)), wanted)


def test_what_is_there_is_taken(conditions: Conditions) -> None:
    names = conditions.family.of_caption + conditions.family.of_picture
    batch = {name: torch.zeros(2, number + 1) for number, name in enumerate(names)}
    assert conditions.told(batch | {"latents_mean": torch.zeros(2)}) == batch
    assert conditions.captions(batch).keys() == set(conditions.family.of_caption)


def test_of_a_picture_sdxl_is_told_its_size_the_corner_and_the_size_of_the_cut(
    xl_conditions: Conditions, xl_teacher: StableDiffusionXLPipeline
) -> None:
    told = xl_conditions.of_fitted((300, 200), (64, 32))
    assert told["time_ids"].tolist() == [300, 200, 0, 5, 64, 32]  # scaled to 64 x 42.7 pixels
    width = xl_teacher.text_encoder_2.config.projection_dim
    stock = xl_teacher._get_add_time_ids((300, 200), (0, 5), (64, 32), torch.float32, width)
    assert torch.equal(told["time_ids"], stock[0])


def test_latents_are_float32_whatever_the_vae_is(conditions: Conditions) -> None:
    conditions.vae.to(torch.bfloat16)
    assert conditions.latents({"pixel_values": pixels()}, draws()).dtype == torch.float32
