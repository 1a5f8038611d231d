"""Captioned pictures in a folder.

The folder holds the pictures and a `metadata.csv` or `metadata.jsonl` with the columns
`file_name` and `text`: the layout of Hugging Face's image folders and of the subset of LAION that
the paper's authors released.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bksdm.assets import asset
from bksdm.data.pictures import Captioned
from bksdm.errors import InputError
from bksdm.runs import digest

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_captions(folder: Path) -> list[Captioned]:
    """The entries of a folder's metadata file, in its order.

    Raises:
        InputError: The folder, the metadata file, a column or a picture is missing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder of pictures with metadata.csv or metadata.jsonl")
    metadata = next((folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()), None)
    if metadata is None:
        raise InputError(f"{folder} has no metadata.csv or metadata.jsonl; write one with the columns file_name,text")
    entries = [_entry(metadata, number, row) for number, row in _rows(metadata)]
    if not entries:
        raise InputError(f"{metadata} lists no pictures; write one line for each, with file_name and text")
    missing = [entry.path for entry in entries if not entry.path.is_file()]
    if missing:
        raise InputError(
            f"{metadata} lists {len(missing)} of {len(entries)} pictures that are not there, first {missing[0].name}; "
            f"add them or remove their lines"
        )
    return entries


def list_pictures(folder: Path, *, check: bool = True) -> list[Path]:
    """The picture files of a folder, by their names.

    Raises:
        InputError: There is no such folder, or it has none (where `check` is on).
    """
    if check and not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder of pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if check and not found:
        raise InputError(f"{folder} has no pictures ({', '.join(PICTURE_SUFFIXES)}); give a folder of pictures")
    return found


def captions_digest(entries: Sequence[Captioned]) -> str:
    """A short name for captioned pictures: their file names, sizes in bytes and captions."""
    return digest([(entry.path.name, entry.path.stat().st_size, entry.text) for entry in entries])


def data_folder(data: str | Path) -> Path:
    """The folder that DATA stands for: `emoji`, `emoji/train` and `emoji/heldout` are the embedded art."""
    name, _, split = str(data).partition("/")
    if name == "emoji" and split in ("", "train", "heldout") and not Path(data).exists():
        return asset("emoji", "art", split or "train")
    return Path(data)


def read_prompts(source: str | Path) -> list[str]:
    """Prompts from a text file, one a line, or the captions of a metadata file, of DATA or of MS-COCO's annotations.

    Raises:
        InputError: There is no such file, or it has no prompts.
    """
    path = data_folder(source)
    if path.is_dir():
        return [entry.text for entry in read_captions(path)]
    if not path.is_file():
        raise InputError(f"prompts {source} do not exist; give a text file with one prompt a line")
    if path.suffix in (".csv", ".jsonl"):
        prompts = [_text(path, number, row) for number, row in _rows(path)]
    elif path.suffix == ".json":
        prompts = _coco_captions(path)
    else:
        prompts = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"prompts {source} is empty; write one prompt a line")
    return prompts


def _coco_captions(path: Path) -> list[str]:
    """The first caption of every picture in MS-COCO's annotation file, in the order of the file."""
    try:
        values = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error.msg}); copy it again") from error
    rows = values.get("annotations") if isinstance(values, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} has no annotations; give MS-COCO's captions_val2014.json, or a metadata.jsonl")
    first: dict[object, str] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("caption"), str) or "image_id" not in row:
            raise InputError(f"{path} annotation {number} has no caption; give captions_val2014.json, not instances")
        first.setdefault(row["image_id"], " ".join(row["caption"].split()))
    return list(first.values())


def _text(path: Path, number: int, row: object) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{path} line {number} has no text; every line needs the column text")
    return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _rows(metadata: Path) -> Iterator[tuple[int, object]]:
    text = _read_text(metadata)
    if metadata.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text), strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{metadata} line {reader.line_num} is not CSV ({error}); mend or remove it") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028 in a caption
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{metadata} line {number} is not JSON ({error.msg}); mend or remove it") from error


def _entry(metadata: Path, number: int, row: object) -> Captioned:
    if not isinstance(row, dict):
        raise InputError(f"{metadata} line {number} is not an object; write {{'file_name': ..., 'text': ...}}")
    for column in ("file_name", "text"):
        if not isinstance(row.get(column), str) or (column == "file_name" and not row[column]):
            raise InputError(f"{metadata} line {number} has no {column}; every line needs file_name and text")
    return Captioned(metadata.parent / row["file_name"], row["text"])
