"""Scores against their formulas, and `bksdm evaluate` on a handful of real pictures."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from bksdm.assets import asset
from bksdm.data.folder import read_captions
from bksdm.evaluate.encoder import DualEncoder, cosine
from bksdm.evaluate.output_error import output_error
from bksdm.evaluate.scores import clip_score, frechet_distance, retrieval_r1
from bksdm.evaluate.table import text_table
from bksdm.prune import prune_unet
from bksdm.recipe import load_recipe
from verbs import Run, captioned, copy_pictures, mtimes

pytest_plugins = ["verbs_fixtures"]

HELD_OUT = asset("emoji", "art", "heldout")


def features(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=rng, dtype=torch.float64)
    return shift + scale * torch.randn(n, d, generator=rng, dtype=torch.float64) @ mixing


def frechet_by_symmetric_roots(a: Tensor, b: Tensor) -> float:
    """The formula with (S^1/2 T S^1/2)^1/2, whose trace is that of (S T)^1/2, by eigenvalues of symmetric matrices."""

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T

    s, t = torch.cov(a.T), torch.cov(b.T)
    cross = root(root(s) @ t @ root(s))
    return float((a.mean(0) - b.mean(0)).square().sum() + torch.trace(s + t - 2 * cross))


@pytest.mark.parametrize(("n", "d"), [(200, 4), (50, 8), (20, 32)])
def test_the_frechet_distance_is_its_formula(n: int, d: int) -> None:
    a, b = features(n, d, 0), features(n, d, 1, scale=2.0, shift=0.5)
    assert frechet_distance(a, b) == pytest.approx(frechet_by_symmetric_roots(a, b), rel=1e-5)


def test_the_frechet_distance_of_the_same_pictures_is_zero() -> None:
    a = features(100, 6, 0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_of_shifted_features_is_the_squared_shift() -> None:
    a = features(100, 6, 0)
    assert frechet_distance(a + 3, a) == pytest.approx(6 * 9, rel=1e-6)


def test_the_clip_score_is_the_mean_cosine() -> None:
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    texts = torch.tensor([[5.0, 0.0], [1.0, 0.0]])
    assert clip_score(images, texts) == pytest.approx(0.5)


def test_retrieval_counts_the_pictures_whose_own_caption_is_nearest() -> None:
    names = [f"caption {number}" for number in range(10)]
    pool = dict(zip(names, torch.eye(10), strict=True))
    images = torch.eye(10)
    assert retrieval_r1(images, names, pool, among=10) == 1
    assert retrieval_r1(images.roll(1, dims=0), names, pool, among=10) == 0
    half = torch.cat([images[:5], images[5:].roll(1, dims=0)])
    assert retrieval_r1(half, names, pool, among=10) == 0.5


def test_retrieval_among_fewer_captions_is_easier() -> None:
    names = [f"caption {number}" for number in range(50)]
    pool = dict(zip(names, features(50, 16, 0).float(), strict=True))
    images = torch.stack(list(pool.values())) + features(50, 16, 1, scale=2).float()
    few, many = (retrieval_r1(images, names, pool, among=n) for n in (2, 50))
    assert many < few


def test_a_caption_without_rivals_is_always_the_best() -> None:
    pool = {"red": torch.ones(4)}
    assert retrieval_r1(torch.randn(3, 4), ["red"] * 3, pool, among=1) == 1


def test_retrieval_never_draws_a_pictures_own_caption_as_a_rival() -> None:
    names = [f"caption {number}" for number in range(5)]
    pool = dict(zip(names, torch.eye(5), strict=True))
    assert retrieval_r1(torch.eye(5), names, pool, among=2) == 1


def test_retrieval_is_the_mean_over_all_draws_of_rivals() -> None:
    names = [f"caption {number}" for number in range(6)]
    pool = dict(zip(names, features(6, 4, 0).float(), strict=True))
    images = torch.stack(list(pool.values())) + features(6, 4, 1).float()
    similar = cosine(images, torch.stack(list(pool.values())))
    hits = [
        all(similar[own, own] > similar[own, other] for other in rivals)
        for own in range(6)
        for rivals in itertools.combinations([n for n in range(6) if n != own], 2)
    ]
    assert 0 < sum(hits) < len(hits)
    assert retrieval_r1(images, names, pool, among=3) == pytest.approx(sum(hits) / len(hits))


def test_features_do_not_depend_on_what_stands_beside() -> None:
    encoder = DualEncoder.load("emoji")
    entries = read_captions(HELD_OUT)[:3]
    images, texts = [entry.open() for entry in entries], [entry.text for entry in entries]
    for together, alone in (
        (encoder.image_features(images), [encoder.image_features([image]) for image in images]),
        (encoder.text_features(texts), [encoder.text_features([text]) for text in texts]),
    ):
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_the_embedded_encoder_knows_real_art() -> None:
    encoder = DualEncoder.load("emoji")
    entries = read_captions(HELD_OUT)
    images = encoder.image_features([entry.open() for entry in entries])
    similar = cosine(images, encoder.text_features([entry.text for entry in entries]))
    own = similar.diagonal().mean()
    others = (similar.sum() - similar.diagonal().sum()) / (similar.numel() - len(entries))
    assert own > others + 0.3


def test_a_teacher_has_no_output_error_and_a_pruned_one_has(
    v1_teacher: StableDiffusionPipeline, pictures: Path
) -> None:
    entries = read_captions(pictures)
    student, _ = prune_unet(v1_teacher.unet, load_recipe("small"))
    assert output_error(v1_teacher.unet, v1_teacher, entries) == 0
    assert output_error(student, v1_teacher, entries) > 1e-4


def test_the_output_error_is_the_same_for_the_same_seed(v1_teacher: StableDiffusionPipeline, pictures: Path) -> None:
    entries = read_captions(pictures)
    student, _ = prune_unet(v1_teacher.unet, load_recipe("small"))
    first, again, other = (output_error(student, v1_teacher, entries, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_evaluate_writes_its_scores_and_prints_the_same(done: Run, tmp_path: Path) -> None:
    reference = copy_pictures(HELD_OUT, tmp_path / "reference", 6)
    words = ("evaluate", "emoji", "--reference", reference, "--teacher", "emoji", "--out", tmp_path / "scores")
    printed = done(*words, "--steps", 2, "--json").json
    assert printed == json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert printed["pictures"] == 6
    assert printed["retrieval_among"] == 100
    assert printed["output_error"] == 0
    assert printed["frechet_distance"] > 0
    assert set(printed["reference"]) == {"pictures", "clip_score", "retrieval_r1"}
    assert len(list((tmp_path / "scores" / "pictures").glob("*.png"))) == 6


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return copy_pictures(HELD_OUT, tmp_path / "reference", 4)


def test_a_pruned_model_is_worse_than_its_teacher(
    done: Run, v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ("--reference", pictures, "--teacher", v1_folder, "--steps", 1, "--json")
    teacher, student = (
        done("evaluate", model, *words, "--out", tmp_path / model.name).json for model in (v1_folder, v1_student)
    )
    assert teacher["output_error"] == 0
    assert student["output_error"] > 1e-4


def test_the_same_command_makes_no_picture_again(done: Run, v1_folder: Path, pictures: Path, tmp_path: Path) -> None:
    words = ("evaluate", v1_folder, "--reference", pictures, "--steps", 1, "--out", tmp_path / "scores", "--json")
    first = done(*words).json
    made = sorted((tmp_path / "scores" / "pictures").glob("*.png"))
    before = mtimes(made)
    assert done(*words, "--batch_size", 3).json == first
    assert mtimes(made) == before


def test_prompts_may_be_others_than_the_references_captions(
    done: Run, v1_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("snail\nhouse\nsnail\n")
    words = ("--reference", pictures, "--prompts", tmp_path / "prompts.txt", "--images_per_prompt", 2, "--steps", 1)
    words += ("--distractors", pictures)
    scores = done("evaluate", v1_folder, *words, "--out", tmp_path / "scores", "--json").json
    captions = {entry.text for entry in read_captions(pictures)}
    assert scores["pictures"] == 6
    assert scores["reference"]["pictures"] == 8
    assert scores["retrieval_among"] == len(captions | {"snail", "house"})
    made = [entry.text for entry in read_captions(tmp_path / "scores" / "pictures")]
    assert made == ["snail", "snail", "house", "house", "snail", "snail"]


def test_a_reference_with_one_caption_can_be_scored(done: Run, v1_folder: Path, tmp_path: Path) -> None:
    reference = captioned(tmp_path / "reds", [Image.new("RGB", (32, 32), colour) for colour in ("red", "darkred")])
    words = ("--reference", reference, "--distractors", reference, "--steps", 1, "--out", tmp_path / "scores", "--json")
    scores = done("evaluate", v1_folder, *words).json
    assert (scores["retrieval_among"], scores["retrieval_r1"]) == (1, 1.0)


def test_an_encoder_may_be_given_as_a_folder(done: Run, v1_folder: Path, reference: Path, tmp_path: Path) -> None:
    words = ("evaluate", v1_folder, "--reference", reference, "--steps", 1, "--json")
    embedded = done(*words, "--out", tmp_path / "a").json
    assert done(*words, "--out", tmp_path / "b", "--encoder", asset("emoji", "encoder")).json == embedded


def test_without_json_there_is_a_table(done: Run, v1_folder: Path, reference: Path, tmp_path: Path) -> None:
    out = done("evaluate", v1_folder, "--reference", reference, "--steps", 1, "--out", tmp_path / "a").out
    assert [line.split()[0] for line in out.splitlines()] == ["model", str(v1_folder), "real"]


def test_the_table_has_a_line_a_model_and_one_for_the_real_pictures() -> None:
    scores = {"frechet_distance": 12.5, "clip_score": 0.25, "retrieval_r1": 0.5, "reference": {"clip_score": 0.75}}
    lines = text_table({"mine": scores, "yours": scores}).splitlines()
    assert [line.split()[0] for line in lines] == ["model", "mine", "yours", "real"]
    assert "12.5" in lines[1]
    assert "0.75" in lines[3]
