"""Rows of a file that lists pictures or prompts: `.csv`, `.tsv`, `.jsonl` or `.parquet`."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bksdm.common.errors import InputError, one_line
from bksdm.data.names import kind

TABLES = ("csv", "tsv", "jsonl", "parquet")
_QUOTED = re.compile(r'"([^"]|"")*"')

Choose = Callable[[Sequence[str]], tuple[str, ...]]
_Row = tuple[str, dict[str, Any]]


def read_columns(file: Path, choose: Choose) -> Iterator[tuple[str, ...]]:
    """The texts in some columns of a table, row by row.

    Arguments:
        file: Of one of the four kinds. In a `.tsv` nothing is quoted: a quotation mark means itself.
        choose: Which columns, of those that there are; in a `.jsonl`, of those of its first line.

    Raises:
        InputError: The file is damaged, or a row has no text in such a column.
    """
    return (texts for texts, _ in read_marked(file, choose, ""))


def read_marked(file: Path, choose: Choose, mark: str) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The same, and with each row whether the column `mark`, which need not be there, says true in it."""
    wanted: tuple[str, ...] = ()
    for where, row in _rows(file, lambda names: (*choose(names), *({mark} & set(names)))):
        wanted = wanted or choose([name for name in row if name != mark])
        texts = tuple(_text(row.get(column), column, file, where) for column in wanted)
        yield texts, str(row.get(mark)).lower() == "true"


def read_text(file: Path) -> str:
    """What a text file holds, whatever ends its lines.

    Raises:
        InputError: It is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _rows(file: Path, choose: Choose) -> Iterator[_Row]:
    match kind(file):
        case "parquet":
            return _parquet_rows(file, choose)
        case "jsonl":
            return _json_rows(file)
        case "tsv":
            return _csv_rows(file, choose, delimiter="\t", quoting=csv.QUOTE_NONE)
    return _csv_rows(file, choose)


def _csv_rows(file: Path, choose: Choose, **dialect: Any) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(read_text(file)), strict=True, **dialect)
    try:
        names = [name for name in reader.fieldnames or () if name]
        if len(set(names)) < len(names):
            raise InputError(f"{file} has two columns of one name ({', '.join(names)}); rename one")
        if names:
            choose(names)  # says what is missing also where there are no rows
        for row in reader:
            if None in row:
                raise InputError(
                    f"{file} line {reader.line_num} has more columns than the first line; mend it "
                    f"(in a .csv, a text with commas needs quotation marks)"
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{file} line {reader.line_num} is not CSV ({error}); mend or remove it") from error


def _json_rows(file: Path) -> Iterator[_Row]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):  # splitlines also splits at U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{file} line {number} is not JSON ({error.msg}); mend or remove it") from error
            if not isinstance(row, dict):
                raise InputError(f"{file} line {number} is not an object; write {{'file_name': ..., 'text': ...}}")
            yield f"line {number}", row


def _parquet_rows(file: Path, choose: Choose) -> Iterator[_Row]:
    import pyarrow as pa  # noqa: PLC0415 - large, and other tables do not need it
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        with pq.ParquetFile(file) as opened:
            wanted = choose(opened.schema_arrow.names)
            number = 0
            for batch in opened.iter_batches(columns=list(wanted)):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except pa.ArrowException as error:
        reason = one_line(error, None)
        raise InputError(f"{file} is cut short or no parquet file ({reason}); copy or make it again") from error


def _text(value: object, column: str, file: Path, where: str) -> str:
    if value is None:
        raise InputError(f"{file} {where} has no {column}; mend or remove it")
    if not isinstance(value, str):
        raise InputError(f"{file} {where} has the {column} {value!r}, which is no text; mend or remove it")
    if kind(file) == "tsv" and _QUOTED.fullmatch(value):
        raise InputError(
            f"{file} {where} has the {column} {value}, and in a .tsv its quotation marks would be part of the text; "
            f"take them away, or save it as .csv"
        )
    return value
