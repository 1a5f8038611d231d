"""The one command that measures a GPU: whatever a case does, it is a row, and what comes after it is measured too."""

import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a machine that has torch with CUDA, transformers, accelerate and huggingface_hub has with them.
THERE = "accelerate huggingface_hub jinja2 numpy psutil pyyaml rich safetensors torch transformers"
CASES = """
import os
import time
from types import SimpleNamespace as Part

def fails(setting): raise ValueError("of no use")
def dies(setting): os._exit(7)
def hangs(setting): time.sleep(600)
def gives(setting): return {"device": setting.device}
def describe(setting): return {"card": "none"}

def result(case, setting):
    try:
        return case(setting)
    except ValueError as error:
        return {"failed": str(error)}

PARTS = {
    "first": Part(share=0.5, cases={"fails": fails, "dies": dies, "gives": gives, "hangs": hangs, "late": gives}),
    "second": Part(share=0.5, cases={"gives": gives}),
}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """The script as a module, with the cases above in the place of its own."""
    (tmp_path / "cases.py").write_text(CASES)
    monkeypatch.syspath_prepend(ROOT / "scripts" / "gpu")
    monkeypatch.syspath_prepend(tmp_path)
    import run

    return run


@pytest.mark.slow
def test_what_fails_dies_or_hangs_ends_nothing_else(run, tmp_path: Path) -> None:
    with run.Worker(run.Setting("cpu", True, tmp_path, tmp_path)) as worker:
        assert worker.about == {"card": "none"}
        rows = list(run.results(worker, time.monotonic(), budget=12))
    found = {(row["part"], row["case"]): row for row in rows}
    assert found["first", "fails"]["failed"] == "of no use"
    assert found["first", "dies"]["failed"] == "ended with 7"
    assert found["first", "gives"]["device"] == "cpu"
    assert found["first", "hangs"]["failed"].startswith("cut off after")
    assert found["first", "late"]["skipped"] == "the budget is spent"
    assert found["second", "gives"]["device"] == "cpu"
    with pytest.raises(SystemExit, match="there is no part third; give first, second"):
        list(run.results(worker, time.monotonic(), 12, ["third"]))
    assert sum(row["seconds"] for row in rows) < 12


def test_results_are_a_table_with_the_card(run, tmp_path: Path) -> None:
    made = {
        "device": "cuda",
        "toy": False,
        "budget": 480.0,
        "parts": [],
        "card": "A card",
        "versions": {"torch": "2"},
        "wheels": 1,
    }
    made |= {"seconds": 1.0, "processors": 2, "processor": "P", "python": "3.12", "started": "2026-11-28T00:00:00Z"}
    run.write(tmp_path, made, [{"part": "verbs", "case": "distill", "seconds": 3.0, "loss": 1 / 3}])
    assert "| verbs | distill | 3.0 | loss: 0.3333 |" in (tmp_path / "gpu.md").read_text()
    assert "A card" in (tmp_path / "gpu.json").read_text()


def test_all_that_the_package_needs_is_there_or_taken_along(run) -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {line.partition(">=")[0].replace("-", "_") for line in needed}
    assert names <= {name.replace("-", "_") for name in run.WHEELS} | set(THERE.split())
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(run.WHEELS) <= pinned
