"""What is kept is what would have been computed, in every family, and takes the memory that was said."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from bksdm.data.cache import CachedSamples, cache_bytes
from bksdm.data.folder import read_captions
from bksdm.data.pictures import PictureSamples, flips
from bksdm.distill.conditions import Conditions, as_type
from bksdm.models.pipelines import tokenizing
from tiny_models import CAPTIONS, LATENT, MAX_TOKENS, PICTURE

both = pytest.mark.parametrize("flip", [False, True])


@pytest.fixture
def conditions(kind_teacher: DiffusionPipeline) -> Conditions:
    return Conditions.of(kind_teacher)


def samples(pipeline: DiffusionPipeline, folder: Path, *, flip: bool = False) -> PictureSamples:
    tokenize, told = tokenizing(pipeline), Conditions.of(pipeline).of_fitted
    return PictureSamples(read_captions(folder), PICTURE, tokenize, flip, told)


def computed(conditions: Conditions, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    batch = {name: value[None] for name, value in sample.items()}
    mean, std = conditions.posterior(batch["pixel_values"])
    made = {"latents_mean": mean, "latents_std": std, **conditions.told(batch)}
    return {name: value[0] for name, value in made.items()}


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-5), name


@both
def test_every_draw_is_what_would_have_been_computed(
    kind_teacher: DiffusionPipeline, pictures: Path, conditions: Conditions, flip: bool
) -> None:
    plain = samples(kind_teacher, pictures, flip=flip)
    cached = CachedSamples(plain, conditions.posterior, conditions.embedded)
    assert len(cached) == len(plain) == 8
    for index in range(8):
        for seed in (0, 1):
            assert_close(cached.sample(index, seed), computed(conditions, plain.sample(index, seed)))


def test_a_mirrored_draw_has_latents_of_its_own(
    kind_teacher: DiffusionPipeline, pictures: Path, conditions: Conditions
) -> None:
    plain = samples(kind_teacher, pictures, flip=True)
    cached = CachedSamples(plain, conditions.posterior, conditions.embedded)
    means = {flips(seed): cached.sample(0, seed)["latents_mean"] for seed in range(20)}
    assert not torch.allclose(means[False], means[True], atol=1e-3)


def test_more_pictures_than_one_chunk(
    kind_teacher: DiffusionPipeline, pictures: Path, tmp_path: Path, conditions: Conditions
) -> None:
    lines = [{"file_name": str(pictures / f"{i % 8}.png"), "text": f"{i} {CAPTIONS[i % 8]}"} for i in range(70)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plain = samples(kind_teacher, tmp_path)
    cached = CachedSamples(plain, conditions.posterior, conditions.embedded)
    assert len(cached) == 70
    for index in (0, 31, 32, 63, 64, 69):
        assert_close(cached.sample(index, 0), computed(conditions, plain.sample(index, 0)))


def test_equal_captions_are_kept_once(
    kind_teacher: DiffusionPipeline, pictures: Path, tmp_path: Path, conditions: Conditions
) -> None:
    lines = [{"file_name": str(pictures / f"{i}.png"), "text": text} for i, text in enumerate("aba")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cached = CachedSamples(samples(kind_teacher, tmp_path), conditions.posterior, conditions.embedded)
    first, other, again = (cached.sample(index, 0)["context"] for index in range(3))
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()


@both
def test_the_memory_is_what_was_said(
    kind_teacher: DiffusionPipeline, pictures: Path, conditions: Conditions, flip: bool
) -> None:
    plain = samples(kind_teacher, pictures, flip=flip)
    cached = CachedSamples(plain, conditions.posterior, conditions.embedded)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for index in range(8)
        for seed in range(20)
        for tensor in cached.sample(index, seed).values()
    }
    shapes = conditions.family.condition_shapes(kind_teacher.unet.config, MAX_TOKENS)
    assert sum(held.values()) == cache_bytes(plain.pictures, flip, (4, LATENT, LATENT), shapes)


@both
def test_progress_counts_every_encoded_picture(
    kind_teacher: DiffusionPipeline, pictures: Path, conditions: Conditions, flip: bool
) -> None:
    counts: list[int] = []
    CachedSamples(samples(kind_teacher, pictures, flip=flip), conditions.posterior, conditions.embedded, counts.append)
    assert sum(counts) == (16 if flip else 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_kept_is_float32(
    kind_teacher: DiffusionPipeline, pictures: Path, conditions: Conditions, dtype: torch.dtype
) -> None:
    def posterior(pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = conditions.posterior(pixels)
        return mean.to(dtype), std.to(dtype)

    cached = CachedSamples(
        samples(kind_teacher, pictures),
        posterior,
        lambda ids: as_type(conditions.embedded(ids), dtype),
    )
    assert {tensor.dtype for tensor in cached.sample(0, 0).values()} == {torch.float32}
