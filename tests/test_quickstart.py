"""The quickstart on fewer pictures, and its page."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bksdm.common.assets import asset
from bksdm.options.distill import DistillOptions
from bksdm.options.evaluate import EvaluateOptions
from bksdm.options.pruning import PruneOptions
from bksdm.options.quickstart import QuickstartOptions
from bksdm.quickstart import run as story
from verbs import copy_pictures, mtimes

PICTURES = 2
MODELS = ("teacher", "pruned", "repaired", "retrained")


@pytest.fixture(scope="module")
def _small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same story on a few pictures in place of hundreds, and with fewer denoising steps."""
    heldout = copy_pictures(asset("emoji", "art", "heldout"), tmp_path_factory.mktemp("art") / "heldout", PICTURES)
    unseen = tmp_path_factory.mktemp("captions") / "unseen.txt"
    unseen.write_text("dog and key, flat style\n")
    original, whole, repairing = story.distillation, story._evaluation, story.repairing

    def reparation(options: QuickstartOptions, out: Path) -> PruneOptions:
        return dataclasses.replace(repairing(options, out), repair=str(heldout), repair_pictures=2)

    def distillation(options: QuickstartOptions, out: Path) -> DistillOptions:
        return dataclasses.replace(original(options, out), data=str(heldout), batch_size=PICTURES, sample_every=0)

    def evaluation(models: dict[str, str], folders: object) -> EvaluateOptions:
        return dataclasses.replace(whole(models, folders), steps=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "HELD_OUT", str(heldout))
        patch.setattr(story, "UNSEEN", str(unseen))
        patch.setattr(story, "_evaluation", evaluation)
        patch.setattr(story, "_LATENCY_ROUNDS", 1)
        patch.setattr(story, "distillation", distillation)
        patch.setattr(story, "repairing", reparation)
        yield


@pytest.fixture(scope="module")
def finished(_small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart of two steps. Not to be changed."""
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return story.quickstart(QuickstartOptions(out=str(out), recipe="tiny", steps=2)).parent


@pytest.mark.slow  # test_evaluate.py and test_distill_run.py ask the same of the verbs
@pytest.mark.usefixtures("_small")
def test_the_same_command_makes_nothing_again(finished: Path) -> None:
    made = sorted(path for path in finished.rglob("*.png") if path.name != "quality.png")
    before, metrics = mtimes(made), (finished / "distill-2" / "metrics.jsonl").read_bytes()
    story.quickstart(QuickstartOptions(out=str(finished), recipe="tiny", steps=2))
    assert mtimes(made) == before
    assert (finished / "distill-2" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.slow
@pytest.mark.usefixtures("_small")
def test_more_steps_show_the_student_after_them(tmp_path: Path) -> None:
    def contents(name: str) -> list[str]:
        page = (tmp_path / "report.html").read_text()
        return re.findall(rf'alt="{name}: [^"]*" src="([^"]*)"', page)

    story.quickstart(QuickstartOptions(out=str(tmp_path), recipe="tiny", steps=1))
    first = {name: contents(name) for name in MODELS}
    story.quickstart(QuickstartOptions(out=str(tmp_path), recipe="tiny", steps=2))
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 2
    for name in ("teacher", "pruned", "repaired"):
        assert contents(name) == first[name]
    assert contents("retrained") != first["retrained"], "the pictures are those of the student before"


def test_the_page_needs_no_other_file(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"#]", page)
    assert "<script" not in page


def test_the_page_shows_real_and_made_pictures_of_every_prompt(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    for name in MODELS:
        assert len(re.findall(rf'alt="{name}: ', page)) == PICTURES
    assert page.count('alt="real"') == PICTURES
    assert "<svg" in page
    assert "down_blocks.0" in page


def test_the_results_hold_what_was_measured(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert set(results["scores"]) == set(MODELS)
    assert results["scores"]["teacher"]["output_error"] == 0
    assert set(results["gap_closed"]) == {"output_error", "error_left", "error_left_unseen", "frechet_distance"}
    for score in ("error_left", "error_left_unseen"):
        assert [results["scores"][name][score] for name in ("teacher", "pruned")] == [0, 1]
    assert set(results["seconds_per_picture"]) == set(MODELS)
    assert results["scores"]["repaired"]["error_left"] < 1
    assert results["versions"]["torch"]


def test_the_student_is_retrained_from_the_repaired_one(finished: Path) -> None:
    config = yaml.safe_load((finished / "distill-2" / "config.yaml").read_text())
    assert config["student"] == str(finished / "repaired")


@pytest.mark.slow
def test_the_whole_quickstart_wins_back_most_of_what_pruning_lost(tmp_path: Path) -> None:
    report = story.quickstart(QuickstartOptions(out=str(tmp_path / "run")))
    closed = json.loads((report.parent / "results.json").read_text())["gap_closed"]
    assert closed["output_error"] >= 0.7
    assert closed["frechet_distance"] >= 0.7
