"""`bksdm distill` with what goes beyond the paper's loss: end to end, resumed, foreseen, and as its page says."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bksdm.cli import VERBS, parse
from bksdm.distill.run import distill
from bksdm.errors import InputError
from bksdm.options import DistillOptions, PrepareOptions
from bksdm.prepare import prepare
from verbs import read_lines

pytest_plugins = ["verbs_fixtures"]

PAGE = (Path(__file__).parent.parent / "docs" / "distillation-options.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
CHOICES = {
    "feature_decay": True,
    "taps": "both",
    "normalize_features": True,
    "mask_features": 2.0,
    "guided_output": 3.0,
    "caption_dropout": 0.2,
    "random_conditioning": 2.0,
}


def settings(
    teacher: Path, student: Path, data: Path, out: Path | str = "nowhere", **changes: object
) -> DistillOptions:
    small: dict[str, object] = {"steps": 4, "batch_size": 2, "accumulation": 1, "lr": 1e-3, "ema_decay": 0.9}
    small |= {"precision": "fp32", "teacher_precision": "fp32", "log_every": 1, "sample_every": 0}
    distill(DistillOptions(str(teacher), str(student), str(data), str(out), **small | changes))
    return read_lines(out / "metrics.jsonl")


def weights(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "tensors.safetensors")


def losses(records: list[dict[str, float]]) -> torch.Tensor:
    names = [name for name in records[0] if name.startswith("tap/")] + ["loss", "task", "output_kd", "feature_kd"]
    return torch.tensor([[record[name] for name in names] for record in records])


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pool") / "captions.txt"
    file.write_text("red car\ngreen car\ngreen apple\nred car\n")
    return file


@pytest.fixture(scope="module")
def finished(
    v1_folder: Path, v1_student: Path, pictures: Path, pool: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with every choice. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    retrained(v1_folder, v1_student, pictures, out, checkpoint_every=2, caption_pool=str(pool), **CHOICES)
    return out


def test_all_choices_go_together(finished: Path) -> None:
    records = read_lines(finished / "metrics.jsonl")
    for step, record in enumerate(records):
        taps = [value for name, value in record.items() if name.startswith("tap/")]
        assert len(taps) == 8 + 9
        assert sum(taps) == pytest.approx(record["feature_kd"], rel=1e-5)
        terms = record["task"] + record["output_kd"] + record["guided_kd"] + (1 - step / 4) * record["feature_kd"]
        assert record["loss"] == pytest.approx(terms, rel=1e-5)
    assert (finished / "report.html").is_file()


def test_a_run_with_every_choice_goes_on_to_the_same_bits(
    finished: Path, v1_folder: Path, v1_student: Path, pictures: Path, pool: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(run / "student")
    config = (run / "config.yaml").read_text().replace(str(finished), str(run))
    (run / "config.yaml").write_text(config)
    records = retrained(v1_folder, v1_student, pictures, run, checkpoint_every=2, caption_pool=str(pool), **CHOICES)
    assert torch.equal(losses(records), losses(read_lines(finished / "metrics.jsonl")))
    whole = weights(finished)
    assert all(torch.equal(value, whole[name]) for name, value in weights(run).items())


def test_steps_that_decide_how_the_weight_falls_may_not_change(
    finished: Path, v1_folder: Path, v1_student: Path, pictures: Path, pool: Path
) -> None:
    with pytest.raises(InputError, match=r"steps: 4 there, 8 now"):
        retrained(
            v1_folder, v1_student, pictures, finished, steps=8, checkpoint_every=2, caption_pool=str(pool), **CHOICES
        )


def test_a_pool_with_other_captions_is_another_run(
    finished: Path, v1_folder: Path, v1_student: Path, pictures: Path, pool: Path
) -> None:
    before = pool.read_text()
    try:
        pool.write_text("a blue whale\n")
        with pytest.raises(InputError, match=r"holds another run \(pool_content"):
            retrained(v1_folder, v1_student, pictures, finished, checkpoint_every=2, caption_pool=str(pool), **CHOICES)
    finally:
        pool.write_text(before)


def test_the_card_names_what_is_not_the_papers(finished: Path, pool: Path) -> None:
    card = (finished / "student" / "README.md").read_text()
    for name, value in (CHOICES | {"caption_pool": pool}).items():
        assert f"- {name}: {value}\n" in card


@pytest.mark.parametrize("embedded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_prepared_latents_learn_the_same(
    finished: Path, v1_folder: Path, v1_student: Path, pictures: Path, pool: Path, tmp_path: Path, embedded: bool
) -> None:
    prepare(PrepareOptions(str(pictures), str(v1_folder), str(tmp_path / "d"), text_embeddings=embedded, workers=0))
    changes = CHOICES | {"caption_pool": str(pool), "cache_gb": 0.0}
    records = retrained(v1_folder, v1_student, tmp_path / "d", tmp_path / "run", **changes)
    assert torch.allclose(losses(records), losses(read_lines(finished / "metrics.jsonl")), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_batches_may_be_split_as_one_likes(
    finished: Path, v1_folder: Path, v1_student: Path, pictures: Path, pool: Path, tmp_path: Path
) -> None:
    changes = CHOICES | {"caption_pool": str(pool), "batch_size": 1, "accumulation": 2}
    records = retrained(v1_folder, v1_student, pictures, tmp_path / "run", **changes)
    assert torch.allclose(losses(records), losses(read_lines(finished / "metrics.jsonl")), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_captions_of_the_data_are_the_pool_by_default(
    v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path
) -> None:
    captions = tmp_path / "captions.jsonl"
    captions.write_bytes((pictures / "metadata.jsonl").read_bytes())
    runs = [
        losses(
            retrained(
                v1_folder, v1_student, pictures, tmp_path / str(number), random_conditioning=0.5, caption_pool=pool
            )
        )
        for number, pool in enumerate((None, str(captions)))
    ]
    assert torch.equal(*runs)


def test_a_run_with_none_but_replaced_captions_has_no_task_loss(
    v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path
) -> None:
    (record,) = retrained(v1_folder, v1_student, pictures, tmp_path / "run", steps=1, random_conditioning=0.0)
    assert (record["task"], record["output_kd"] > 0) == (0.0, True)
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert [name for name in CHOICES if name in card] == ["random_conditioning"], "what is the paper's goes unsaid"


# The page


def test_the_page_names_every_choice() -> None:
    assert not [name for name in (*CHOICES, "caption_pool") if f"`--{name}" not in PAGE]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_understood(command: str) -> None:
    program, verb, *given = shlex.split(command, comments=True)
    assert program == "bksdm"
    parse(VERBS[verb][0], verb, given)
