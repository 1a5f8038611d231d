"""What DATA stands for: captioned pictures in a folder, in tars, or in a data set of Hugging Face.

| DATA | pictures and captions |
|---|---|
| `emoji`, `emoji/train`, `emoji/heldout` | the embedded art |
| folder with `metadata.csv` or `metadata.jsonl` | columns `file_name` and `text` |
| `.tar`, or folder of such | WebDataset, as img2dataset writes it |
| folder that `datasets` saved, or Hub id | columns `image` and `text` |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from PIL import Image

from bksdm.data.folder import captions_digest, data_folder, read_captions
from bksdm.data.pictures import Picture, open_picture
from bksdm.data.tars import read_tars
from bksdm.errors import InputError
from bksdm.runs import digest

if TYPE_CHECKING:
    from datasets import Dataset

_SAVED = ("dataset_dict.json", "dataset_info.json")


@dataclass(frozen=True)
class Source:
    """Captioned pictures, and a short name for what they are."""

    pictures: Sequence[Picture]
    digest: str


def read_source(data: str | Path, image: str = "image", text: str | None = None, split: str = "train") -> Source:
    """The captioned pictures that DATA stands for; none of them is opened.

    Arguments:
        data: See the table above.
        image: Column of the pictures in a data set.
        text: Column of the captions in a data set, `text` by default; in tars see `read_tars`.
        split: Part of a data set.

    Raises:
        InputError: There is no such data, or a column or part is missing.
    """
    path = data_folder(data)
    tars = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")) if path.is_dir() else []
    if path.is_dir() and any((path / name).is_file() for name in ("metadata.jsonl", "metadata.csv")):
        entries = read_captions(path)
        return Source(entries, captions_digest(entries))
    if tars:
        if not path.exists():
            raise InputError(f"{path} does not exist; give a .tar or a folder of such")
        return Source(read_tars(tars, text), digest([(tar.name, tar.stat().st_size) for tar in tars]))
    saved = path.is_dir() and any((path / name).is_file() for name in _SAVED)
    if saved or (not path.exists() and str(data).count("/") == 1 and not str(data).startswith((".", "~", "/"))):
        table = _columns(_load(str(data), split, saved=saved), str(data), image, text or "text")
        return Source(TablePictures(table, image, text or "text"), table._fingerprint)
    return Source(read_captions(path), "")  # says what is missing


@dataclass(frozen=True)
class TablePicture:
    """A row of a data set."""

    table: "Dataset"
    row: int
    image: str
    caption: str

    @property
    def name(self) -> str:
        return f"row {self.row}"

    @property
    def text(self) -> str:
        text = self.table[self.row][self.caption]
        if not isinstance(text, str):
            raise InputError(f"{self.name} has the caption {text!r}, which is no text; mend or remove it")
        return text

    def open(self) -> Image.Image:
        held = self.table[self.row][self.image]
        if held is None:
            raise InputError(f"{self.name} has no picture; mend or remove it")
        return open_picture(held["bytes"] or Path(held["path"]), self.name)


@dataclass(frozen=True)
class TablePictures(Sequence[TablePicture]):
    """The rows of a data set."""

    table: "Dataset"
    image: str
    caption: str

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> TablePicture: ...
    @overload
    def __getitem__(self, index: slice) -> list[TablePicture]: ...
    def __getitem__(self, index: int | slice) -> TablePicture | list[TablePicture]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return TablePicture(self.table, index % len(self), self.image, self.caption)


def _load(data: str, split: str, *, saved: bool) -> "Dataset":
    import datasets  # noqa: PLC0415 - slow to import, and folders and tars do not need it

    try:
        loaded: Any = datasets.load_from_disk(data) if saved else datasets.load_dataset(data)
    except Exception as error:  # it has many ways to say that a data set is not there
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"data {data} is no folder here and cannot be loaded as a data set: {reason}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise InputError(f"data {data} has no part {split!r}; give one of {', '.join(loaded)}")
        loaded = loaded[split]
    return loaded


def _columns(table: "Dataset", data: str, image: str, text: str) -> "Dataset":
    """The two columns that are read, pictures undecoded."""
    import datasets  # noqa: PLC0415

    for column, option in ((image, "image_column"), (text, "text_column")):
        if column not in table.column_names:
            has = ", ".join(table.column_names)
            raise InputError(f"data {data} has no column {column!r}; give --{option}, one of {has}")
    if not isinstance(table.features[image], datasets.Image):
        raise InputError(f"data {data}: the column {image!r} holds no pictures but {table.features[image]}")
    return table.select_columns([image, text]).cast_column(image, datasets.Image(decode=False))
