"""Progress bars, on stderr, so that stdout stays for results."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bksdm.processes import processes


class Bar:
    """One bar; `advance` moves it, `note` shows figures behind it."""

    def __init__(self, progress: Progress, total: int, what: str, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total, completed=done, note="")

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def reach(self, position: int, note: str = "") -> None:
        self._progress.update(self._task, completed=position, note=note)


def say(text: str) -> None:
    """A line for people, by one of several processes."""
    Console(stderr=True, quiet=not processes().main).print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bar(total: int, what: str, done: int = 0) -> Iterator[Bar]:
    """A bar for `total` pieces of `what`, `done` of which are done already; of several processes, one shows it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not processes().main) as progress:
        yield Bar(progress, total, what, done)
