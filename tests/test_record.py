"""What a run writes down, and the page that is made of it."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from bksdm.distill.record import Record, read_metrics
from bksdm.distill.report import write_run_report
from bksdm.pruning.describe import Description, describe


def values(step: int, loss: float, loss_max: float | None = None) -> dict[str, float]:
    pace = {"lr": 1e-4, "grad_norm": 1.0, "images_per_second": 10.0, "peak_memory_gib": 1.5}
    terms = {"task": loss / 4, "output_kd": loss / 4, "feature_kd": loss / 2, "tap/mid_block": loss / 2}
    return {"loss": loss, "loss_max": loss_max or loss, **terms, **pace}


def record(folder: Path, losses: list[float], peaks: dict[int, float] | None = None, step: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    kept = Record(folder / "metrics.jsonl", folder / "tensorboard", step)
    for number, loss in enumerate(losses, start=step + 1):
        kept(number, values(number, loss, (peaks or {}).get(number)))
    kept.close()


def spikes(folder: Path) -> dict[int, float]:
    return {int(line["step"]): line["spike"] for line in read_metrics(folder / "metrics.jsonl") if "spike" in line}


def test_a_loss_that_stands_out_is_marked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, [1.0] * 40, {30: 8.0})
    assert spikes(tmp_path) == {30: pytest.approx(8.0)}
    assert "step 30: the loss rose to 8, 8.0 times its recent median" in capfd.readouterr().err


def test_a_loss_that_falls_from_high_is_no_spike(tmp_path: Path) -> None:
    record(tmp_path, [10.0 * 0.9**n for n in range(60)])
    assert not spikes(tmp_path)


def test_the_first_records_are_too_few_to_judge_by(tmp_path: Path) -> None:
    record(tmp_path, [1.0] * 15, {5: 100.0})
    assert not spikes(tmp_path)


def test_a_resumed_run_remembers_what_was_usual(tmp_path: Path) -> None:
    record(tmp_path / "whole", [1.0] * 40, {25: 5.0})
    record(tmp_path / "parts", [1.0] * 24)
    record(tmp_path / "parts", [1.0] * 16, {25: 5.0}, step=24)
    assert spikes(tmp_path / "whole") == spikes(tmp_path / "parts") == {25: pytest.approx(5.0)}


# The page


@pytest.fixture(scope="module")
def description() -> Description:
    return describe("emoji", "small")


def page(folder: Path, description: Description, grids: int = 3, width: int = 40) -> str:
    (folder / "samples").mkdir()
    for number in range(grids):
        Image.new("RGB", (width, 8), (number, 0, 0)).save(folder / "samples" / f"step-{number:08d}.png")
    (folder / "config.yaml").write_text("verb: distill\nteacher: <emoji>\n")
    (folder / "provenance.json").write_text('{"processor": "a processor"}')
    write_run_report(folder, description, teacher="emoji", data="<data>", pictures=100, samples=250, steps=90)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_losses_taps_pace_and_grids(tmp_path: Path, description: Description) -> None:
    record(tmp_path, [1.0] * 40, {30: 8.0})
    html = page(tmp_path, description)
    drawn = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawn) == 3
    assert all(ElementTree.fromstring(svg) is not None for svg in drawn)
    assert "step 40 of 90" in html
    assert "seen 2.50 times" in html
    assert "8.0 times it up to step 30" in html
    assert html.count("<img") == 3
    assert "&lt;data&gt;" in html
    assert "teacher: &lt;emoji&gt;" in html
    assert "a processor" in html
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"#]", html)


def test_a_long_run_shows_some_of_its_grids_small(tmp_path: Path, description: Description) -> None:
    record(tmp_path, [1.0] * 3)
    html = page(tmp_path, description, grids=50, width=2000)
    assert html.count("<img") == 12
    assert 'alt="step-00000000"' in html
    assert 'alt="step-00000049"' in html
    assert html.count("data:image/jpeg") == 12
    assert "No loss stood out" in html


def test_without_records_there_is_no_page(tmp_path: Path, description: Description) -> None:
    write_run_report(tmp_path, description, teacher="emoji", data="emoji", pictures=1, samples=0, steps=1)
    assert not (tmp_path / "report.html").exists()
