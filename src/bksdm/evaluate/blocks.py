"""Features on the disk, a file for a block of pictures: they never sit in memory whole.

A block is written when all its pictures have been looked at, so an evaluation that was killed goes on
with the blocks that are missing, and several processes share the blocks. What is in a block, and in which
batches it was made, does not depend on who made it or when: scores stay the same to the last digit.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bksdm.common.errors import InputError, one_line
from bksdm.common.processes import processes
from bksdm.common.progress import bar
from bksdm.common.runs import check_free, open_run, replace_file

BLOCK = 64  # pictures

Look = Callable[[range], Mapping[str, Tensor]]


def open_together(folder: Path, verb: str, settings: Mapping[str, Any]) -> None:
    """Make the folder of a run, or go on in it, by several processes at once; see `open_run`."""
    group = processes()
    check_free(folder, verb, settings)
    group.wait()  # until all have looked at the folder as it was
    if group.main:
        open_run(folder, verb, settings)


def spans(count: int, blocks: int) -> Iterator[range]:
    """The numbers of `count` pictures, as many as `blocks` hold at a time."""
    for start in range(0, count, blocks * BLOCK):
        yield range(start, min(start + blocks * BLOCK, count))


class Blocks:
    """Features of `count` pictures in `folder`."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def file(self, start: int) -> Path:
        """The file of the block whose first picture is number `start`."""
        return self.folder / f"{start // BLOCK:05d}.safetensors"

    def fill(self, look: Look, what: str, numbers: range | None = None) -> None:
        """Make what is missing; of several processes, each makes its share.

        Arguments:
            look: Gives named features of the pictures with these numbers, (n, ...) each.
            what: Shown before the bar.
            numbers: Of the pictures that are looked at now, one of the `spans`; all by default.

        Raises:
            InputError: The folder cannot be written.
        """
        group = processes()
        missing = [start for start in range(0, self.count, BLOCK) if not self.file(start).exists()]
        now = [start for start in missing if numbers is None or start in numbers]
        group.wait()  # until all have looked at the folder as it was
        if now:
            self.folder.mkdir(parents=True, exist_ok=True)
            done = self.count - sum(map(self._length, missing))
            with bar(self.count, what, done) as progress:
                for start in group.share(now):
                    self._write(start, look(range(start, start + self._length(start))))
                    progress.advance(group.count * self._length(start))
        group.wait()

    def rows(self, name: str) -> "BlockRows | None":
        """The features with this name, or None where the blocks have none."""
        with self.opened(0) as opened:
            if name not in opened.keys():  # noqa: SIM118 - not a dictionary
                return None
            return BlockRows(self, name, tuple(opened.get_slice(name).get_shape()[1:]))

    @contextmanager
    def opened(self, start: int) -> Iterator[Any]:
        """The block whose first picture is number `start`, to read from.

        Raises:
            InputError: It is damaged.
        """
        file = self.file(start)
        try:
            with safe_open(file, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            reason = one_line(error)
            raise InputError(f"cannot read {file}: {reason}; remove it, and give the same command again") from error

    def _length(self, start: int) -> int:
        return min(BLOCK, self.count - start)

    def _write(self, start: int, features: Mapping[str, Tensor]) -> None:
        file = self.file(start)
        try:
            with replace_file(file) as partial:
                save_file(dict(features), partial)
        except Exception as error:  # safetensors raises its own on a full disk
            raise InputError(f"cannot write {file}: {error}; make room, and give the same command again") from error


class BlockRows:
    """Features with shape (N, ...), of which slices are read from the disk."""

    def __init__(self, blocks: Blocks, name: str, shape: tuple[int, ...]) -> None:
        self._blocks = blocks
        self._name = name
        self.shape = (blocks.count, *shape)

    def __len__(self) -> int:
        return self._blocks.count

    def __getitem__(self, wanted: slice) -> Tensor:
        start, stop, step = wanted.indices(len(self))
        assert step == 1, "rows are read in their order"
        found = [torch.empty(0, *self.shape[1:])]
        for first in range(start - start % BLOCK, stop, BLOCK):
            with self._blocks.opened(first) as opened:
                part = opened.get_slice(self._name)
                found.append(part[max(start - first, 0) : min(stop - first, BLOCK)])
        return torch.cat(found)
