"""Captioned pictures in WebDataset tars, as img2dataset writes them.

A sample is a run of neighbouring files that share a name up to its first dot: `000000012.jpg`,
`000000012.txt`, `000000012.json`. Only the headers are read to find them; pictures and captions are
read at their place in the tar when they are asked for, so that samples can be taken in any order.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from bksdm.data.pictures import open_picture
from bksdm.errors import InputError

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_CAPTION_FILE, _CAPTION_KEY = "txt", "caption"


@dataclass(frozen=True)
class Member:
    """Where a file lies in a tar: first byte and length."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class TarPicture:
    """A picture in a tar.

    Attributes:
        name: Tar and key, such as `00003.tar/000030012`.
        image: The picture's place.
        caption: The caption's place, or None where the sample has none.
        key: The entry of the caption, where its file is JSON.
    """

    name: str
    image: Member
    caption: Member | None
    key: str | None = None

    @property
    def text(self) -> str:
        if self.caption is None:
            raise InputError(f"{self.name} has no caption; add one or remove it")
        try:
            text = self.caption.read().decode("utf-8")
            found = json.loads(text)[self.key] if self.key else text.strip()
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.name} has no readable caption ({error}); mend or remove it") from error
        if not isinstance(found, str):
            raise InputError(f"{self.name} has the caption {found!r}, which is no text; mend or remove it")
        return found

    def open(self) -> Image.Image:
        return open_picture(self.image.read(), self.name)


def read_tars(tars: Sequence[Path], text: str | None = None) -> list[TarPicture]:
    """The samples of tars that have a picture, in their order.

    Arguments:
        tars: The files.
        text: Which file of a sample is its caption, by its extension, or which entry of its `json`; by default
            `txt`, and `caption` of `json` where there is no `txt`.

    Raises:
        InputError: A tar cannot be read or is cut short, or no sample has a picture.
    """
    found = [picture for tar in tars for picture in _pictures(tar, text)]
    if not found:
        raise InputError(f"{tars[0]} holds no pictures ({', '.join(_PICTURES)}); give tars as img2dataset writes them")
    return found


def _pictures(tar: Path, text: str | None) -> Iterator[TarPicture]:
    for key, files in _samples(tar):
        image = next((files[kind] for kind in _PICTURES if kind in files), None)
        if image is None:
            continue
        name = f"{tar.name}/{key}"
        if text in files or (text is None and _CAPTION_FILE in files):
            yield TarPicture(name, image, files[text or _CAPTION_FILE])
        else:
            yield TarPicture(name, image, files.get("json"), text or _CAPTION_KEY)


def _samples(tar: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Pairs (key, file by its extension)."""
    key, files = "", dict[str, Member]()
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                if not info.isfile():
                    continue
                path = PurePosixPath(info.name)
                stem, _, extension = path.name.partition(".")
                if (own := str(path.parent / stem)) != key:
                    if files:
                        yield key, files
                    key, files = own, {}
                files[extension.lower()] = Member(tar, info.offset_data, info.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{tar} is cut short or no tar ({error}); copy or make it again") from error
    if files:
        yield key, files
