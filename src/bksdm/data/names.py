"""Which files are pictures, and in which order those of a folder come.

A picture is known by its suffix. Hidden files (`.DS_Store`, a Mac's `._0.png`) and folders that are called `x.png`
are none. Numbers in names count as numbers: `2.png` comes before `10.png`.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

from PIL import Image

from bksdm.errors import InputError

_PICTURES = """
    png apng jpg jpeg jpe jfif mpo webp avif avifs gif bmp dib tif tiff jp2 j2k jpf jpx jxl heic heif hif
    pbm pgm ppm pnm pfm tga qoi psd pcx sgi dds svg exr dng cr2 cr3 nef arw orf rw2 raf
"""
PICTURES = frozenset(_PICTURES.split())  # the suffixes of pictures, read here or not
_HEIF = {"heic", "heif", "hif"}


def kind(name: str | Path) -> str:
    """The suffix of a file's name in small letters, without its dot."""
    return Path(name).suffix.lower()[1:]


def is_hidden(name: str) -> bool:
    """Whether a file is hidden by its own name."""
    return name.startswith(".")


@cache
def readable_kinds() -> frozenset[str]:
    """The suffixes that Pillow reads here, with pillow-heif where it is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif  # noqa: PLC0415 - optional

        pillow_heif.register_heif_opener()
    known = Image.registered_extensions().items()
    return frozenset(suffix[1:] for suffix, form in known if form in Image.OPEN)


def how_to_read(name: str | Path) -> str | None:
    """What to do about a picture that cannot be read here for its kind; None for all others."""
    if kind(name) not in PICTURES or kind(name) in readable_kinds():
        return None
    return "pip install 'bksdm[heif]' or convert it" if kind(name) in _HEIF else "convert it to PNG or JPEG"


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder and of the folders in it, in their order.

    Raises:
        InputError: There is no such folder, it has none, or some that cannot be read for their kind.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder of pictures")
    found = in_order((path for path in files_in(folder) if kind(path) in PICTURES), folder)
    if not found:
        raise InputError(f"{folder} has no pictures (PNG, JPEG, WebP, TIFF, AVIF, ...); give a folder of pictures")
    check_kinds(found, folder)
    return found


def holds_pictures(folder: Path) -> bool:
    """Whether pictures lie in this very folder."""
    return folder.is_dir() and any(
        kind(path) in PICTURES and not is_hidden(path.name) and not path.is_dir() for path in folder.iterdir()
    )


def files_in(folder: Path) -> Iterator[Path]:
    """Files of a folder and of the folders in it, but for the hidden; links are followed, into each folder once.

    Raises:
        InputError: A folder cannot be read, or a link leads nowhere.
    """
    seen, left = set[tuple[int, int]](), [folder]
    while left:
        here = left.pop()
        about = here.stat()
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        try:
            entries = [entry for entry in os.scandir(here) if not is_hidden(entry.name)]
        except OSError as error:
            raise InputError(f"{here} cannot be read ({error.strerror}); allow it or take it away") from error
        for entry in entries:
            if entry.is_dir():
                left.append(here / entry.name)
            elif entry.is_file():
                yield here / entry.name
            elif entry.is_symlink():
                raise InputError(f"{here / entry.name} is a link that leads nowhere; mend or remove it")


def in_order(paths: Iterable[Path], folder: Path) -> list[Path]:
    """Paths in a folder by their names, numbers as numbers."""
    return sorted(paths, key=lambda path: (_natural(path, folder), str(path)))


def check_order(paths: Sequence[Path], folder: Path) -> None:
    """Refuse paths in their order where it is not plain which of two comes first.

    Raises:
        InputError: Naming two, such as `1.png` and `01.png`.
    """
    for first, second in pairwise(paths):
        if _natural(first, folder) == _natural(second, folder):
            names = f"{first.relative_to(folder)} and {second.relative_to(folder)}"
            raise InputError(f"{folder} has {names}, and nothing says which comes first; rename one")


def check_kinds(paths: Sequence[Path], folder: Path) -> None:
    """Refuse pictures that cannot be read here for their kind.

    Raises:
        InputError: Counting them and naming the first.
    """
    unread = [path for path in paths if how_to_read(path)]
    if unread:
        raise InputError(
            f"{len(unread)} of {len(paths)} pictures in {folder} are of kinds that cannot be read here, first "
            f"{unread[0].relative_to(folder)}; {how_to_read(unread[0])}, or take it away"
        )


def _natural(path: Path, folder: Path) -> list[list[str | int]]:
    """What a path in a folder is sorted by: in each part of it, texts and numbers in turn."""
    parts = path.relative_to(folder).with_suffix("").parts
    pieces = [re.split("([0-9]+)", part) for part in parts]
    return [[int(text) if place % 2 else text for place, text in enumerate(texts)] for texts in pieces]
