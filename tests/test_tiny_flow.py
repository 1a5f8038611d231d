"""The small flow pipelines draw, as objects and as folders, and every block of theirs is seen in the picture."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from fast import slow
from tiny_flow import (
    DYNAMIC_SHIFT,
    build_flux2_dev_pipeline,
    build_flux2_pipeline,
    build_flux_pipeline,
    build_z_pipeline,
    draw,
    stacks,
)

BLOCKS = {
    build_flux_pipeline: {"transformer_blocks": 4, "single_transformer_blocks": 6},
    build_flux2_pipeline: {"transformer_blocks": 3, "single_transformer_blocks": 5},
    build_flux2_dev_pipeline: {"transformer_blocks": 3, "single_transformer_blocks": 5},
    build_z_pipeline: {"noise_refiner": 2, "context_refiner": 2, "layers": 6},
}
SEEN = 1e-3  # of a picture between 0 and 1


# Of the two kinds of FLUX.2, which differ in what they are told, one.
@pytest.fixture(params=[slow(build) if build is build_flux2_dev_pipeline else build for build in BLOCKS])
def build(request: pytest.FixtureRequest) -> Callable[..., DiffusionPipeline]:
    return request.param


def test_folder_draws_the_same(build: Callable[..., DiffusionPipeline], tmp_path: Path) -> None:
    pipeline = build()
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipeline)
    assert all(loaded.scheduler.config[name] == pipeline.scheduler.config[name] for name in DYNAMIC_SHIFT)
    picture = draw(pipeline)
    assert np.array_equal(draw(loaded), picture)
    assert np.isfinite(picture).all()
    assert picture.std() > 0.1


def test_prompt_and_noise_are_seen(build: Callable[..., DiffusionPipeline]) -> None:
    pipeline = build()
    picture = draw(pipeline)
    assert abs(draw(pipeline, "green car") - picture).max() > SEEN
    assert abs(draw(pipeline, seed=1) - picture).max() > SEEN
    assert draw(pipeline, height=32, width=16).shape == (32, 16, 3)


def test_every_block_is_seen(build: Callable[..., DiffusionPipeline]) -> None:
    pipeline = build()
    picture, blocks = draw(pipeline), stacks(pipeline.transformer)
    assert {name: len(stack) for name, stack in blocks.items()} == BLOCKS[build]
    for name, stack in blocks.items():
        for index, block in enumerate(stack):
            before = deepcopy(block.state_dict())
            _push(block)
            assert abs(draw(pipeline) - picture).max() > SEEN, (name, index)
            block.load_state_dict(before)
    assert np.array_equal(draw(pipeline), picture)


def test_seed_decides_weights(build: Callable[..., DiffusionPipeline]) -> None:
    weights, again, other = (_weights(build(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not any(torch.equal(weights[name], other[name]) for name in weights)
    assert all(len(weight.unique()) > 1 for weight in weights.values())
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_flux_is_told_of_guidance_only_with_its_embedding() -> None:
    for told in (True, False):
        pipeline = build_flux_pipeline(layers=1, single_layers=1, guidance_embeds=told)
        assert (abs(draw(pipeline, guidance_scale=1.0) - draw(pipeline, guidance_scale=9.0)).max() > SEEN) == told


def test_distilled_flux2_takes_no_guidance() -> None:
    for distilled in (True, False):
        pipeline = build_flux2_pipeline(layers=1, single_layers=1, is_distilled=distilled)
        same = np.array_equal(draw(pipeline, guidance_scale=1.0), draw(pipeline, guidance_scale=4.0))
        assert same == distilled


@torch.no_grad()
def _push(block: nn.Module) -> None:
    rng = torch.Generator().manual_seed(0)
    for weight in block.parameters():
        weight.add_(torch.randn(weight.shape, generator=rng), alpha=0.1)


def _weights(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    assert not any(part.training for part in parts.values())
    return {f"{part}.{name}": weight for part in parts for name, weight in parts[part].named_parameters()}
