"""Several processes on one run, as `accelerate launch` starts them: the same results as one process has."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from bksdm.common.processes import Processes, processes
from bksdm.data.prepared import read_prepared
from verbs import Run, done_here, read_lines

pytest_plugins = ["verbs_fixtures", "flow_fixtures"]

# The processes of a larger model take long to begin.
slow = {"shallow_xl": "xl", "z": "z"}
kinds = pytest.mark.parametrize(
    "kind",
    ["v1", *(pytest.param(name, id=shown, marks=pytest.mark.slow) for name, shown in slow.items())],
    indirect=True,
)

TERMS = ("loss", "task", "output_kd", "feature_kd", "grad_norm")


def start(count: int, *words: object) -> subprocess.Popen[str]:
    """A command line in `count` processes."""
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", str(count)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch += ["--num_cpu_threads_per_process", "1"]
    alone = [sys.executable] if count == 1 else [sys.executable, *launch]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*alone, "-m", "bksdm", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(count: int, *words: object) -> str:
    """What a command line in `count` processes wrote to stdout."""
    process = start(count, *words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def retraining(teacher: Path, student: Path, data: Path, out: Path, batch_size: int) -> list[object]:
    options = {
        "teacher": teacher, "student": student, "data": data, "out": out, "batch_size": batch_size, "steps": 6,
        "accumulation": 2, "lr": 1e-3, "ema_decay": 0.9, "precision": "fp32", "log_every": 1, "sample_every": 3,
        "checkpoint_every": 2,
    }  # fmt: skip
    return ["distill", *(word for name, value in options.items() for word in (f"--{name}", value))]


def losses(out: Path) -> torch.Tensor:
    return torch.tensor([[record[name] for name in TERMS] for record in read_lines(out / "metrics.jsonl")])


def learnt(out: Path) -> dict[str, torch.Tensor]:
    """The weights of the student's U-Net or transformer."""
    (file,) = (file for name in ("unet", "transformer") for file in (out / "student" / name).glob("*.safetensors"))
    return load_file(file)


def assert_near(first: Path, second: Path) -> None:
    """The same losses and the same student, to rounding."""
    assert losses(first).shape == losses(second).shape
    assert torch.allclose(losses(first), losses(second), rtol=1e-4)
    ours, theirs = (learnt(out) for out in (first, second))
    moved = sum(float((tensor - theirs[name]).square().sum()) for name, tensor in ours.items())
    whole = sum(float(tensor.square().sum()) for tensor in theirs.values())
    assert moved < (1e-3) ** 2 * whole


