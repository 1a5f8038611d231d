"""What the names of files tell: which are pictures, in which order they come, which part of the data they are.

A picture is known by its suffix. Hidden files (`.DS_Store`, a Mac's `._0.png`) and folders that are called `x.png`
are none. Numbers in names count as numbers: `2.png` comes before `10.png`.
"""

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from PIL import Image

from bksdm.common.errors import InputError
from bksdm.common.progress import say

_PICTURES = """
    png apng jpg jpeg jpe jfif mpo webp avif avifs gif bmp dib tif tiff jp2 j2k jpf jpx jxl heic heif hif
    pbm pgm ppm pnm pfm tga qoi psd pcx sgi dds svg exr dng cr2 cr3 nef arw orf rw2 raf
"""
PICTURES = frozenset(_PICTURES.split())  # the suffixes of pictures, read here or not
_HEIF = {"heic", "heif", "hif"}
_NUMBERS = re.compile("([0-9]+)")
_PARTS = dict.fromkeys(("train", "training"), "train")
_PARTS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_PARTS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")

Part = TypeVar("Part", bound=Sized)


def kind(name: str | Path) -> str:
    """What follows the last dot of a file's name, in small letters."""
    _, dot, suffix = str(name).rpartition(".")
    return suffix.lower() if dot and "/" not in suffix else ""


def stem(name: str) -> str:
    """A file's name, its folders included, without its last dot and what follows."""
    before, dot, suffix = name.rpartition(".")
    return before if dot and "/" not in suffix else name


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
        InputError: See `picture_names`.
    """
    return [folder / name for name in picture_names(folder)]


def picture_names(folder: Path) -> list[str]:
    """The same by their names in the folder.

    Raises:
        InputError: There is no such folder, it has no pictures, or some that cannot be read for their kind.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder of pictures")
    found = in_order(name for name in files_in(folder) if kind(name) in PICTURES)
    if not found:
        raise InputError(f"{folder} has no pictures (PNG, JPEG, WebP, TIFF, AVIF, ...); give a folder of pictures")
    unread = [name for name in found if how_to_read(name)]
    if unread:
        raise InputError(
            f"{len(unread)} of {len(found)} pictures in {folder} are of kinds that cannot be read here, first "
            f"{unread[0]}; {how_to_read(unread[0])}, or take it away"
        )
    return found


def holds_pictures(folder: Path) -> bool:
    """Whether pictures lie in this very folder."""
    return folder.is_dir() and any(
        kind(path) in PICTURES and not is_hidden(path.name) and not path.is_dir() for path in folder.iterdir()
    )


def files_in(folder: Path) -> Iterator[str]:
    """Names of the files in a folder and in its folders, but for the hidden; links are followed, into each folder once.

    Raises:
        InputError: A folder cannot be read, or a link leads nowhere.
    """
    seen, left = set[tuple[int, int]](), [""]
    while left:
        here = left.pop()
        try:
            about = (folder / here).stat()
            entries = [entry for entry in os.scandir(folder / here) if not is_hidden(entry.name)]
        except OSError as error:
            raise InputError(f"{folder / here} cannot be read ({error.strerror}); allow it or take it away") from error
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        for entry in entries:
            if entry.is_dir():
                left.append(f"{here}{entry.name}/")
            elif entry.is_file():
                yield here + entry.name
            elif entry.is_symlink():
                raise InputError(f"{folder / here / entry.name} is a link that leads nowhere; mend or remove it")


def in_order(names: Iterable[str]) -> list[str]:
    """Names of files in a folder by their letters, and by their numbers as numbers."""
    return sorted(names, key=lambda name: (_natural(name), name))


def check_order(names: Sequence[str], folder: Path) -> None:
    """Refuse names in their order where it is not plain which of two comes first.

    Raises:
        InputError: Naming two, such as `1.png` and `01.png`.
    """
    for first, second in pairwise(names):
        if _natural(first) == _natural(second):
            raise InputError(f"{folder} has {first} and {second}, and nothing says which comes first; rename one")


def in_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Files in a folder by the parts of a data set that their names tell, as Hugging Face reads them; else `train`.

    Such names are `data/rest-00000-of-00002.parquet`, `test/000.tar` and `val-000.tar`.
    """
    found = defaultdict[str, list[str]](list)
    for name in names:
        shard = re.match(r"data/(\w+)-\d{5}-of-\d{5}", name)
        # A word by itself: what is beside it is none of a word's letters.
        said = re.search(rf"(?<![^-._ 0-9/])({'|'.join(_PARTS)})(?![^-._ 0-9/])", stem(name))
        found[shard[1] if shard else _PARTS[said[1]] if said else "train"].append(name)
    return found


def chosen_part(parts: Mapping[str, Part], asked: str | None, data: str) -> Part:
    """A part of a data set: the one that is asked for, else `train` or the only one; of several, it is said which.

    Raises:
        InputError: There is no such part.
    """
    part = asked or (next(iter(parts)) if len(parts) == 1 else "train")
    if part not in parts:
        raise InputError(f"data {data} has no part {part!r}; give --split to bksdm prepare, one of {', '.join(parts)}")
    if asked is None and len(parts) > 1:
        sizes = ", ".join(f"{name} {len(held)}" for name, held in parts.items())
        say(f"data {data} has the parts {sizes}; {part} is read, and --split of bksdm prepare takes another")
    return parts[part]


def _natural(name: str) -> list[list[str | int]]:
    """What a name is sorted by: in each part of it, texts and numbers in turn."""
    pieces = [_NUMBERS.split(part) for part in stem(name).split("/")]
    return [[int(text) if place % 2 else text for place, text in enumerate(texts)] for texts in pieces]
