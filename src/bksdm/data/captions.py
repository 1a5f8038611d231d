"""Where captions stand: in a column of a table, or in a file beside each picture.

In a table it is the column that is asked for, else the first of `text`, `caption` and `prompt`, in letters of any
size. Beside `x.jpg` it is `x.txt` or `x.caption`, else an entry of `x.json`, chosen among the same three; what is
asked for is then the suffix or the entry.
"""

import json
from collections.abc import Collection, Iterable, Sequence

from bksdm.common.errors import InputError

CAPTION_FILES = ("txt", "caption")
_CAPTIONS = ("text", "caption", "prompt")


def chosen_column(columns: Iterable[str], asked: str | None, usual: Sequence[str], option: str, where: object) -> str:
    """The column of a table that has what is looked for.

    Arguments:
        columns: Those that there are.
        asked: The one that is asked for, if any.
        usual: Its usual names, of which the first that is there is taken, in letters of any size.
        option: What asks for it, in `bksdm prepare`.
        where: What to call the table in errors.

    Raises:
        InputError: There is no such column.
    """
    names = list(columns)
    if asked is not None and asked not in names:
        raise InputError(f"{where} has no column {asked!r}; give --{option}, one of {', '.join(names)}")
    found = asked or _first(names, usual)
    if found is None:
        raise InputError(
            f"{where} has no column {' or '.join(usual)}, only {', '.join(names)}; "
            f"rename one, or give --{option} to bksdm prepare"
        )
    return found


def caption_column(columns: Iterable[str], asked: str | None, where: object) -> str:
    """The column of captions; see `chosen_column`."""
    return chosen_column(columns, asked, _CAPTIONS, "text_column", where)


def caption_suffix(suffixes: Collection[str], asked: str | None, name: str) -> str | None:
    """Which of the files beside a picture has its caption, None where there is no such file.

    Arguments:
        suffixes: Of these files.
        asked: The suffix, or the entry of JSON, that is asked for, if any.
        name: What to call the picture in errors.

    Raises:
        InputError: Two files may have it.
    """
    found = [suffix for suffix in (CAPTION_FILES if asked is None else (asked,)) if suffix in suffixes]
    if len(found) > 1:
        raise InputError(
            f"{name} has a caption in a .txt and in a .caption; remove one, or give --text_column to bksdm prepare"
        )
    return found[0] if found else "json" if "json" in suffixes else None


def read_caption(content: bytes, suffix: str, asked: str | None, name: str) -> str:
    """The caption in a file beside a picture.

    Arguments:
        content: Of the file.
        suffix: Of the file; `json` has it in an entry.
        asked: The suffix or the entry that is asked for, if any.
        name: What to call the picture in errors.

    Raises:
        InputError: There is no caption in the file.
    """
    try:
        text = content.decode("utf-8-sig")
        if suffix != "json":
            return text.strip()
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} has no readable caption ({error}); mend or remove it") from error
    values = values if isinstance(values, dict) else {}
    entry = asked or _first(values, _CAPTIONS)
    if entry not in values:
        lacking = asked or " or ".join(_CAPTIONS)
        raise InputError(f"{name} has no readable caption (its JSON has no {lacking}); mend or remove it")
    found = values[entry]
    if not isinstance(found, str):
        raise InputError(f"{name} has the caption {found!r}, which is no text; mend or remove it")
    return found


def _first(names: Iterable[str], usual: Sequence[str]) -> str | None:
    """The first of the usual names that is there, in letters of any size."""
    small = {name.lower(): name for name in reversed(list(names))}
    return next((small[name.lower()] for name in usual if name.lower() in small), None)