@pytest.fixture(scope="module")
def alone(kind_folder: Path, kind_student: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process. Not to be changed."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done_here(*retraining(kind_folder, kind_student, pictures, out, batch_size=4))
    return out


def test_one_process_is_alone() -> None:
    assert processes() == Processes(0, 1)
    assert processes().main
    assert processes().highest(7) == 7
    assert processes().mean(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_shares_are_the_whole() -> None:
    shares = [Processes(rank, 3).share(range(10)) for rank in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(10))


@kinds
@pytest.mark.slow
def test_two_processes_retrain_as_one_does(
    alone: Path, kind_folder: Path, kind_student: Path, pictures: Path, tmp_path: Path
) -> None:
    out = launch(2, *retraining(kind_folder, kind_student, pictures, tmp_path / "run", batch_size=2))
    assert out.strip() == f"student in {tmp_path / 'run' / 'student'}", "one of them speaks"
    assert_near(tmp_path / "run", alone)


@kinds
@pytest.mark.slow
def test_a_teacher_may_be_spread_over_the_processes(
    alone: Path, kind_folder: Path, kind_student: Path, pictures: Path, tmp_path: Path
) -> None:
    launch(2, *retraining(kind_folder, kind_student, pictures, tmp_path / "run", batch_size=2), "--shard_teacher")
    assert_near(tmp_path / "run", alone)


@kinds
@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_samples(
    alone: Path, kind_folder: Path, kind_student: Path, pictures: Path, tmp_path: Path
) -> None:
    two = start(2, *retraining(kind_folder, kind_student, pictures, tmp_path / "run", batch_size=2))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    while two.poll() is None and not checkpoint.exists():
        time.sleep(0.02)
    two.send_signal(signal.SIGTERM)
    two.communicate(timeout=300)
    assert not (tmp_path / "run" / "student").exists()
    launch(1, *retraining(kind_folder, kind_student, pictures, tmp_path / "run", batch_size=4))
    assert_near(tmp_path / "run", alone)


@kinds
@pytest.mark.slow
def test_two_processes_prepare_the_data_that_one_does(
    done: Run, kind_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ["prepare", pictures, "--teacher", kind_folder, "--shard_size", 2, "--text_embeddings", "--workers", 0]
    done(*words, "--out", tmp_path / "1")
    launch(2, *words, "--out", tmp_path / "2")
    one, two = (sorted((tmp_path / str(count)).glob("*.arrow")) for count in (1, 2))
    assert len(one) == 4
    assert [path.name for path in one] == [path.name for path in two]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert read_prepared(tmp_path / "1") == read_prepared(tmp_path / "2")


@pytest.mark.slow
def test_two_processes_generate_what_one_does(v1_folder: Path, tmp_path: Path) -> None:
    words = ["generate", v1_folder, "--prompt", *(f"{number} apples" for number in range(5)), "--steps", 3]
    said = [launch(count, *words, "--out", tmp_path / str(count)) for count in (1, 2)]
    assert [text.split()[0] for text in said] == ["5", "5"]
    one, two = (sorted((tmp_path / str(count)).glob("*.png")) for count in (1, 2))
    assert [path.name for path in one] == [path.name for path in two]
    for first, second in zip(one, two, strict=True):
        with Image.open(first) as ours, Image.open(second) as theirs:
            assert max(high for _, high in ImageChops.difference(ours, theirs).getextrema()) <= 1
    assert (tmp_path / "1" / "metadata.jsonl").read_text() == (tmp_path / "2" / "metadata.jsonl").read_text()


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "unseen.txt").write_text("blue cat\nred moon\n")
    words = [
        "evaluate",
        f"mine={v1_student}",
        "--teacher",
        v1_folder,
        "--unseen",
        tmp_path / "unseen.txt",
        "--reference",
        pictures,
        "--encoder",
        "emoji",
        "--steps",
        1,
        "--latency",
        0,
    ]
    of_outputs = ("output_error", "error_left", "error_left_unseen")
    words += ["--images_per_prompt", 20, "--scores", "frechet_distance", "clip_score", *of_outputs, "--json"]
    one, two = (json.loads(launch(count, *words, "--out", tmp_path / str(count))) for count in (1, 2))
    for score, ours in one["models"]["mine"]["scores"].items():
        assert two["models"]["mine"]["scores"][score]["value"] == pytest.approx(ours["value"], rel=1e-3)
    blocks = [sorted((tmp_path / count / "models" / "mine" / "features").iterdir()) for count in ("1", "2")]
    assert [path.name for path in blocks[0]] == [path.name for path in blocks[1]]
    assert len(blocks[0]) == 3
    for name in ("00000.png", "00064.png", "00159.png"):
        files = (tmp_path / count / "models" / "mine" / "pictures" / name for count in ("1", "2"))
        with contextlib.ExitStack() as opened:
            ours, theirs = (opened.enter_context(Image.open(file)) for file in files)
            assert max(high for _, high in ImageChops.difference(ours, theirs).getextrema()) <= 1


@pytest.mark.slow
def test_an_error_is_said_by_each_that_has_it(v1_folder: Path, tmp_path: Path) -> None:
    process = start(2, "generate", v1_folder, "--prompt", "a", "--steps", 0, "--out", tmp_path / "out")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "steps is 0; give at least 1" in err
