"""The page about a run: what is shown, what is kept from breaking it, and that it needs no other file."""

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from bksdm.common.page import GRID_ROWS
from bksdm.evaluate.scores import KINDS
from bksdm.families.recipe import load_recipe
from bksdm.pruning.describe import Description, describe
from bksdm.quickstart import run as story
from bksdm.quickstart.report import Model, write_report

NUMBERS = {"frechet_distance": 12.5, "clip_score": 0.25, "retrieval_r1": 0.5, "output_error": 0.125}
NASTY = ["<script>alert(1)</script>", '" onerror="alert(1)', "fish & chips", "été ☂", "{{ 7 * 7 }}"]


@pytest.fixture(scope="module")
def description() -> Description:
    return describe("emoji", load_recipe("small"))


@dataclass
class Page:
    """A report about three models with coloured squares for pictures."""

    folder: Path
    description: Description
    prompts: list[str]
    metrics: list[dict[str, float]] = field(
        default_factory=lambda: [
            {"step": step, "task": 1 / step, "output_kd": 1 / step, "feature_kd": 1 / step} for step in (1, 2, 3)
        ]
    )

    def square(self, name: str) -> Path:
        path = self.folder / f"{name}.png"
        Image.new("RGB", (4, 4), (len(name), sum(map(ord, name)) % 256, ord(name[-1]))).save(path)
        return path

    def write(self) -> str:
        count = len(self.prompts)
        costs = {
            "teacher": self.description.teacher,
            "pruned": self.description.student,
            "retrained": self.description.student,
        }
        scores = {name: {"value": value, "high": 1.5 * value} for name, value in NUMBERS.items()}
        models = [
            Model(name, cost, scores, 1.5, [self.square(f"{name}{n}") for n in range(count)])
            for name, cost in costs.items()
        ]
        write_report(
            self.folder / "report.html",
            models,
            prompts=self.prompts,
            real=[self.square(f"real{n}") for n in range(count)],
            description=self.description,
            metrics=self.metrics,
            samples=[self.square("step-1"), self.square("step-2")],
            evaluation={
                "models": {name: {"scores": scores, "by_noise": {}} for name in costs},
                "reference": {"pictures": count, "scores": {"clip_score": {"value": 0.75, "high": 0.75}}},
                "protocol": {"retrieval_among": 3},
            },
            results={
                "teacher": "emoji",
                "steps": 3,
                "sampling": {"denoising_steps": 25, "guidance": 3.0},
                "gap_closed": {"error_left": 0.5, "frechet_distance": 0.25},
                "seconds": {"prune": 1.0},
                "machine": "a <machine>",
                "processors": 2,
                "processor": "a <processor>",
                "device": "cpu",
                "python": "3.11",
                "versions": {"torch": "2"},
                "started": "today",
            },
        )
        return (self.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, description: Description) -> str:
    """The page about one prompt."""
    return Page(tmp_path_factory.mktemp("page"), description, ["red apple"]).write()


def test_the_page_needs_no_other_file(page: str) -> None:
    assert all(link.startswith("data:image/png;base64,") for link in re.findall(r'<img[^>]*src="([^"]*)"', page))
    assert not re.findall(r"""(?:src|href|data)\s*=\s*["'](?!data:|#)""", page)
    assert not re.findall(r"<(?:script|link|iframe|object)\b|@import|url\((?!#)", page)


@pytest.mark.parametrize("count", [1, GRID_ROWS, GRID_ROWS + 1, 5 * GRID_ROWS])
def test_every_row_has_its_own_pictures(tmp_path: Path, description: Description, count: int) -> None:
    page = Page(tmp_path, description, [f"prompt {number}." for number in range(count)]).write()
    rows = re.findall(r"<td>prompt (\d+)\.</td>(.*)\n((?:<td>.*</td>\n?)*)", page)
    assert 1 <= len(rows) <= GRID_ROWS
    assert len(rows) == min(count, GRID_ROWS)
    for number, real, made in rows:
        shown = re.findall(r"base64,([^\"]*)", real + made)
        wanted = [tmp_path / f"{name}{number}.png" for name in ("real", "teacher", "pruned", "retrained")]
        assert shown == [base64.b64encode(path.read_bytes()).decode() for path in wanted]


def test_scores_costs_and_shares_are_shown(page: str, description: Description) -> None:
    for name, value in NUMBERS.items():
        assert page.count(f"<td>{value:.4g} ± {value / 2:.2g}</td>") == 3
        assert f"<th>{KINDS[name].title}</th>" in page
    assert "<td>0.75</td>" in page
    for cost in (description.teacher, description.student):
        assert f"<td>{cost.params:,}</td>" in page
    assert page.count("<td>1.50</td>") == 3
    assert "<b>50 %</b>" in page
    assert "<b>25 %</b>" in page


def test_the_blocks_and_the_losses_are_drawn(page: str, description: Description) -> None:
    assert description.drawing() in page
    svg = page[page.index("<svg") : page.index("</svg>") + len("</svg>")]
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_run_gives_the_same_page(page: str, tmp_path: Path, description: Description) -> None:
    assert Page(tmp_path, description, ["red apple"]).write() == page


def test_prompts_are_shown_as_they_are_and_cannot_break_the_page(tmp_path: Path, description: Description) -> None:
    page = Page(tmp_path, description, NASTY).write()
    for prompt in NASTY:
        escaped = prompt.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;")
        assert f"<td>{escaped}</td>" in page
    assert "<script" not in page
    assert 'onerror="' not in page
    assert "a &lt;machine&gt;" in page


@pytest.mark.parametrize(("retrained", "closed"), [(10.0, 1.0), (30.0, 0.0), (15.0, 0.75), (40.0, -0.5), (5.0, 1.25)])
def test_the_share_of_the_gap_that_retraining_closed(retrained: float, closed: float) -> None:
    scores = {"teacher": {"error": 10.0}, "pruned": {"error": 30.0}, "retrained": {"error": retrained}}
    assert story.gap_closed(scores, "error") == pytest.approx(closed)
