"""What retraining left of the error that pruning made, by noise level, and on captions that have no pictures."""

import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from bksdm.common.errors import InputError
from bksdm.common.randomness import Draws
from bksdm.data.folder import read_captions
from bksdm.data.pictures import to_pixels
from bksdm.data.prompts import read_prompts
from bksdm.data.source import Source
from bksdm.distill.conditions import Conditions
from bksdm.evaluate import blocks, from_teacher
from bksdm.evaluate.from_teacher import FromTeacher
from bksdm.evaluate.output_error import answered, errors, noise_levels
from bksdm.evaluate.scores import ErrorLeft, Resampling, Weighted
from bksdm.evaluate.sources import Drawn, Sampling
from bksdm.families.recipe import load_recipe
from bksdm.models.drawing import drawing
from bksdm.models.folders import fingerprint
from bksdm.models.pipelines import denoiser, load_denoiser, tokenizing
from bksdm.pruning.inherit import Inheritance, prune_unet
from verbs import Run, copy_pictures, mtimes

pytest_plugins = ["verbs_fixtures", "flow_fixtures"]

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
SCORES = ("output_error", "error_left", "error_left_unseen")


@torch.no_grad()
def test_the_error_at_a_noise_level_is_the_squared_difference_there(
    exported: StableDiffusionPipeline, pictures: Path
) -> None:
    entries = read_captions(pictures)
    student, _ = prune_unet(exported.unet, load_recipe("small"))
    batches = list(answered(exported, entries, levels=4))
    found = torch.stack([errors(network, batches) for network in (student, exported.unet)])
    draws = Draws(0, "output error")
    pixels = torch.stack([to_pixels(entry.open(), 32) for entry in entries])
    latents = Conditions.of(exported).latents({"pixel_values": pixels}, draws)
    texts = exported.text_encoder(torch.stack([tokenizing(exported)(entry.text) for entry in entries]))[0]
    at = draws.also("level 2")
    noise, timesteps = at.normal(latents.shape), 500 + at.integers(250, len(entries))
    noisy = exported.scheduler.add_noise(latents, noise, timesteps)
    ours, theirs = (unet(noisy, timesteps, texts).sample for unet in (student, exported.unet))
    assert found.shape == (2, 8, 4)
    assert torch.allclose(found[0, :, 2].float(), (ours - theirs).square().mean(dim=(1, 2, 3)), rtol=1e-3)
    assert not found[1].any()


@pytest.mark.parametrize("flow_kind", ["z"], indirect=True)
def test_levels_of_a_flow_model_are_those_of_its_shifted_noise(
    flow_teacher: DiffusionPipeline, flow_data: Path
) -> None:
    network = denoiser(flow_teacher)
    student = Inheritance.of(network.config, network.state_dict(), load_recipe("half")).loaded(copy=False)
    found = errors(student, answered(flow_teacher, read_captions(flow_data), levels=3))
    assert found.shape == (6, 3)
    assert (found > 0).all()
    parts = noise_levels(flow_teacher, 3)
    every = torch.cat(parts)
    assert len(every) == 1000
    assert (every.diff() > 0).all()
    assert every[-1] == 1000


def test_some_pictures_are_asked_about_as_among_all(exported: StableDiffusionPipeline, pictures: Path) -> None:
    entries = read_captions(pictures)
    student, _ = prune_unet(exported.unet, load_recipe("small"))
    whole, some = (errors(student, answered(exported, entries, numbers, 2)) for numbers in (None, range(3, 5)))
    assert torch.allclose(some, whole[3:5], rtol=1e-4)


def test_each_level_counts_alike_and_pictures_by_their_weight() -> None:
    own, lost = torch.tensor([[1.0, 1.0], [3.0, 0.0]]), torch.tensor([[2.0, 10.0], [6.0, 0.0]])
    left = ErrorLeft(own, lost, [(0, 499), (500, 999)])
    weights = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 0.0]])
    assert left(weights).tolist() == pytest.approx([(4 / 8 + 1 / 10) / 2, (5 / 10 + 2 / 20) / 2, (3 / 6 + 3 / 30) / 2])
    assert left.to_rows()[1] == {"timesteps": [500, 999], "error": 0.5, "pruned_error": 5.0, "left": pytest.approx(0.1)}


