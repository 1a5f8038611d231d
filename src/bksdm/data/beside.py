"""Captioned pictures in a folder, each with its caption in a file of its own name.

`a.jpg` has its caption in `a.txt` or `a.caption`, else in `a.json`; folders may lie in the folder. This is the layout
of img2dataset's `files` and of kohya's trainers. Where folders are named as theirs, such as `10_sks dog`, a picture
there counts ten times, the first line of its file is its caption, and without one it is captioned `sks dog`.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.common.runs import digest
from bksdm.data.captions import CAPTION_FILES, caption_suffix, read_caption
from bksdm.data.names import files_in, kind, picture_names, stem
from bksdm.data.pictures import Captioned, open_unflagged, was_flagged

_REPEATS = re.compile(r"([1-9]\d*)_([^/]+)")


@dataclass(frozen=True)
class Beside:
    """A picture in a folder, with its caption in a file beside it.

    Attributes:
        folder: The folder.
        name: The picture in it.
        caption: The file of its caption in it.
        asked: The suffix, or the entry of JSON, that is asked for, if any.
        first_line: Whether only the first line of the file is the caption.
    """

    folder: Path
    name: str
    caption: str
    asked: str | None = None
    first_line: bool = False

    @property
    def text(self) -> str:
        content = (self.folder / self.caption).read_bytes()
        text = read_caption(content, kind(self.caption), self.asked, str(self.content()))
        return text.split("\n")[0].strip() if self.first_line else text

    @property
    def flagged(self) -> bool:
        """Whether its file says that a safety checker has made it black."""
        return kind(self.name) == "png" and was_flagged(self.content())

    def content(self) -> Path:
        return self.folder / self.name

    def open(self) -> Image.Image:
        return open_unflagged(self.content())


def read_beside(folder: Path, text: str | None = None) -> list[Captioned | Beside]:
    """The pictures of a folder that have their captions in files beside them, in the order of their names.

    Arguments:
        folder: The folder.
        text: Suffix of these files, or entry of the `.json` beside a picture; see `caption_suffix`.

    Returns:
        Entries whose captions are not read yet; none, if no picture has a caption.

    Raises:
        InputError: There are no pictures, some have no caption, or some are of a kind that cannot be read.
    """
    names = picture_names(folder)
    files = _caption_files(folder, {*CAPTION_FILES, "json", text or "json"})
    repeats = _repeats(names, folder)

    def entry(name: str) -> Captioned | Beside | None:
        beside = files.get(stem(name), {})
        suffix = caption_suffix(beside, text, f"{folder}/{name}")
        if suffix:
            return Beside(folder, name, beside[suffix], text, first_line=bool(repeats))
        return Captioned(folder / name, repeats[_place(name)][1], folder) if repeats else None

    found = {name: entry(name) for name in names}
    without = [name for name, one in found.items() if one is None]
    if len(without) == len(names):
        return []
    if without:
        raise InputError(
            f"{len(without)} of {len(names)} pictures in {folder} have no caption beside them, first {without[0]}; "
            f"write a .{text or 'txt'} of the same name, or take it away"
        )
    alone = files.keys() - {stem(name) for name in names}
    unused = sorted(name for one in alone for suffix, name in files[one].items() if suffix in CAPTION_FILES)
    if unused:
        say(f"{folder}: {len(unused)} captions have no picture and are left out, first {unused[0]}")
    return [one for name, one in found.items() if one for _ in range(repeats[_place(name)][0] if repeats else 1)]


def beside_digest(entries: Sequence[Captioned | Beside], text: str | None) -> str:
    """A short name for such pictures: names and sizes in bytes of pictures and captions, which are not read for it."""
    captions = [(one.folder / one.caption).stat().st_size if isinstance(one, Beside) else one.text for one in entries]
    sizes = [one.content().stat().st_size for one in entries]
    return digest([text, [[one.name, *held] for one, *held in zip(entries, sizes, captions, strict=True)]])


def _caption_files(folder: Path, suffixes: Collection[str]) -> dict[str, dict[str, str]]:
    """Files that may have captions: name without suffix -> suffix -> name."""
    found = defaultdict[str, dict[str, str]](dict)
    for name in files_in(folder):
        if kind(name) in suffixes:
            found[stem(name)][kind(name)] = name
    return found


def _repeats(names: Sequence[str], folder: Path) -> dict[str, tuple[int, str]]:
    """How often the pictures of each place count, and what they show, if the places are named as kohya's.

    Raises:
        InputError: Only some of them are.
    """
    places = sorted({_place(name) for name in names})
    named = {place: (int(match[1]), match[2]) for place in places if (match := _REPEATS.fullmatch(place))}
    others = [place for place in places if place not in named]
    if named and others:
        raise InputError(
            f"{folder} has pictures in {next(iter(named))}, which count as often as the name says, and in "
            f"{others[0] or 'no folder'}, which says no number; rename one, or write a metadata.csv"
        )
    if named:
        counted = ", ".join(f"{place} {times}" for place, (times, _) in named.items())
        say(f"{folder}: a picture counts as often as its folder says ({counted})")
    return named


def _place(name: str) -> str:
    """The folder in the folder."""
    return name.rpartition("/")[0]
