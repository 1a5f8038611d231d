"""What units are worth: every score against its formula, and `bksdm sensitivity` from first to last."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

from bksdm.data.folder import read_captions
from bksdm.evaluate.encoder import DualEncoder
from bksdm.evaluate.output_error import output_error
from bksdm.evaluate.scores import clip_score, frechet_distance
from bksdm.families import units
from bksdm.families.recipe import Recipe
from bksdm.generate.requests import Request
from bksdm.generate.sampling import decode, sample, sample_latents
from bksdm.models.pipelines import save_pipeline
from bksdm.options.pruning import SensitivityOptions
from bksdm.pruning.inherit import prune_unet, with_denoiser
from bksdm.pruning.sensitivity.measures import (
    Score,
    _frechet,
    _moments,
    clip_fall,
    frechet_rise,
    latent_shift,
    output_loss,
)
from bksdm.pruning.sensitivity.outcome import correlation, ranks
from bksdm.pruning.sensitivity.run import sensitivity
from tiny_models import V1_UNET, build_pipeline
from verbs import Run, read_lines, saved

pytest_plugins = ["verbs_fixtures"]

SCORES = ("output", "frechet", "clip", "latents")
STEPS, GUIDANCE = 2, 3.0
PICTURES = 4
WORDS = ("--steps", STEPS, "--guidance", GUIDANCE, "--pictures", PICTURES)
UNET = V1_UNET | {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


# The measures


def random_pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    whole = torch.randn(*shape, generator=rng)
    return whole + 0.3 * torch.randn(*shape, generator=rng) + 0.1, whole


def test_the_output_loss_is_a_mean_of_squares_with_its_standard_error() -> None:
    without, whole = random_pair(40, 4, 8, 8)
    each = ((without - whole) ** 2).numpy().astype(np.float64).mean(axis=(1, 2, 3))
    found = output_loss(without, whole)
    assert found.value == pytest.approx(each.mean(), rel=1e-6)
    assert found.error == pytest.approx(each.std(ddof=1) / 40**0.5, rel=1e-5)


def test_the_shift_of_latents_is_that_of_their_mean_and_deviation_over_the_pictures() -> None:
    without, whole = random_pair(40, 4, 8, 8)
    a, b = (latents.numpy().astype(np.float64) for latents in (without, whole))
    shift = np.linalg.norm(a.mean(0) - b.mean(0)) + np.linalg.norm(a.std(0, ddof=1) - b.std(0, ddof=1))
    assert latent_shift(without, whole).value == pytest.approx(shift, rel=1e-5)


def test_rise_and_fall_are_differences_of_the_scores() -> None:
    without, whole = random_pair(40, 6)
    real, texts = torch.randn(50, 6), torch.randn(40, 6)
    rise = frechet_distance(without, real) - frechet_distance(whole, real)
    assert frechet_rise(without, whole, real).value == pytest.approx(rise)
    assert clip_fall(without, whole, texts).value == pytest.approx(
        clip_score(whole, texts) - clip_score(without, texts)
    )


@pytest.mark.parametrize(("count", "width"), [(10, 32), (60, 8), (8, 8)])
def test_the_quick_frechet_distance_is_the_frechet_distance(count: int, width: int) -> None:
    a, b = torch.randn(count, width, dtype=torch.float64), 2 * torch.randn(25, width, dtype=torch.float64) + 1
    assert _frechet(_moments(a), _moments(b)) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_what_changes_nothing_is_worth_nothing_for_certain() -> None:
    features, latents = torch.randn(20, 6), torch.randn(20, 4, 8, 8)
    for found in (
        output_loss(latents, latents),
        latent_shift(latents, latents),
        frechet_rise(features, features, torch.randn(30, 6)),
        clip_fall(features, features, torch.randn(20, 6)),
    ):
        assert found == Score(0.0, 0.0)


def test_standard_errors_by_the_bootstrap_are_those_of_the_theory() -> None:
    """Of a shift along one element that is the same but for noise, the error is that of a mean."""
    whole = torch.zeros(400, 1, 1, 1)
    without = 5 + torch.randn(400, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    mean_and_deviation = (1 + 0.5) ** 0.5 / 400**0.5  # variances 1/n and 1/(2n), which are independent
    assert latent_shift(without, whole).error == pytest.approx(mean_and_deviation, rel=0.25)


def test_ranks_of_equals_are_shared() -> None:
    assert ranks({"a": 3.0, "b": 1.0, "c": 3.0, "d": 7.0}) == {"b": 1, "a": 2.5, "c": 2.5, "d": 4}


def test_rank_correlation_is_spearmans() -> None:
    assert correlation([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(1)
    assert correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))  # without equals
    assert correlation([1, 2, 3], [2, 2, 2]) is None


def test_latents_are_decoded_to_the_pictures_that_sampling_gives(v1_teacher: StableDiffusionPipeline) -> None:
    requests = [Request("red apple", 3), Request("green car", 4), Request("car", 5)]
    pictures = [picture for batch in sample(v1_teacher, requests, steps=2, batch_size=2) for picture in batch]
    latents = torch.cat(list(sample_latents(v1_teacher, requests, steps=2, batch_size=2)))
    assert latents.shape == (3, 4, 8, 8)
    for picture, again in zip(pictures, decode(v1_teacher, latents), strict=True):
        assert np.abs(np.asarray(picture, dtype=int) - np.asarray(again, dtype=int)).max() <= 1


# The verb


@pytest.fixture(scope="module")
def small_teacher() -> StableDiffusionPipeline:
    """Three stages, the inner two of one width. Shared by the tests here: not to be changed."""
    return build_pipeline(UNET)


@pytest.fixture(scope="module")
def small_folder(small_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on the disk. Shared by the tests here: not to be changed."""
    return saved(small_teacher, tmp_path_factory)