def test_a_student_as_it_was_pruned_has_all_of_the_error_left_in_every_resample() -> None:
    own = torch.rand(20, 10, dtype=torch.float64)
    estimate = Resampling.of(range(20), 50, seed=0).estimate(ErrorLeft(own, own, [(0, 1)] * 10))
    assert (estimate.value, estimate.deviation) == (1, 0)


# The verb


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "unseen.txt"
    path.write_text("blue cat\nred moon\n")
    return path


@pytest.fixture
def retrained(exported_student: Path, tmp_path: Path) -> Path:
    """A student whose weights have moved."""
    folder = Path(shutil.copytree(exported_student, tmp_path / "retrained"))
    tensors = load_file(folder / UNET)
    save_file({name: 0.99 * tensor for name, tensor in tensors.items()}, folder / UNET, {"format": "pt"})
    return folder


def test_evaluate_says_what_is_left_by_noise_and_the_same_again(
    done: Run,
    exported_model: Path,
    exported_student: Path,
    retrained: Path,
    pictures: Path,
    unseen: Path,
    tmp_path: Path,
) -> None:
    models = (f"teacher={exported_model}", f"pruned={exported_student}", f"retrained={retrained}")
    words = ("--reference", copy_pictures(pictures, tmp_path / "reference", 2), "--teacher", exported_model)
    words += ("--unseen", unseen, "--steps", 1, "--latency", 0, "--resamples", 10, "--out", tmp_path / "scores")
    result = done("evaluate", *models, *words, "--scores", *SCORES, "--json").json
    scores: dict[str, Any] = {name: model["scores"] for name, model in result["models"].items()}
    for score in SCORES[1:]:
        assert scores["teacher"][score]["value"] == 0
        assert (scores["pruned"][score]["value"], scores["pruned"][score]["deviation"]) == (1, 0)
        assert scores["retrained"][score]["value"] not in {0, 1}
        assert scores["retrained"][score]["deviation"] > 0
        rows = result["models"]["retrained"]["by_noise"][score]
        assert [row["timesteps"] for row in rows] == [[100 * part, 100 * part + 99] for part in range(10)]
        assert all(row["left"] == pytest.approx(row["error"] / row["pruned_error"]) for row in rows)
        assert sum(row["left"] for row in rows) / 10 == pytest.approx(scores["retrained"][score]["value"])
    page = (tmp_path / "scores" / "report.html").read_text()
    assert "<td>900 to 999</td><td>0.0%</td><td>100.0%</td>" in page
    drawn = tmp_path / "scores" / "unseen" / "pictures"
    assert [entry.text for entry in read_captions(drawn)] == ["blue cat", "red moon"]
    before = mtimes(sorted(drawn.iterdir()))
    again = done("evaluate", models[-1], *words, "--scores", SCORES[-1], "--json").json
    alone, beside = (one["models"]["retrained"] for one in (again, result))
    assert alone["scores"][SCORES[-1]] == beside["scores"][SCORES[-1]]
    assert alone["by_noise"][SCORES[-1]] == beside["by_noise"][SCORES[-1]]
    assert mtimes(sorted(drawn.iterdir())) == before
    lost = (drawn / "00001.png").read_bytes()
    (drawn / "00001.png").unlink()
    (drawn / "metadata.jsonl").write_text("")
    once_more = done("evaluate", models[-1], *words, "--scores", SCORES[-1], "--json").json
    assert once_more["models"]["retrained"]["scores"] == again["models"]["retrained"]["scores"]
    assert (drawn / "00001.png").read_bytes() == lost


