"""Prompts from a file of any kind that people keep them in, or the captions of DATA."""

import json
from pathlib import Path

from bksdm.common.errors import InputError
from bksdm.data.captions import caption_column
from bksdm.data.folder import data_folder
from bksdm.data.names import kind
from bksdm.data.source import read_source
from bksdm.data.table_files import TABLES, read_columns, read_text


def read_prompts(source: str | Path, option: str = "prompts") -> list[str]:
    """Prompts from a text file, one a line, or the captions of a table, of DATA or of MS-COCO's annotations.

    Arguments:
        source: The file or the data.
        option: What named it, for refusals.

    Raises:
        InputError: There is no such file, or it has no prompts.
    """
    path = data_folder(source)
    if path.is_dir() or (path.is_file() and kind(path) == "tar"):
        return [picture.text for picture in read_source(path).pictures]
    if not path.is_file():
        raise InputError(f"{option} {source} does not exist; give a text file with one prompt a line")
    if kind(path) in TABLES:
        prompts = [text for (text,) in read_columns(path, lambda names: (caption_column(names, None, path),))]
    elif kind(path) == "json":
        prompts = _coco_captions(path)
    else:
        lines = read_text(path).split("\n")  # splitlines would also split at U+2028 or a vertical tab
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{option} {source} is empty; write one prompt a line")
    return prompts


def _coco_captions(path: Path) -> list[str]:
    """The first caption of every picture in MS-COCO's annotation file, in the order of the file."""
    try:
        values = json.loads(read_text(path))
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
