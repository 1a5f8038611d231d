"""Captioned pictures in a folder with a table of them.

The folder holds the pictures and a `metadata.csv`, `metadata.jsonl` or `metadata.parquet` with the columns
`file_name` and `text`: the layout of Hugging Face's image folders and of the subset of LAION that the paper's authors
released.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from bksdm.common.assets import ART, asset
from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.common.runs import digest
from bksdm.common.tables import listed
from bksdm.data.captions import caption_column, chosen_column
from bksdm.data.names import PICTURES, files_in, in_order, kind
from bksdm.data.pictures import Captioned
from bksdm.data.table_files import read_marked

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SPLITS = {"": "train", "train": "train", "heldout": "heldout", "unseen": "unseen.txt"}
_FLAGGED = "flagged"  # what `bksdm generate` writes of pictures that a safety checker has made black


def data_folder(data: str | Path) -> Path:
    """The folder that DATA stands for: `emoji`, `emoji/train` and `emoji/heldout` are the embedded art.

    `emoji/unseen` is a file of captions of which the art has no pictures.
    """
    name, _, split = str(data).partition("/")
    if name == ART and split in _SPLITS and not Path(data).exists():
        return asset(ART, "art", _SPLITS[split])
    return Path(data)


def metadata_file(folder: Path) -> Path | None:
    """The table of a folder of pictures, if it has one.

    Raises:
        InputError: It has two.
    """
    found = [name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder} has {found[0]} and {found[1]}; remove one")
    return folder / found[0] if found else None


def read_captions(folder: Path, image: str | None = None, text: str | None = None) -> list[Captioned]:
    """The entries of a folder's metadata file, in its order.

    Arguments:
        folder: The folder.
        image: Column of the file names, `file_name` by default.
        text: Column of the captions, see `caption_column`.

    Raises:
        InputError: The folder, the metadata file, a column or a picture is missing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder of pictures with metadata.csv or metadata.jsonl")
    metadata = metadata_file(folder)
    if metadata is None:
        raise InputError(f"{folder} has no metadata.csv or metadata.jsonl; write one with the columns file_name,text")

    def columns(names: Sequence[str]) -> tuple[str, ...]:
        file_name = chosen_column(names, image, ["file_name"], "image_column", metadata)
        return file_name, caption_column(names, text, metadata)

    rows = read_marked(metadata, columns, _FLAGGED)
    entries = [Captioned(folder / name, caption, folder, flagged) for (name, caption), flagged in rows]
    if not entries:
        raise InputError(f"{metadata} lists no pictures; write one line for each, with file_name and text")
    missing = [entry for entry in entries if not entry.path.is_file()]
    if missing:
        raise InputError(
            f"{metadata} lists {len(missing)} of {len(entries)} pictures that are not there, first {missing[0].name}; "
            f"add them or remove their lines"
        )
    listed_here = {os.path.normpath(entry.name) for entry in entries}
    others = in_order(name for name in files_in(folder) if kind(name) in PICTURES and name not in listed_here)
    if others:
        say(f"{folder}: {len(others)} pictures are not in {metadata.name} and are left out: {listed(others)}")
    return entries


def captions_digest(entries: Sequence[Captioned]) -> str:
    """A short name for captioned pictures: their file names, sizes in bytes and captions."""
    return digest([(entry.path.name, entry.path.stat().st_size, entry.text) for entry in entries])
