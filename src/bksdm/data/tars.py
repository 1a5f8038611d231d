"""Captioned pictures in WebDataset tars, as img2dataset writes them.

A sample is the files that share a name up to its first dot, such as `000000012.jpg`, `000000012.txt` and
`000000012.json`, wherever in the tar they are. What follows that dot says what each file is, so that
`000000012.mask.png` is the mask of that sample. But pictures also go into tars under names with dots: where
`4.5 m.jpg` has `4.5 m.txt` beside it, these two are a sample. Only the headers are read to find samples; pictures
and captions are read at their place in the tar when they are asked for, so that samples can be taken in any order.
"""

import dataclasses
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.data.captions import CAPTION_FILES, caption_suffix, read_caption
from bksdm.data.names import PICTURES, kind
from bksdm.data.pictures import open_unflagged


@dataclass(frozen=True)
class Member:
    """Where a file lies in a tar: its name, first byte and length."""

    tar: Path
    name: str
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
        caption: The caption's place, or why there is none.
        asked: Which file of a sample, or which entry of its JSON, is asked for as caption, if any.
    """

    name: str
    image: Member
    caption: Member | str
    asked: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.caption, str):
            raise InputError(f"{self.name} {self.caption}")
        return read_caption(self.caption.read(), kind(self.caption.name), self.asked, self.name)

    def content(self) -> bytes:
        return self.image.read()

    def open(self) -> Image.Image:
        return open_unflagged(self.content(), f"{self.image.tar.name}/{self.image.name}")


_Files = dict[str, Member]  # of a sample, by what follows its key and a dot: "jpg", "mask.png"


def read_tars(tars: Sequence[Path], image: str | None = None, text: str | None = None) -> list[TarPicture]:
    """The samples of tars that have a picture, in their order.

    Arguments:
        tars: The files.
        image: Which file of a sample is its picture, by what follows its key, such as `edited.jpg`; by default the
            only one whose name has one dot.
        text: Which file of a sample has its caption, or which entry of its `json`; see `caption_suffix`.

    Raises:
        InputError: A tar cannot be read or is cut short, or no sample has a picture.
    """
    captions = {*CAPTION_FILES, "json", text or "json"}
    samples = [
        (f"{tar.name}/{key}", files)
        for tar in tars
        for group, held in _groups(tar)
        for key, files in ([(group, held)] if image else _split(group, held, captions))
    ]
    found = [_picture(name, files, image, text) for name, files in samples if _pictures(files)]
    if not found:
        raise InputError(f"{tars[0]} holds no pictures (jpg, png, webp, ...); give tars as img2dataset writes them")
    alone = [name for name, files in samples if not _pictures(files) and files.keys() & (captions - {"json"})]
    if alone:
        say(f"{len(alone)} captions have no picture and are left out, first {alone[0]}")
    return found


def _picture(name: str, files: _Files, image: str | None, text: str | None) -> TarPicture:
    pictures = _pictures(files)
    own = [suffix for suffix in pictures if (suffix == image if image else "." not in suffix)]
    if len(own) != 1:
        why = (
            f"has {', '.join(files)}, and which of them is the picture is not plain; "
            f"name it by --image_column, and its caption by --text_column, to bksdm prepare"
        )
        return TarPicture(name, files[pictures[0]], why)
    suffix = caption_suffix(files, text, name)
    why = f"has no caption, only {', '.join(files)}; add one or remove it"
    return TarPicture(name, files[own[0]], files[suffix] if suffix else why, text)


def _pictures(files: _Files) -> list[str]:
    return [suffix for suffix in files if suffix.rpartition(".")[2] in PICTURES]


def _split(key: str, files: _Files, captions: Set[str]) -> Iterator[tuple[str, _Files]]:
    """A group as samples: one, and besides it those under longer names that have both a picture and a caption."""
    longer = defaultdict[str, _Files](dict)
    for suffix, member in files.items():
        head, _, last = suffix.rpartition(".")
        longer[head][last] = member
    own = longer.pop("", {})
    pictured = {head: one for head, one in longer.items() if _pictures(one)}
    whole = {head: one for head, one in pictured.items() if one.keys() & captions}
    if _pictures(own) or not whole:
        yield key, files
    else:
        whole = pictured  # no field of one sample, but samples of which some lack a caption
    for head, one in whole.items():
        yield f"{key}.{head}", one


def _groups(tar: Path) -> list[tuple[str, _Files]]:
    """The files of a tar by their names up to the first dot, in the order of their first file.

    A second file of one name begins another group, as where tars were joined whose keys begin anew.
    """
    found, latest = list[tuple[str, _Files]](), dict[str, _Files]()
    for member in _members(tar):
        path = PurePosixPath(member.name)
        stem, _, suffix = path.name.partition(".")
        if stem and suffix:  # not hidden, as a Mac's `._000.jpg` is
            key, (head, dot, last) = str(path.parent / stem), suffix.rpartition(".")
            suffix = head + dot + last.lower()
            if key not in latest or suffix in latest[key]:
                latest[key] = {}
                found.append((key, latest[key]))
            latest[key][suffix] = member
    return found


def _members(tar: Path) -> Iterator[Member]:
    """The files in a tar, by their headers.

    Raises:
        InputError: The tar cannot be read, or has a link in the place of a picture.
    """
    places = dict[str, Member]()
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                if info.isfile():
                    places[info.name] = Member(tar, info.name, info.offset_data, info.size)
                elif info.islnk() and info.linkname in places:
                    places[info.name] = dataclasses.replace(places[info.linkname], name=info.name)
                elif info.issym() and kind(info.name) in PICTURES:
                    raise InputError(f"{tar} has {info.name} as a link; make it again with tar --dereference")
                else:
                    continue
                yield places[info.name]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{tar} is cut short or no tar ({error}); copy or make it again") from error
