"""Captioned pictures in a folder, each with its caption in a file of its own name.

`a.jpg` has its caption in `a.txt` or `a.caption`, else in `a.json`; folders may lie in the folder. This is the layout
of img2dataset's `files` and of kohya's trainers. Where folders are named as theirs, such as `10_sks dog`, a picture
there counts ten times, the first line of its file is its caption, and without one it is captioned `sks dog`.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bksdm.data.captions import CAPTION_FILES, caption_suffix, read_caption
from bksdm.data.names import files_in, kind, list_pictures
from bksdm.data.pictures import Captioned, name_in, open_picture
from bksdm.errors import InputError
from bksdm.progress import say
from bksdm.runs import digest

_REPEATS = re.compile(r"([1-9]\d*)_(.+)")


@dataclass(frozen=True)
class Beside:
    """A picture whose caption is in a file beside it.

    Attributes:
        path: The picture.
        caption: The file of its caption.
        folder: What the picture is named from.
        asked: The suffix, or the entry of JSON, that is asked for, if any.
        first_line: Whether only the first line of the file is the caption.
    """

    path: Path
    caption: Path
    folder: Path
    asked: str | None = None
    first_line: bool = False

    @property
    def name(self) -> str:
        return name_in(self.folder, self.path)

    @property
    def text(self) -> str:
        text = read_caption(self.caption.read_bytes(), kind(self.caption), self.asked, str(self.path))
        return text.split("\n")[0].strip() if self.first_line else text

    def content(self) -> Path:
        return self.path

    def open(self) -> Image.Image:
        return open_picture(self.path)


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
    paths = list_pictures(folder)
    files = _caption_files(folder, {*CAPTION_FILES, "json", text or "json"})
    repeats = _repeats(paths, folder)

    def entry(path: Path) -> Captioned | Beside | None:
        beside = files.get(path.with_suffix(""), {})
        suffix = caption_suffix(beside, text, str(path))
        if suffix:
            return Beside(path, beside[suffix], folder, text, first_line=bool(repeats))
        return Captioned(path, repeats[path.parent][1], folder) if repeats else None

    found = {path: entry(path) for path in paths}
    without = [path for path, one in found.items() if one is None]
    if len(without) == len(paths):
        return []
    if without:
        raise InputError(
            f"{len(without)} of {len(paths)} pictures in {folder} have no caption beside them, first "
            f"{name_in(folder, without[0])}; write a .txt of the same name, or take it away"
        )
    _tell_alone(folder, files, {path.with_suffix("") for path in paths})
    return [one for path, one in found.items() if one for _ in range(repeats[path.parent][0] if repeats else 1)]


def beside_digest(entries: Sequence[Captioned | Beside], text: str | None) -> str:
    """A short name for such pictures: names and sizes in bytes of pictures and captions, which are not read for it."""
    captions = [one.caption.stat().st_size if isinstance(one, Beside) else one.text for one in entries]
    sizes = [one.path.stat().st_size for one in entries]
    return digest([text, [[one.name, *held] for one, *held in zip(entries, sizes, captions, strict=True)]])


def _caption_files(folder: Path, suffixes: Collection[str]) -> dict[Path, dict[str, Path]]:
    """Files that may have captions: path without suffix -> suffix -> path."""
    found = defaultdict[Path, dict[str, Path]](dict)
    for path in files_in(folder):
        if kind(path) in suffixes:
            found[path.with_suffix("")][kind(path)] = path
    return found


def _repeats(paths: Sequence[Path], folder: Path) -> dict[Path, tuple[int, str]]:
    """How often the pictures of each folder count, and what they show, if the folders are named as kohya's.

    Raises:
        InputError: Only some of them are.
    """
    places = sorted({path.parent for path in paths})
    matches = {place: _REPEATS.fullmatch(place.name) for place in places if place.parent == folder}
    named = {place: (int(match[1]), match[2]) for place, match in matches.items() if match}
    others = [place for place in places if place not in named]
    if named and others:
        raise InputError(
            f"{folder} has pictures in {next(iter(named)).name}, which count as often as the name says, and in "
            f"{name_in(folder, others[0])}, which says no number; rename one, or write a metadata.csv"
        )
    if named:
        counted = ", ".join(f"{place.name} {times}" for place, (times, _) in named.items())
        say(f"{folder}: a picture counts as often as its folder says ({counted})")
    return named


def _tell_alone(folder: Path, files: Mapping[Path, Mapping[str, Path]], pictured: Set[Path]) -> None:
    """Say which captions have no picture."""
    alone = sorted(
        path
        for place, beside in files.items()
        if place not in pictured
        for suffix, path in beside.items()
        if suffix in CAPTION_FILES
    )
    if alone:
        say(f"{folder}: {len(alone)} captions have no picture and are left out, first {name_in(folder, alone[0])}")
