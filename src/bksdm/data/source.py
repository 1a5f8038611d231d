"""What DATA stands for: captioned pictures in one of the layouts that people have.

| DATA | pictures and captions |
|---|---|
| `emoji`, `emoji/train`, `emoji/heldout` | the embedded art |
| folder with `metadata.csv`, `.jsonl` or `.parquet` | columns `file_name` and `text` |
| folder that `datasets` saved, or Hub id | columns `image` and `text` |
| `.tar`, or folder of such | WebDataset, as img2dataset writes it |
| folder of pictures with `.txt`, `.caption` or `.json` beside them | img2dataset's `files`, kohya's folders |
| `.parquet`, or folder of such | columns `image` and `text` |

Where a column is called `text`, one called `caption` or `prompt` serves as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bksdm.common.errors import InputError
from bksdm.common.hub import is_id
from bksdm.common.runs import digest
from bksdm.data.beside import beside_digest, read_beside
from bksdm.data.folder import METADATA, captions_digest, data_folder, metadata_file, read_captions
from bksdm.data.hugging_face import TablePictures, hub_table, is_saved, parquet_table, saved_table
from bksdm.data.names import PICTURES, chosen_part, files_in, in_order, in_parts, kind, list_pictures
from bksdm.data.pictures import Captioned, Picture
from bksdm.data.tars import read_tars

_PACKED = {"gz", "tgz", "zst", "bz2", "xz", "zip", "7z", "rar"}


@dataclass(frozen=True)
class Source:
    """Pictures, and a short name for what they are.

    Attributes:
        pictures: In their order.
        digest: The short name.
        captioned: Whether they have captions; where they have none, every `text` is empty.
    """

    pictures: Sequence[Picture]
    digest: str
    captioned: bool = True


def read_source(
    data: str | Path, image: str | None = None, text: str | None = None, split: str | None = None
) -> Source:
    """The captioned pictures that DATA stands for; none of them is opened.

    Arguments:
        data: See the table above.
        image: Where a picture is: a column, in tars what follows the name of a sample, such as `edited.jpg`.
        text: Where a caption is: a column, in tars and beside pictures a suffix or an entry of the `.json`.
        split: Part of a data set, `train` by default.

    Raises:
        InputError: There is no such data, a column or part is missing, or an option means nothing for such data.
    """
    asked = _Data(str(data), image, text, split)
    found, path = _read(asked), asked.path
    if found:
        return found
    if kind(path) in _PACKED:
        raise InputError(f"{path} is packed; unpack it and give the folder")
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; give a folder of pictures with captions, a .tar or a .parquet")
    list_pictures(path)
    tables = [path / name for name in files_in(path) if Path(name).name in METADATA]
    lacking, mend = ".txt or .caption", "write one with the columns file_name,text"
    if text is not None:
        lacking, mend = f".{text} and no entry {text!r} in a .json", "give another --text_column, or leave it out"
    mend = f"give {tables[0].parent}" if tables else mend
    raise InputError(f"{path} has no metadata.csv or metadata.jsonl, and no {lacking} beside its pictures; {mend}")


def read_pictures(data: str | Path) -> Source:
    """The same, where the pictures in a folder may have no captions at all.

    Raises:
        InputError: There is no such data.
    """
    asked = _Data(str(data))
    found, path = _read(asked), asked.path
    if found or not path.is_dir():
        return found or read_source(data)
    entries = [Captioned(picture, "", path) for picture in list_pictures(path)]
    return Source(entries, captions_digest(entries), captioned=False)


def spread(entries: Sequence[Picture], count: int) -> list[Picture]:
    """As many entries, evenly over the data; where it holds fewer, some come again."""
    return [entries[number * len(entries) // count] for number in range(count)]


@dataclass(frozen=True)
class _Data:
    """DATA, and the options of `prepare` that say where in it pictures and captions are; None where not given."""

    data: str
    image_column: str | None = None
    text_column: str | None = None
    split: str | None = None

    @property
    def columns(self) -> tuple[str | None, str | None]:
        return self.image_column, self.text_column

    @cached_property
    def path(self) -> Path:
        return data_folder(self.data)

    @cached_property
    def kinds(self) -> set[str]:
        """The suffixes of what is there."""
        return {kind(name) for name in files_in(self.path)} if self.path.is_dir() else {kind(self.path)}

    def files(self, suffix: str) -> list[Path]:
        """The file itself, or the files with a suffix in the folder that are of the part that is asked for.

        Raises:
            InputError: There is no such file or part.
        """
        if self.path.is_dir():
            parts = in_parts(in_order(name for name in files_in(self.path) if kind(name) == suffix))
            return [self.path / name for name in chosen_part(parts, self.split, self.data)]
        if not self.path.is_file():
            raise InputError(f"{self.path} does not exist; give a .{suffix} or a folder of such")
        return [self.path]

    def refuse(self, what: str, *options: str) -> None:
        """Refuse options that mean nothing for such data."""
        for option in options:
            if (given := getattr(self, option)) is not None:
                raise InputError(f"data {self.data} is {what}, where --{option} {given} means nothing; leave it out")


def _read(data: _Data) -> Source | None:
    """DATA by the first layout that knows it."""
    return next((found for layout in _LAYOUTS if (found := layout(data))), None)


def _metadata(data: _Data) -> Source | None:
    if not metadata_file(data.path):
        return None
    data.refuse("a folder of pictures", "split")
    entries = read_captions(data.path, *data.columns)
    return Source(entries, captions_digest(entries))


def _saved(data: _Data) -> Source | None:
    if not is_saved(data.path):
        return None
    from bksdm.data.prepared import is_prepared  # noqa: PLC0415 - with torch

    if is_prepared(data.path):
        raise InputError(
            f"{data.path} is what bksdm prepare wrote, latents and no pictures; give the pictures that it was made from"
        )
    rows = TablePictures.of(saved_table(data.path, data.split), data.data, *data.columns)
    return Source(rows, rows.digest)


def _tars(data: _Data) -> Source | None:
    if "tar" not in data.kinds:
        return None
    if others := data.kinds & (PICTURES | _PACKED):
        raise InputError(f"{data.path} has .{' and .'.join(sorted(others))} beside its tars; unpack or take away those")
    tars = data.files("tar")
    files = [(tar.name, tar.stat().st_size) for tar in tars]
    return Source(read_tars(tars, *data.columns), digest([*files, data.columns] if any(data.columns) else files))


def _beside(data: _Data) -> Source | None:
    entries = read_beside(data.path, data.text_column) if data.path.is_dir() and data.kinds & PICTURES else []
    if not entries:
        return None
    data.refuse("a folder of pictures with captions beside them", "image_column", "split")
    return Source(entries, beside_digest(entries, data.text_column))


def _parquet(data: _Data) -> Source | None:
    if "parquet" not in data.kinds:
        return None
    files = data.files("parquet")
    rows = TablePictures.of(parquet_table(files, data.data), data.data, *data.columns)
    return Source(rows, digest([*((file.name, file.stat().st_size) for file in files), data.columns]))


def _hub(data: _Data) -> Source | None:
    if data.path.exists() or not is_id(data.data):
        return None
    rows = TablePictures.of(hub_table(data.data, data.split), data.data, *data.columns)
    return Source(rows, rows.digest)


_LAYOUTS = (_metadata, _saved, _tars, _beside, _parquet, _hub)
