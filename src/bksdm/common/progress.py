"""Progress bars, on stderr, so that stdout stays for results."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from bksdm.common.processes import processes

_BAR = 40


class Bar:
    """One bar; `advance` moves it, `note` shows figures behind it."""

    def __init__(self, progress: Progress, total: int, what: str, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total, completed=done, note="")

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def reach(self, position: int, note: str = "") -> None:
        self._progress.update(self._task, completed=position, note=note)


class _Line(ProgressColumn):
    """What is done, a bar, numbers and times, and a note, in one line."""

    def __init__(self) -> None:
        super().__init__()
        self._count, self._spent, self._left = MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()

    def render(self, task: Task) -> "_Fitted":
        numbers = [self._count.render(task), self._spent.render(task), self._left.render(task)]
        return _Fitted(task, Text(" ").join(numbers))


class _Fitted:
    """A line as wide as the terminal: the bar shrinks first, then the note, then the description; numbers never do."""

    def __init__(self, task: Task, numbers: Text) -> None:
        self._task = task
        self._numbers = numbers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        what, note = Text(self._task.description), Text(str(self._task.fields["note"]))
        room = options.max_width - self._numbers.cell_len - 2 - bool(note)
        width = max(0, min(_BAR, room - what.cell_len - note.cell_len))
        told = max(0, min(note.cell_len, room - width - what.cell_len))
        line = Table.grid(padding=(0, 1))
        line.add_column(width=max(0, min(what.cell_len, room - width - told)), no_wrap=True, overflow="ellipsis")
        line.add_column(width=width)
        line.add_column(width=self._numbers.cell_len, no_wrap=True)
        line.add_column(width=told, no_wrap=True, overflow="ellipsis")
        line.add_row(what, BarColumn(bar_width=width)(self._task), self._numbers, note)
        yield line


def say(text: str) -> None:
    """A line for people, by one of several processes."""
    Console(stderr=True, quiet=not processes().main).print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bar(total: int, what: str, done: int = 0) -> Iterator[Bar]:
    """A bar for `total` pieces of `what`, `done` of which are done already; of several processes, one shows it."""
    with Progress(_Line(), console=Console(stderr=True), disable=not processes().main) as progress:
        yield Bar(progress, total, what, done)
