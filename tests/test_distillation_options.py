"""`bksdm distill` with what goes beyond the paper's loss: end to end, resumed, and as its page says."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bksdm.cli import options_of, parse
from bksdm.common.errors import InputError
from bksdm.data.prepare import prepare
from bksdm.distill.run import distill
from bksdm.options.data import PrepareOptions
from bksdm.options.distill import DistillOptions
from verbs import read_lines

pytest_plugins = ["verbs_fixtures"]
pytestmark = pytest.mark.usefixtures("without_charts")

PAGE = (Path(__file__).parent.parent / "docs" / "distillation-options.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
CHOICES: dict[str, object] = {
    "feature_decay": True,
    "taps": "both",
    "normalize_features": True,
    "mask_features": 2.0,
    "guided_output": 3.0,
    "caption_dropout": 0.2,
    "random_conditioning": 2.0,
    "cutmix": 0.5,
}
Folders = tuple[Path, Path, Path]


def retrained(folders: Folders, out: Path, **changes: object) -> list[dict[str, float]]:
    """The records of a short run."""
    settings: dict[str, object] = {"steps": 4, "batch_size": 2, "accumulation": 1, "lr": 1e-3, "ema_decay": 0.9}
    settings |= {"precision": "fp32", "teacher_precision": "fp32", "log_every": 1, "sample_every": 0}
    settings |= {"checkpoint_every": 2}
    distill(DistillOptions(*map(str, folders), str(out), **settings | changes))
    return read_lines(out / "metrics.jsonl")


def losses(records: list[dict[str, float]]) -> torch.Tensor:
    names = [name for name in records[0] if name.startswith("tap/")]
    return torch.tensor([[record[name] for name in (*names, "loss", "task", "output_kd")] for record in records])


@pytest.fixture(scope="module")
def folders(exported_model: Path, exported_student: Path, pictures: Path) -> Folders:
    """Teacher, student and data. Shared by all tests: not to be changed."""
    return exported_model, exported_student, pictures


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Every choice."""
    pool = tmp_path_factory.mktemp("pool") / "captions.txt"
    pool.write_text("red car\ngreen car\ngreen apple\nred car\n")
    return CHOICES | {"caption_pool": str(pool)}


@pytest.fixture(scope="module")
def finished(folders: Folders, choices: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every choice. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    retrained(folders, out, **choices)
    return out


def test_all_choices_go_together(finished: Path) -> None:
    for step, record in enumerate(read_lines(finished / "metrics.jsonl")):
        taps = [value for name, value in record.items() if name.startswith("tap/")]
        assert len(taps) == 4 + 3
        assert sum(taps) == pytest.approx(record["feature_kd"], rel=1e-5)
        terms = record["task"] + record["output_kd"] + record["guided_kd"] + (1 - step / 4) * record["feature_kd"]
        assert record["loss"] == pytest.approx(terms, rel=1e-5)
    assert "guided_kd" in (finished / "report.html").read_text()


def test_a_run_with_every_choice_goes_on_to_the_same_bits(
    finished: Path, folders: Folders, choices: dict[str, object], tmp_path: Path
) -> None:
    run, last = tmp_path / "run", Path("checkpoints", "step-00000004", "tensors.safetensors")
    shutil.copytree(finished, run)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(finished), str(run)))
    shutil.rmtree((run / last).parent)
    shutil.rmtree(run / "student")
    records = retrained(folders, run, **choices)
    assert torch.equal(losses(records), losses(read_lines(finished / "metrics.jsonl")))
    whole = load_file(finished / last)
    assert all(torch.equal(value, whole[name]) for name, value in load_file(run / last).items())


def test_a_run_by_muon_says_so(folders: Folders, tmp_path: Path) -> None:
    retrained(folders, tmp_path / "run", steps=1, optimizer="muon")
    assert "- optimizer: muon\n" in (tmp_path / "run" / "student" / "README.md").read_text()


def test_steps_may_not_change_where_they_decide_how_a_weight_falls(
    finished: Path, folders: Folders, choices: dict[str, object]
) -> None:
    with pytest.raises(InputError, match=r"steps: 4 there, 8 now"):
        retrained(folders, finished, steps=8, **choices)


def test_a_pool_of_other_captions_makes_another_run(
    finished: Path, folders: Folders, choices: dict[str, object], tmp_path: Path
) -> None:
    pool, kept = Path(str(choices["caption_pool"])), tmp_path / "kept"
    pool.rename(kept)
    pool.write_text("a blue whale\n")
    try:
        with pytest.raises(InputError, match=r"holds another run \(the content of pool has changed"):
            retrained(folders, finished, **choices)
    finally:
        kept.replace(pool)


def test_the_card_names_what_is_not_the_papers(finished: Path, choices: dict[str, object]) -> None:
    card = (finished / "student" / "README.md").read_text()
    for name, value in choices.items():
        assert f"- {name}: {value}\n" in card


@pytest.mark.parametrize(("choice", "value"), [("random_conditioning", 0.0), ("cutmix", 1.0)])
def test_a_run_with_none_but_pictures_of_other_captions_has_no_task_loss(
    folders: Folders, tmp_path: Path, choice: str, value: float
) -> None:
    (record,) = retrained(folders, tmp_path / "run", steps=1, **{choice: value})
    assert record["task"] == 0 < record["output_kd"]
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert [name for name in CHOICES if name in card] == [choice], "what is the paper's goes unsaid"


@pytest.mark.parametrize("embedded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_prepared_latents_and_a_pool_that_is_not_kept_teach_the_same(
    finished: Path, folders: Folders, choices: dict[str, object], tmp_path: Path, embedded: bool
) -> None:
    teacher, student, pictures = folders
    made = str(tmp_path / "latents")
    prepare(PrepareOptions(str(pictures), str(teacher), made, text_embeddings=embedded, workers=0))
    records = retrained((teacher, student, Path(made)), tmp_path / "run", cache_gb=0.0, **choices)
    assert torch.allclose(losses(records), losses(read_lines(finished / "metrics.jsonl")), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_batches_may_be_split_as_one_likes(
    finished: Path, folders: Folders, choices: dict[str, object], tmp_path: Path
) -> None:
    records = retrained(folders, tmp_path / "run", **choices | {"batch_size": 1, "accumulation": 2})
    assert torch.allclose(losses(records), losses(read_lines(finished / "metrics.jsonl")), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_captions_of_the_data_are_the_pool_by_default(folders: Folders, tmp_path: Path) -> None:
    captions = shutil.copy(folders[2] / "metadata.jsonl", tmp_path / "captions.jsonl")
    own = retrained(folders, tmp_path / "own", random_conditioning=0.5)
    given = retrained(folders, tmp_path / "given", random_conditioning=0.5, caption_pool=str(captions))
    assert torch.equal(losses(own), losses(given))


# The page


def test_the_page_names_every_choice() -> None:
    assert not [name for name in (*CHOICES, "caption_pool") if f"`--{name}" not in PAGE]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_understood(command: str) -> None:
    program, verb, *given = shlex.split(command, comments=True)
    assert program == "bksdm"
    parse(options_of(verb), verb, given)
