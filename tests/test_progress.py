"""The bar beside long work: whatever is long, the numbers stay whole."""

from collections.abc import Callable

import pytest
from rich.cells import cell_len

from bksdm.common.progress import bar

LOSSES = "task 0.0123  output_kd 0.00456  feature_kd 12.3"
WORKS = [
    ("retraining", LOSSES, 20_000),
    ("pictures of bk-sdm-small-student", "", 30_000),
    ("scores of a-run-with-a-long-name-in-a-folder-with-another", "", 7),
    ("pictures", "", 8),
    ("encoding pictures", "", 217_334),
]


Shown = Callable[[str, str, int, int], str]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    """The line on a terminal of some width that is left when a third of the work is done."""

    def line(what: str, note: str, total: int, width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        with bar(total, what) as progress:
            progress.reach(total // 3, note)
        return capsys.readouterr().err.removesuffix("\n")

    return line


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(("what", "note", "total"), WORKS)
def test_numbers_are_never_cut(shown: Shown, what: str, note: str, total: int, width: int) -> None:
    line = shown(what, note, total, width)
    assert f"{total // 3}/{total} 0:00:00 -:--:--" in line
    assert "\n" not in line
    assert cell_len(line) <= width


def test_the_bar_shrinks_first_then_the_note_then_the_description(shown: Shown) -> None:
    wide, middle, narrow = (shown("retraining", LOSSES, 20_000, width) for width in (120, 80, 60))
    assert wide.startswith("retraining ━")
    assert wide.endswith(LOSSES)
    assert middle.startswith("retraining ")
    assert middle.endswith("…")
    assert "task 0.0123  output_kd 0.00456" in middle
    assert "━" not in middle
    assert "retraining " in narrow
    assert "task 0.0123" in narrow
    assert shown(WORKS[2][0], "", 7, 60).startswith("scores of a-run-with-a-long-name-in-a-… 2/7 ")