@pytest.fixture(scope="module")
def analysed(small_folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Shared by the tests here: not to be changed."""
    out = tmp_path_factory.mktemp("sensitivity") / "out"
    shared = {"pictures": PICTURES, "steps": STEPS, "guidance": GUIDANCE}
    sensitivity(SensitivityOptions(str(small_folder), str(pictures), str(out), params=0.7, **shared))
    return out


def command(teacher: Path, data: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words(teacher, data, out, *more), capture_output=True, text=True, check=False)


def words(teacher: Path, data: Path, out: Path, *more: object) -> list[str]:
    given = ("-m", "bksdm", "sensitivity", teacher, "--data", data, "--out", out, *WORDS, *more)
    return [sys.executable, *map(str, given)]


@pytest.fixture
def copied(analysed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(analysed, tmp_path / "out"))


def test_every_unit_has_every_score(analysed: Path, small_teacher: StableDiffusionPipeline) -> None:
    found = json.loads((analysed / "sensitivity.json").read_text())
    assert [unit["name"] for unit in found["units"]] == [unit.name for unit in units(small_teacher.unet.config)]
    for unit in found["units"]:
        assert tuple(unit["scores"]) == SCORES
        assert all(score["error"] >= 0 for score in unit["scores"].values())
    for score in SCORES:
        assert sorted(unit["scores"][score]["rank"] for unit in found["units"]) == list(range(1, 18))
    assert len(found["rank_correlation"]) == 6
    assert set(found["whole"]) == {"frechet", "clip"}


@pytest.mark.parametrize(
    ("unit", "recipe"),
    [("mid_block", Recipe("mine", mid=False)), ("innermost stage", Recipe("mine", drop_innermost=1))],
    ids=["mid", "innermost"],
)
def test_scores_are_those_of_the_student_without_the_unit(
    analysed: Path, small_teacher: StableDiffusionPipeline, pictures: Path, unit: str, recipe: Recipe
) -> None:
    entries = read_captions(pictures)[:: 8 // PICTURES]
    requests = [Request(entry.text, number) for number, entry in enumerate(entries)]
    student = with_denoiser(small_teacher, prune_unet(small_teacher.unet, recipe)[0])
    found = {line["score"]: line["value"] for line in read_lines(analysed / "scores.jsonl") if line["unit"] == unit}
    assert found["output"] == pytest.approx(output_error(student.unet, small_teacher, entries), rel=1e-3)

    encoder = DualEncoder.load("emoji")
    real = encoder.image_features([entry.open() for entry in read_captions(pictures)])
    texts = encoder.text_features([entry.text for entry in entries])
    features, latents = [], []
    for pipeline in (student, small_teacher):
        made = sample(pipeline, requests, steps=STEPS, guidance=GUIDANCE, batch_size=8)
        features.append(encoder.image_features([picture for batch in made for picture in batch]))
        drawn = sample_latents(pipeline, requests, steps=STEPS, guidance=GUIDANCE, batch_size=8)
        latents.append(torch.cat(list(drawn)))
    rise = frechet_distance(features[0], real) - frechet_distance(features[1], real)
    fall = clip_score(features[1], texts) - clip_score(features[0], texts)
    assert found["frechet"] == pytest.approx(rise, rel=1e-2, abs=1e-2)
    assert found["clip"] == pytest.approx(fall, abs=1e-3)
    assert found["latents"] == pytest.approx(latent_shift(*latents).value, rel=1e-3)


def test_the_recipe_can_be_pruned_by_and_keeps_to_the_budget(
    done: Run, analysed: Path, small_folder: Path, tmp_path: Path
) -> None:
    pruned = done(
        "prune", small_folder, "--recipe", analysed / "recipe.yaml", "--out", tmp_path / "student", "--json"
    ).json
    assert pruned["unet"]["params"] <= 0.7 * pruned["teacher_unet"]["params"]
    recipe = json.loads((analysed / "sensitivity.json").read_text())["recipe"]
    assert recipe["share"] == pytest.approx(pruned["unet"]["params"] / pruned["teacher_unet"]["params"])
    assert recipe["recipe"] == yaml.safe_load((analysed / "recipe.yaml").read_text())


def test_everything_is_there_for_people(analysed: Path) -> None:
    with (analysed / "sensitivity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = json.loads((analysed / "sensitivity.json").read_text())["units"]
    assert [row["unit"] for row in rows] == [unit["name"] for unit in found]
    assert [float(row["clip_rank"]) for row in rows] == [unit["scores"]["clip"]["rank"] for unit in found]
    with Image.open(analysed / "sensitivity.png") as chart:
        assert chart.width > 1000
    page = (analysed / "report.html").read_text(encoding="utf-8")
    assert all(f"<td>{unit['name']}</td>" in page for unit in found)
    assert "<svg" in page
    assert not re.findall(r"""(?:src|href|data)\s*=\s*["'](?!data:|#)""", page)
    assert not re.findall(r"<(?:script|link|iframe|object)\b|@import|url\((?!#)", page)


def test_a_finished_run_is_left_as_it_is(run: Run, copied: Path, small_folder: Path, pictures: Path) -> None:
    lines = read_lines(copied / "scores.jsonl")
    lines[-1]["value"] = 123.0  # would be another number, were it measured again
    (copied / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ("sensitivity", small_folder, "--data", pictures, "--out", copied, *WORDS, "--params", 0.7, "--json")
    outcome = run(*given)
    assert outcome.code == 0
    assert outcome.json["units"][-1]["scores"]["latents"]["value"] == 123.0
    assert not outcome.said
    assert outcome.json == {"out": str(copied), **json.loads((copied / "sensitivity.json").read_text())}


def test_what_was_cut_off_is_measured_again_to_the_same_bits(
    done: Run, copied: Path, small_folder: Path, pictures: Path
) -> None:
    names = ("scores.jsonl", "sensitivity.json", "sensitivity.csv", "recipe.yaml")
    before = {name: (copied / name).read_bytes() for name in names}
    ledger = copied / "scores.jsonl"
    ledger.write_bytes(before["scores.jsonl"][:-700])
    for name in names[1:]:
        (copied / name).unlink()
    done("sensitivity", small_folder, "--data", pictures, "--out", copied, *WORDS, "--params", 0.7)
    assert {name: (copied / name).read_bytes() for name in names} == before


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(
    analysed: Path, small_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    going = subprocess.Popen(
        words(small_folder, pictures, out, "--params", 0.7), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (out / "scores.jsonl").exists() or len(read_lines(out / "scores.jsonl")) < 20:
        assert going.poll() is None
        time.sleep(0.05)
    os.kill(going.pid, signal.SIGKILL)
    going.wait()
    assert not (out / "sensitivity.json").exists()
    command(small_folder, pictures, out, "--params", 0.7).check_returncode()
    for name in ("scores.jsonl", "sensitivity.json", "sensitivity.csv", "recipe.yaml"):
        assert (out / name).read_bytes() == (analysed / name).read_bytes()


@pytest.mark.slow
def test_another_budget_needs_no_new_scores(done: Run, copied: Path, small_folder: Path, pictures: Path) -> None:
    before = (copied / "scores.jsonl").read_bytes()
    given = ("sensitivity", small_folder, "--data", pictures, "--out", copied, *WORDS, "--json")
    found = done(*given, "--gmacs", 0.9, "--budget_score", "latents").json
    assert (copied / "scores.jsonl").read_bytes() == before
    worth = {unit["name"]: unit["scores"]["latents"]["value"] for unit in found["units"]}
    assert found["recipe"]["loses"] == pytest.approx(sum(worth[name] for name in found["recipe"]["removed_units"]))
    assert found["recipe"]["unet"]["gmacs_modules"] <= 0.9 * found["recipe"]["teacher_unet"]["gmacs_modules"]
    assert done(*given).json["recipe"] is None


def test_the_output_loss_alone_makes_no_picture_and_needs_no_steps(
    done: Run, small_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    given = ("sensitivity", small_folder, "--data", pictures, "--out", tmp_path / "out", "--steps", 1000)
    out = done(*given, "--pictures", 3, "--scores", "output").out
    assert "output loss" in out
    assert "CLIP" not in out
    assert {line["score"] for line in read_lines(tmp_path / "out" / "scores.jsonl")} == {"output"}
    assert not (tmp_path / "out" / "recipe.yaml").exists()


BAD = [
    (("--params", 0.01), r"params is 0.01, and the smallest recipe keeps 0\.\d+ of this U-Net's parameters; give that"),
    (("--params", 1.2), "params is 1.2; give a share of the teacher's U-Net between 0 and 1"),
    (("--params", 0.5, "--gmacs", 0.5), "params is 0.5 and gmacs 0.5; give one budget"),
    (("--params", 0.5, "--scores", "clip"), "budget_score is output, and scores are clip; add it there"),
    (("--pictures", 1), "pictures is 1; a standard error needs at least 2"),
    (("--steps", 0), "steps is 0; give at least 1"),
    (("--scores", "inception"), "see bksdm sensitivity --help"),
    (("--encoder", "./nowhere"), "encoder ./nowhere does not exist"),
]


@pytest.mark.parametrize(("more", "says"), BAD, ids=[" ".join(map(str, case[0])) for case in BAD])
def test_bad_options_are_refused_in_one_line_before_anything_is_written(
    run: Run, small_folder: Path, pictures: Path, tmp_path: Path, more: tuple[object, ...], says: str
) -> None:
    outcome = run("sensitivity", small_folder, "--data", pictures, "--out", tmp_path / "out", *more)
    assert (outcome.code, outcome.out, len(outcome.said)) == (2, "", 1)
    assert re.search(says, outcome.said[0])
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_kind_is_refused_before_anything_is_written(
    run: Run, pictures: Path, tmp_path: Path
) -> None:
    save_pipeline(build_pipeline(UNET | {"in_channels": 9}), tmp_path / "teacher")
    outcome = run("sensitivity", tmp_path / "teacher", "--data", pictures, "--out", tmp_path / "out", *WORDS)
    assert (outcome.code, len(outcome.said)) == (2, 1)
    assert "give a text-to-image model, not one for inpainting" in outcome.said[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_run_is_refused(run: Run, copied: Path, small_folder: Path, pictures: Path) -> None:
    outcome = run("sensitivity", small_folder, "--data", pictures, "--out", copied, *WORDS, "--seed", 1)
    assert outcome.code == 2
    assert "holds another run (seed: 0 there, 1 now)" in outcome.said[0]