def test_a_model_that_was_not_pruned_from_the_teacher_goes_without_unless_it_is_asked_for(
    run: Run,
    exported_model: Path,
    exported_student: Path,
    pictures: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    against = held(exported_student, {"larger": exported_model}, tmp_path / "known", *SCORES[:2])
    assert capfd.readouterr().err.startswith(f"larger has no error_left: student {exported_model} names no recipe")
    assert list(against.outputs(of(pictures, *SCORES[:2]))["larger"]) == ["output_error"]
    words = (
        "--reference",
        pictures,
        "--teacher",
        exported_student,
        "--scores",
        "error_left",
        "--out",
        tmp_path / "asked",
    )
    asked = run("evaluate", f"larger={exported_model}", *words)
    assert asked.code == 2
    assert asked.said[-1].startswith("bksdm: scores has error_left, which larger cannot have: student")
    assert not (tmp_path / "asked").exists()


# What is kept


def held(teacher: Path, models: dict[str, Path], out: Path, *scores: str) -> FromTeacher:
    """Models against their teacher, as in an evaluation in `out`."""
    sampling = Sampling(None, 1, "auto", "cpu")
    students = {
        name: Drawn(str(model), [], drawing(str(model)), sampling, out / name / "pictures")
        for name, model in models.items()
    }
    device = torch.device("cpu")
    return FromTeacher.of(str(teacher), fingerprint(teacher), students, scores, device, asked=False)


def of(pictures: Path, *scores: str, count: int = 2) -> dict[str, Source]:
    return dict.fromkeys(scores, Source(read_captions(pictures)[:count], f"{count} pictures"))


def numbers_of(outputs: dict[str, dict[str, Weighted]]) -> dict[tuple[str, str], Any]:
    """All that reports have of scores, of two pictures by default."""
    return {
        (name, score): found.to_rows() if isinstance(found, ErrorLeft) else found(torch.eye(2)).tolist()
        for name, scores in outputs.items()
        for score, found in scores.items()
    }


def test_errors_are_kept_and_networks_are_not_loaded_for_them_again(
    exported_model: Path,
    exported_student: Path,
    retrained: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(from_teacher, "LEVELS", 2)
    teacher = Path(shutil.copytree(exported_model, tmp_path / "teacher"))
    models = {"teacher": teacher, "pruned": exported_student, "retrained": retrained}
    against, asked = held(teacher, models, tmp_path, *SCORES[:2]), of(pictures, *SCORES[:2])
    first = numbers_of(against.outputs(asked))
    kept = tmp_path / "retrained" / "error_left" / "00000.safetensors"
    before = kept.read_bytes()
    kept.unlink()
    assert numbers_of(against.outputs(asked)) == first
    assert kept.read_bytes() == before
    for folder in (teacher, retrained):
        (folder / UNET).unlink()
    assert numbers_of(against.outputs(asked)) == first


def test_kept_errors_that_are_damaged_or_of_something_else_are_refused(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    against = held(exported_model, {"pruned": exported_student}, tmp_path, "output_error")
    against.outputs(of(pictures, "output_error"))
    kept = tmp_path / "pruned" / "output_error"
    with pytest.raises(InputError, match=r"holds another run \(pictures: '2 pictures' there, '1 pictures' now\)"):
        against.outputs(of(pictures, "output_error", count=1))
    other = held(exported_student, {"pruned": exported_student}, tmp_path, "output_error")
    with pytest.raises(InputError, match=r"output_error holds another run \(teacher: "):
        other.outputs(of(pictures, "output_error"))
    block = kept / "00000.safetensors"
    block.write_bytes(block.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"cannot read {block}: .*; remove it, and give the same command again"):
        against.outputs(of(pictures, "output_error"))


def test_killed_between_models_it_goes_on_with_the_next_and_ends_with_the_same_digits(
    exported_model: Path,
    exported_student: Path,
    retrained: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(BaseException):
        pass

    loaded: list[str] = []
    living: list[weakref.ref[Any]] = []

    def load(model: str, dtype: torch.dtype) -> Any:
        assert not any(network() for network in living), "one network after another"
        if len(loaded) == 3:
            loaded.append("killed")
            raise Killed
        network = load_denoiser(model, dtype)
        loaded.append(Path(model).name)
        living.append(weakref.ref(network))
        return network

    monkeypatch.setattr(blocks, "BLOCK", 1)
    monkeypatch.setattr(from_teacher, "_AT_ONCE", 2)
    monkeypatch.setattr(from_teacher, "LEVELS", 2)
    models, asked = {"a": retrained, "b": exported_student}, of(pictures, "error_left", count=3)
    whole = held(exported_model, models, tmp_path / "whole", "error_left").outputs(asked)
    monkeypatch.setattr(from_teacher, "load_denoiser", load)
    against = held(exported_model, models, tmp_path / "killed", "error_left")
    with pytest.raises(Killed):
        against.outputs(asked)
    assert numbers_of(against.outputs(asked)) == numbers_of(whole)
    a, b = "retrained", exported_student.name
    assert loaded == [a, b, a, "killed", b], "two pictures at once, then the third"


def test_no_embedded_caption_is_seen_in_training_or_held_out() -> None:
    unseen = read_prompts("emoji/unseen")
    assert len(unseen) == len(set(unseen)) == 16
    assert not set(unseen) & {text for split in ("train", "heldout") for text in read_prompts(f"emoji/{split}")}
