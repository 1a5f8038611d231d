"""Kept latents and contexts are those that would have been computed, and take the memory that was said."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from bksdm.data.cache import CachedSamples, cache_bytes
from bksdm.data.folder import read_captions
from bksdm.data.pictures import PictureSamples, flips
from bksdm.distill.conditions import Conditions
from tiny_models import CAPTIONS, CONTEXT, LATENT, MAX_TOKENS, PICTURE, tokenize

SHAPES = (4, LATENT, LATENT), (MAX_TOKENS, CONTEXT)
both = pytest.mark.parametrize("flip", [False, True])


@pytest.fixture
def conditions(v1_teacher: StableDiffusionPipeline) -> Conditions:
    return Conditions(copy.deepcopy(v1_teacher.vae), copy.deepcopy(v1_teacher.text_encoder))


@pytest.fixture
def folder(v1_teacher: StableDiffusionPipeline, pictures: Path) -> PictureSamples:
    return samples(v1_teacher, pictures)


def samples(pipeline: StableDiffusionPipeline, folder: Path, *, flip: bool = False) -> PictureSamples:
    return PictureSamples(read_captions(folder), PICTURE, lambda text: tokenize(pipeline.tokenizer, text), flip)


def computed(conditions: Conditions, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    mean, std = conditions.posterior(sample["pixel_values"][None])
    context = conditions.embedding(sample["input_ids"][None])
    return {"latents_mean": mean[0], "latents_std": std[0], "context": context[0]}


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-5), name


@both
def test_every_draw_is_what_would_have_been_computed(
    v1_teacher: StableDiffusionPipeline, pictures: Path, conditions: Conditions, flip: bool
) -> None:
    plain = samples(v1_teacher, pictures, flip=flip)
    cached = CachedSamples(plain, conditions.posterior, conditions.embedding)
    assert len(cached) == len(plain) == 8
    for index in range(8):
        for seed in (0, 1):
            assert_close(cached.sample(index, seed), computed(conditions, plain.sample(index, seed)))


def test_a_mirrored_draw_has_latents_of_its_own(
    v1_teacher: StableDiffusionPipeline, pictures: Path, conditions: Conditions
) -> None:
    plain = samples(v1_teacher, pictures, flip=True)
    cached = CachedSamples(plain, conditions.posterior, conditions.embedding)
    means = {flips(seed): cached.sample(0, seed)["latents_mean"] for seed in range(20)}
    assert not torch.allclose(means[False], means[True], atol=1e-3)


def test_more_pictures_than_one_chunk(
    v1_teacher: StableDiffusionPipeline, pictures: Path, tmp_path: Path, conditions: Conditions
) -> None:
    lines = [{"file_name": str(pictures / f"{i % 8}.png"), "text": f"{i} {CAPTIONS[i % 8]}"} for i in range(70)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plain = samples(v1_teacher, tmp_path)
    cached = CachedSamples(plain, conditions.posterior, conditions.embedding)
    assert len(cached) == 70
    for index in (0, 31, 32, 63, 64, 69):
        assert_close(cached.sample(index, 0), computed(conditions, plain.sample(index, 0)))


def test_equal_captions_share_one_context(
    v1_teacher: StableDiffusionPipeline, pictures: Path, tmp_path: Path, conditions: Conditions
) -> None:
    lines = [{"file_name": str(pictures / f"{i}.png"), "text": text} for i, text in enumerate("aba")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cached = CachedSamples(samples(v1_teacher, tmp_path), conditions.posterior, conditions.embedding)
    first, other, again = (cached.sample(index, 0)["context"] for index in range(3))
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()


@both
def test_the_memory_is_what_was_said(
    v1_teacher: StableDiffusionPipeline, pictures: Path, conditions: Conditions, flip: bool
) -> None:
    plain = samples(v1_teacher, pictures, flip=flip)
    cached = CachedSamples(plain, conditions.posterior, conditions.embedding)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for index in range(8)
        for seed in range(20)
        for tensor in cached.sample(index, seed).values()
    }
    assert sum(held.values()) == cache_bytes(plain.pictures, flip, *SHAPES)


@both
def test_progress_counts_every_encoded_picture(
    v1_teacher: StableDiffusionPipeline, pictures: Path, conditions: Conditions, flip: bool
) -> None:
    counts: list[int] = []
    CachedSamples(samples(v1_teacher, pictures, flip=flip), conditions.posterior, conditions.embedding, counts.append)
    assert sum(counts) == (16 if flip else 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_kept_is_float32(folder: PictureSamples, conditions: Conditions, dtype: torch.dtype) -> None:
    def posterior(pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = conditions.posterior(pixels)
        return mean.to(dtype), std.to(dtype)

    cached = CachedSamples(folder, posterior, lambda ids: conditions.embedding(ids).to(dtype))
    assert {tensor.dtype for tensor in cached.sample(0, 0).values()} == {torch.float32}
