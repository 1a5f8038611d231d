"""`bksdm distill` end to end: what a run leaves, that it learns, and that it resumes to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bksdm.common.errors import InputError
from bksdm.distill.run import distill
from bksdm.options.distill import DistillOptions
from bksdm.pruning.told import read_recipe
from fast import slow
from tiny_models import PICTURE
from verbs import Run, copy_pictures, done_here, make_student, read_lines

pytest_plugins = ["verbs_fixtures"]
pytestmark = pytest.mark.usefixtures("without_charts")

UNET = Path("student", "unet", "diffusion_pytorch_model.safetensors")
TERMS = ("loss", "task", "output_kd", "feature_kd")


def retrain(teacher: Path, student: Path, data: Path, out: Path, **changes: object) -> list[dict[str, float]]:
    """The records of a short run."""
    settings: dict[str, object] = {
        "steps": 4,
        "batch_size": 4,
        "accumulation": 1,
        "lr": 1e-3,
        "ema_decay": 0.9,
        "precision": "fp32",
        "teacher_precision": "fp32",
        "log_every": 1,
        "sample_every": 0,
    }
    settings |= changes
    distill(DistillOptions(str(teacher), str(student), str(data), str(out), **settings))
    return read_lines(out / "metrics.jsonl")


def losses(records: list[dict[str, float]]) -> torch.Tensor:
    return torch.tensor([[record[name] for name in TERMS] for record in records])


@pytest.fixture(scope="module")
def finished(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of four steps with sample grids. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    retrain(exported_model, exported_student, pictures, out, sample_every=2, checkpoint_every=2)
    return out


def test_a_run_leaves_its_config_its_losses_its_grids_and_the_student(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml",
        "provenance.json",
        "metrics.jsonl",
        "tensorboard",
        "samples",
        "checkpoints",
        "student",
    }
    assert [path.name for path in sorted((finished / "samples").iterdir())] == [
        f"step-{step:08d}.png" for step in (0, 2, 4)
    ]
    assert any("tfevents" in path.name for path in (finished / "tensorboard").iterdir())


def test_each_record_has_every_loss_and_every_tap(finished: Path) -> None:
    records = read_lines(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        taps = [value for name, value in record.items() if name.startswith("tap/")]
        assert len(taps) == 4
        assert sum(taps) == pytest.approx(record["feature_kd"], rel=1e-5)
        assert record["task"] + record["output_kd"] + record["feature_kd"] == pytest.approx(record["loss"], rel=1e-5)


def test_the_resolved_options_are_kept(finished: Path, exported_model: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert (config["verb"], config["teacher"], config["out"]) == ("distill", str(exported_model), str(finished))
    assert (config["steps"], config["warmup"], config["flip"]) == (4, 0, True)


def test_tensorboard_shows_the_same(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    for record in read_lines(finished / "metrics.jsonl"):
        for name in TERMS:
            shown = {event.step: event.value for event in events.Scalars(name)}
            assert shown[record["step"]] == pytest.approx(record[name], rel=1e-6)


def test_grids_show_the_teacher_that_stays_and_the_student_that_changes(finished: Path) -> None:
    first, last = (Image.open(finished / "samples" / f"step-{step:08d}.png").convert("RGB") for step in (0, 4))
    width, height = first.size
    assert width > 2 * PICTURE
    assert height > 4 * PICTURE
    left, right = (0, 0, PICTURE, height), (width - PICTURE, 0, width, height)
    assert first.crop(left).tobytes() == last.crop(left).tobytes()
    assert first.crop(right).tobytes() != last.crop(right).tobytes()


def test_only_the_unet_was_trained(finished: Path, exported_model: Path, exported_student: Path) -> None:
    student, before = finished / "student", load_file(exported_student / "unet" / UNET.name)
    assert load_file(finished / UNET).keys() == before.keys()
    assert not all(torch.equal(value, before[name]) for name, value in load_file(finished / UNET).items())
    assert {value.dtype for value in load_file(finished / UNET).values()} == {torch.float32}
    for part in ("vae", "text_encoder"):
        (weights,) = (student / part).glob("*.safetensors")
        wanted = load_file(exported_model / part / weights.name)
        assert all(torch.equal(value, wanted[name]) for name, value in load_file(weights).items())


def test_the_same_command_leaves_a_finished_run_as_it_is(
    exported_model: Path, exported_student: Path, pictures: Path, finished: Path
) -> None:
    kept = [finished / "metrics.jsonl", finished / "samples" / "step-00000004.png", finished / UNET]
    before = [path.read_bytes() for path in kept]
    retrain(exported_model, exported_student, pictures, finished, sample_every=2, checkpoint_every=2)
    assert [path.read_bytes() for path in kept] == before


def test_the_student_goes_on_to_the_next_verbs(done: Run, finished: Path, exported_model: Path, tmp_path: Path) -> None:
    student = finished / "student"
    done("generate", student, "--prompt", "red", "--steps", 1, "--out", tmp_path / "pictures")
    params = done("describe", student, "--json").json["unet"]["params"]
    assert (
        done("describe", exported_model, "--recipe", student / "recipe.yaml", "--json").json["unet"]["params"] == params
    )


def test_the_student_is_a_stock_pipeline_with_recipe_and_card(finished: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(finished / "student")
    assert pipeline.unet.config.layers_per_block == 1
    assert pipeline.unet.config.mid_block_type is None
    assert read_recipe(finished / "student").name == "small"
    assert "Retraining" in (finished / "student" / "README.md").read_text()


def test_the_student_has_the_averaged_weights(finished: Path) -> None:
    held = load_file(sorted((finished / "checkpoints").iterdir())[-1] / "tensors.safetensors")
    student = load_file(finished / UNET)
    assert all(torch.equal(value, held[f"ema.{name}"]) for name, value in student.items())
    assert any(not torch.equal(value, held[f"model.{name}"]) for name, value in student.items())


def test_without_an_average_the_student_has_the_last_weights(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    retrain(exported_model, exported_student, pictures, tmp_path / "run", steps=1, ema_decay=0.0)
    held = load_file(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "tensors.safetensors")
    assert all(torch.equal(value, held[f"model.{name}"]) for name, value in load_file(tmp_path / "run" / UNET).items())


@pytest.mark.parametrize("family", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_losses_fall(family: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    teacher, student = request.getfixturevalue(f"{family}_folder"), request.getfixturevalue(f"{family}_student")
    records = losses(retrain(teacher, student, pictures, tmp_path / "run", steps=60))
    first, last = records[:10].mean(dim=0), records[-10:].mean(dim=0)
    assert last[0] < 0.7 * first[0]
    assert last[3] < 0.7 * first[3]


@pytest.mark.parametrize(
    "changes",
    [{"cache_gb": 0.0}, {"gradient_checkpointing": True}],
    ids=["latents that are not kept in memory", "gradient checkpointing"],
)
def test_it_changes_nothing_but_rounding(
    changes: dict[str, object],
    two_steps: list[dict[str, float]],
    exported_model: Path,
    exported_student: Path,
    pictures: Path,
    tmp_path: Path,
) -> None:
    records = retrain(exported_model, exported_student, pictures, tmp_path / "run", steps=2, **changes)
    assert torch.allclose(losses(records), losses(two_steps), rtol=1e-4)


@pytest.mark.slow
def test_nor_do_latents_kept_in_memory_where_nothing_is_mirrored(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    runs = [
        retrain(exported_model, exported_student, pictures, tmp_path / str(gb), steps=2, flip=False, cache_gb=gb)
        for gb in (0.0, 4.0)
    ]
    assert torch.allclose(losses(runs[0]), losses(runs[1]), rtol=1e-4)


@pytest.mark.slow
def test_bfloat16_is_near_float32(exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path) -> None:
    full = retrain(exported_model, exported_student, pictures, tmp_path / "fp32")
    half = retrain(
        exported_model, exported_student, pictures, tmp_path / "bf16", precision="bf16", teacher_precision="bf16"
    )
    assert torch.allclose(losses(full), losses(half), rtol=0.05, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "teacher_precision"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_every_mix_of_precisions_trains_and_draws(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path, precision: str, teacher_precision: str
) -> None:
    mix = {"precision": precision, "teacher_precision": teacher_precision}
    records = retrain(exported_model, exported_student, pictures, tmp_path / "run", steps=1, sample_every=1, **mix)
    assert losses(records).isfinite().all()
    assert {value.dtype for value in load_file(tmp_path / "run" / UNET).values()} == {torch.float32}


@pytest.mark.slow
def test_the_seed_decides(exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path) -> None:
    first, other = (
        losses(retrain(exported_model, exported_student, pictures, tmp_path / str(seed), steps=1, seed=seed))
        for seed in (1, 2)
    )
    assert not torch.equal(first, other)


def test_the_loss_is_the_weighted_sum(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    weights = {"task_weight": 0.0, "output_weight": 2.0, "feature_weight": 0.5}
    (record,) = retrain(exported_model, exported_student, pictures, tmp_path / "run", steps=1, **weights)
    assert record["task"] > 0
    assert record["loss"] == pytest.approx(2 * record["output_kd"] + 0.5 * record["feature_kd"], rel=1e-5)


@pytest.mark.slow
def test_pictures_may_have_another_size_than_the_teachers(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    small, large = (
        losses(retrain(exported_model, exported_student, pictures, tmp_path / str(side), steps=1, resolution=side))
        for side in (PICTURE, 2 * PICTURE)
    )
    assert not torch.equal(small, large)


@pytest.mark.slow
def test_prompts_of_the_grids_may_be_given(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("red apple\ngreen car\n")
    prompts = {"sample_every": 1, "sample_prompts": str(tmp_path / "prompts.txt")}
    retrain(exported_model, exported_student, pictures, tmp_path / "run", steps=1, **prompts)
    with Image.open(tmp_path / "run" / "samples" / "step-00000001.png") as grid:
        assert 2 * PICTURE <= grid.height < 3 * PICTURE


def test_the_newest_checkpoints_stay_and_no_grids_are_drawn_unasked(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    retrain(exported_model, exported_student, pictures, tmp_path / "run", checkpoint_every=1, keep_checkpoints=2)
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000003", "step-00000004"]
    assert not (tmp_path / "run" / "samples").exists()


def test_a_loss_that_blows_up_is_a_failure_with_advice(
    run: Run, exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    outcome = run(
        "distill", exported_model, "--student", exported_student, "--data", pictures, "--out", tmp_path / "run",
        *("--steps", 9, "--batch_size", 2, "--accumulation", 1, "--sample_every", 0, "--lr", 1e30),
    )  # fmt: skip
    assert (outcome.code, outcome.out) == (1, "")
    assert [line for line in outcome.said if "try a lower learning rate or fp32" in line] == outcome.said
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.slow
def test_more_steps_by_the_same_command_go_on(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    whole = retrain(exported_model, exported_student, pictures, tmp_path / "whole", steps=4)
    retrain(exported_model, exported_student, pictures, tmp_path / "parts", steps=2)
    parts = retrain(exported_model, exported_student, pictures, tmp_path / "parts", steps=4)
    assert torch.equal(losses(whole), losses(parts))


@pytest.fixture(scope="module")
def two_steps(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, float]]:
    """The records of two steps by the options as they are."""
    return retrain(exported_model, exported_student, pictures, tmp_path_factory.mktemp("two_steps") / "run", steps=2)


@pytest.fixture(scope="module")
def uninterrupted(
    kind_folder: Path, kind_student: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that nothing stopped. Not to be changed."""
    job = _Job(kind_folder, kind_student, pictures, tmp_path_factory.mktemp("uninterrupted") / "run")
    done_here(*job.words)
    return job.out


