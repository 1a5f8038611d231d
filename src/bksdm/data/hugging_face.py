"""Captioned pictures in rows: data sets of Hugging Face, on the disk or on the Hub, and parquet files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from PIL import Image

from bksdm.common.errors import InputError
from bksdm.data.captions import caption_column, chosen_column
from bksdm.data.names import chosen_part
from bksdm.data.pictures import open_unflagged

if TYPE_CHECKING:
    from datasets import Dataset

_SAVED = ("dataset_dict.json", "dataset_info.json")


@dataclass(frozen=True)
class TablePicture:
    """A row. Pictures and captions are tables of their own, so that neither is read for the other."""

    images: "Dataset"
    captions: "Dataset"
    row: int

    @property
    def name(self) -> str:
        return f"row {self.row}"

    @property
    def text(self) -> str:
        (text,) = self.captions[self.row].values()
        if not isinstance(text, str):
            raise InputError(f"{self.name} has the caption {text!r}, which is no text; mend or remove it")
        return text

    def content(self) -> Path | bytes:
        (held,) = self.images[self.row].values()
        if held is None or not (held["bytes"] or held["path"]):
            raise InputError(f"{self.name} has no picture; mend or remove it")
        return held["bytes"] or Path(held["path"])

    def open(self) -> Image.Image:
        return open_unflagged(self.content(), self.name)


@dataclass(frozen=True)
class TablePictures(Sequence[TablePicture]):
    """The rows of a data set.

    Attributes:
        images: Its column of pictures, as bytes or paths.
        captions: Its column of captions.
        digest: A short name for both.
    """

    images: "Dataset"
    captions: "Dataset"
    digest: str

    @classmethod
    def of(cls, table: "Dataset", data: str, image: str | None, text: str | None) -> "TablePictures":
        """Two columns of a data set.

        Arguments:
            table: The data set.
            data: What to call it in errors.
            image: The column of pictures; by default `image`, or the only one that holds any.
            text: The column of captions, see `caption_column`.

        Raises:
            InputError: There is no such column, or it holds something else.
        """
        import datasets  # noqa: PLC0415 - slow to import, and other data do not need it

        image = _picture_column(table, image, f"data {data}")
        text = caption_column([name for name in table.column_names if name != image], text, f"data {data}")
        both = table.select_columns([image, text]).cast_column(image, datasets.Image(decode=False))
        return cls(both.select_columns([image]), both.select_columns([text]), both._fingerprint)

    def __len__(self) -> int:
        return len(self.captions)

    @overload
    def __getitem__(self, index: int) -> TablePicture: ...
    @overload
    def __getitem__(self, index: slice) -> list[TablePicture]: ...
    def __getitem__(self, index: int | slice) -> TablePicture | list[TablePicture]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return TablePicture(self.images, self.captions, index % len(self))


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return any((folder / name).is_file() for name in _SAVED)


def saved_table(folder: Path, split: str | None) -> "Dataset":
    """The part of a folder that `datasets` saved.

    Raises:
        InputError: It cannot be read, or has no such part.
    """
    import datasets  # noqa: PLC0415

    return _table(str(folder), split, lambda: datasets.load_from_disk(str(folder)))


def hub_table(data: str, split: str | None) -> "Dataset":
    """The part of a data set on the Hub.

    Raises:
        InputError: There is no such data set, or it has no such part.
    """
    import datasets  # noqa: PLC0415

    return _table(f"{data} is no folder here and", split, lambda: datasets.load_dataset(data))


def parquet_table(files: Sequence[Path], data: str) -> "Dataset":
    """The rows of parquet files, which `datasets` copies into its cache.

    Raises:
        InputError: A file cannot be read.
    """
    import datasets  # noqa: PLC0415

    return _table(data, None, lambda: datasets.load_dataset("parquet", data_files=[str(file) for file in files]))


def _table(data: str, split: str | None, load: Callable[[], Any]) -> "Dataset":
    import datasets  # noqa: PLC0415

    try:
        loaded = load()
    except Exception as error:  # it has many ways to say that a data set is not there
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
        raise InputError(f"data {data} cannot be loaded as a data set: {reason}") from error
    return chosen_part(loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}, split, data)


def _picture_column(table: "Dataset", asked: str | None, where: str) -> str:
    found = [name for name, feature in table.features.items() if _holds_pictures(feature)]
    usual = ["image", *found[:1]] if len(found) == 1 else ["image"]
    column = chosen_column(table.column_names, asked, usual, "image_column", where)
    if column not in found:
        raise InputError(f"{where}: the column {column!r} holds no pictures but {table.features[column]}")
    return column


def _holds_pictures(feature: Any) -> bool:
    """Whether a column has pictures, or bytes that may be some."""
    import datasets  # noqa: PLC0415

    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")