@pytest.mark.parametrize(
    "kind", ["exported", pytest.param("shallow_xl", id="xl", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.parametrize("workers", [0, slow(1)])
@pytest.mark.parametrize("how", [slow(signal.SIGTERM), signal.SIGKILL])
def test_an_interrupted_run_ends_with_the_same_bits(
    how: signal.Signals,
    workers: int,
    uninterrupted: Path,
    kind_folder: Path,
    pictures: Path,
    kind_student: Path,
    tmp_path: Path,
) -> None:
    interrupted = _Job(kind_folder, kind_student, pictures, tmp_path / "interrupted", workers)
    assert interrupted.run(kill=how, after=3) == (143 if how == signal.SIGTERM else -how)
    stopped_at = max(int(path.name.removeprefix("step-")) for path in (interrupted.out / "checkpoints").glob("step-*"))
    if how == signal.SIGTERM:
        message = f"bksdm: stopped at step {stopped_at}; the same command goes on from there"
        assert interrupted.said.splitlines()[-1] == message
    assert not (interrupted.out / "student").exists()
    done_here(*interrupted.words)

    for part in (UNET, Path("checkpoints", f"step-{_Job.steps:08d}", "tensors.safetensors")):
        ours, theirs = load_file(interrupted.out / part), load_file(uninterrupted / part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    resumed, whole = (read_lines(out / "metrics.jsonl") for out in (interrupted.out, uninterrupted))
    assert [record["step"] for record in resumed] == list(range(1, _Job.steps + 1))
    assert torch.equal(losses(resumed), losses(whole))
    assert [record["lr"] for record in resumed] == [record["lr"] for record in whole]


class _Job:
    """`python -m bksdm distill` as a process of its own."""

    steps = 8

    def __init__(self, teacher: Path, student: Path, data: Path, out: Path, workers: int = 0) -> None:
        self.out = out
        self.said = ""
        options = {
            "teacher": teacher,
            "student": student,
            "data": data,
            "out": out,
            "steps": self.steps,
            "batch_size": 2,
            "accumulation": 2,
            "lr": 1e-3,
            "warmup": 3,
            "cosine": "true",
            "ema_decay": 0.9,
            "log_every": 1,
            "sample_every": 0,
            "checkpoint_every": 2,
            "workers": workers,
            "cache_gb": 0,
        }
        self.words = ["distill", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]

    def run(self, kill: signal.Signals, after: int) -> int:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "bksdm", *self.words], env=environment, stderr=subprocess.PIPE, text=True
        )
        self._wait_for(after, process)
        process.send_signal(kill)
        _, self.said = process.communicate(timeout=300)
        assert process.returncode in (143, -signal.SIGKILL), self.said
        return process.returncode

    def _wait_for(self, records: int, process: subprocess.Popen[str]) -> None:
        metrics = self.out / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < records:
            assert process.poll() is None, "it ended before it could be interrupted"
            time.sleep(0.02)


def test_the_command_line_names_the_student(
    done: Run, exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    said = done(
        "distill", exported_model, "--student", exported_student, "--data", pictures, "--out", out,
        *("--steps", 1, "--batch_size", 2, "--accumulation", 1, "--sample_every", 0),
    )  # fmt: skip
    assert said.out.strip() == f"student in {out / 'student'}"


def test_a_tiny_student_learns_with_its_inner_tap(
    v1_teacher: StableDiffusionPipeline, v1_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    student = make_student(v1_teacher, tmp_path / "tiny", "tiny")
    records = retrain(v1_folder, student, pictures, tmp_path / "run", steps=8, gradient_checkpointing=True)
    assert "tap/down_blocks.2.attentions.0.proj_out" in records[0]
    assert losses(records)[-3:, 0].mean() < losses(records)[:3, 0].mean()


def test_fewer_steps_than_are_done_are_refused(
    finished: Path, exported_model: Path, exported_student: Path, pictures: Path
) -> None:
    config = (finished / "config.yaml").read_bytes()
    with pytest.raises(InputError, match=r"steps is 2, and the run in .* has done 4"):
        retrain(exported_model, exported_student, pictures, finished, sample_every=2, checkpoint_every=2, steps=2)
    assert (finished / "config.yaml").read_bytes() == config


def test_more_steps_than_a_cosine_was_made_for_are_refused(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    retrain(exported_model, exported_student, pictures, tmp_path / "run", steps=2, cosine=True)
    with pytest.raises(InputError, match=r"steps: 2 there, 4 now"):
        retrain(exported_model, exported_student, pictures, tmp_path / "run", steps=4, cosine=True)


def test_data_that_changed_are_refused(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    data = copy_pictures(pictures, tmp_path / "data", 8)
    retrain(exported_model, exported_student, data, tmp_path / "run", steps=1)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match="the content of data has changed since"):
        retrain(exported_model, exported_student, data, tmp_path / "run", steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("teacher_precision", ["fp32", "bf16"])
def test_latents_kept_in_memory_change_nothing_in_low_precision(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path, teacher_precision: str
) -> None:
    """The frozen networks compute in their own number format, whatever the student's is."""
    kept, made = (
        retrain(
            exported_model,
            exported_student,
            pictures,
            tmp_path / str(cache),
            steps=1,
            precision="bf16",
            teacher_precision=teacher_precision,
            cache_gb=cache,
            flip=False,
        )
        for cache in (1, 0)
    )
    assert torch.allclose(losses(kept), losses(made), rtol=1e-5)


@pytest.mark.slow
def test_a_precise_teacher_is_precise_beside_a_student_in_low_precision(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = {"steps": 1, "lr": 0.0, "flip": False, "teacher_precision": "fp32"}
    own = {
        precision: retrain(
            exported_model, exported_student, pictures, tmp_path / precision, precision=precision, **settings
        )
        for precision in ("fp32", "bf16")
    }
    coarse = retrain(
        exported_model,
        exported_student,
        pictures,
        tmp_path / "coarse",
        precision="bf16",
        **settings | {"teacher_precision": "bf16"},
    )
    exact, mixed, both = (losses(records) for records in (own["fp32"], own["bf16"], coarse))
    assert not torch.equal(mixed, both)
    assert torch.allclose(exact, mixed, rtol=0.05)


def test_a_finished_run_is_left_as_it_is(
    exported_model: Path, exported_student: Path, pictures: Path, tmp_path: Path
) -> None:
    retrain(exported_model, exported_student, pictures, tmp_path / "run", steps=1)
    card = tmp_path / "run" / "student" / "README.md"
    card.write_text(card.read_text() + "My own words.")
    retrain(exported_model, exported_student, pictures, tmp_path / "run", steps=1)
    assert card.read_text().endswith("My own words.")
    retrain(exported_model, exported_student, pictures, tmp_path / "run", steps=2)
    assert "- steps: 2\n" in card.read_text()


def test_the_card_tells_of_the_training_and_of_no_folder(finished: Path, pictures: Path) -> None:
    card = (finished / "student" / "README.md").read_text()
    assert "- lr: 0.001\n" in card
    assert str(pictures) not in card


def test_the_provenance_says_what_was_chosen(finished: Path) -> None:
    provenance = json.loads((finished / "provenance.json").read_text())
    assert (provenance["device"], provenance["precision"]) == ("cpu", "torch.float32")
