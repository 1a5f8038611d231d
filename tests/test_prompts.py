"""Prompts come from every kind of file that people keep them in, whole and in order."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bksdm.common.errors import InputError
from bksdm.data.prompts import read_prompts
from tiny_models import CAPTIONS


def given(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def refused(source: Path) -> str:
    with pytest.raises(InputError) as error:
        read_prompts(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_text_file_has_one_prompt_a_line(tmp_path: Path, mark: str, end: str) -> None:
    text = mark + end.join(["a cat", "", "  a dog ", "123", "None", 'a "sign", red'])
    assert read_prompts(given(tmp_path, "p.txt", text)) == ["a cat", "a dog", "123", "None", 'a "sign", red']


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85"])
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.tsv", "p.jsonl"])
def test_only_the_end_of_a_line_ends_a_prompt(tmp_path: Path, name: str, character: str) -> None:
    prompt = f"a cat{character}and a dog"
    lines = [prompt, "a bird"]
    if name == "p.jsonl":
        lines = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    elif name != "p.txt":
        lines.insert(0, "text")
    assert read_prompts(given(tmp_path, name, "\n".join(lines))) == [prompt, "a bird"]


PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
    '"G I G G L E" painted in thick colorful lettering, exploding white paint.\tIllustrations\tWriting & Symbols\t\n'
    'A green sign that says "Very Deep Learning"\tWorld Knowledge\tWriting & Symbols\t\n'
    '7 dogs, two of which are turning away.\tAnimals\tQuantity\tDescription of "Dogs Playing Poker"\n'
)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_partiprompts_are_its_column_prompt_and_keep_their_quotation_marks(tmp_path: Path, end: str) -> None:
    assert read_prompts(given(tmp_path, "PartiPrompts.tsv", PARTI.replace("\n", end))) == [
        "bond",
        '"G I G G L E" painted in thick colorful lettering, exploding white paint.',
        'A green sign that says "Very Deep Learning"',
        "7 dogs, two of which are turning away.",
    ]


@pytest.mark.parametrize("name", ["p.csv", "p.TSV", "p.jsonl", "p.parquet"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt", "Prompt"])
def test_a_table_has_its_prompts_in_a_column(tmp_path: Path, name: str, column: str) -> None:
    rows = [{"id": str(number), column: prompt} for number, prompt in enumerate(["a cat", "a dog"])]
    file = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif name.endswith("jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [[*rows[0]], *([*row.values()] for row in rows)]
        file.write_text("".join(("," if "csv" in name else "\t").join(line) + "\n" for line in lines))
    assert read_prompts(file) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.csv", "a cat\na dog\n", "has no column text or caption or prompt, only a cat; rename one, or give"),
        ("p.tsv", "a cat\tred\n", "has no column text or caption or prompt, only a cat, red; rename one"),
        ("p.tsv", "prompt\tkind\na cat\n\tx\ty\n", "line 3 has more columns than the first line"),
        ("p.tsv", "kind\tprompt\nx\n", "line 2 has no prompt; mend or remove it"),
        (
            "p.tsv",
            'prompt\tkind\n"a ""red"" cat"\tx\n',
            'line 2 has the prompt "a ""red"" cat", and in a .tsv its quotation marks would be',
        ),
        ("p.jsonl", '{"prompt": 7}', "line 1 has the prompt 7, which is no text; mend or remove it"),
        ("p.parquet", b"PAR1", "is cut short or no parquet file"),
        ("p.txt", b"caf\xe9", "is not UTF-8 text (byte 3); save it as UTF-8"),
    ],
)
def test_a_file_that_does_not_say_what_its_prompts_are(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    assert refused(given(tmp_path, name, content)).startswith(f"{tmp_path / name} {reason}")


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [1, 2]}), tmp_path / "p.parquet")
    assert refused(tmp_path / "p.parquet") == (
        f"{tmp_path}/p.parquet row 0 has the prompt 1, which is no text; mend or remove it"
    )


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.tsv", "p.jsonl"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    assert refused(given(tmp_path, name, "")) == f"prompts {tmp_path / name} is empty; write one prompt a line"


def test_data_gives_its_captions(pictures: Path, tmp_path: Path) -> None:
    assert read_prompts(pictures) == list(CAPTIONS)
    for number, caption in enumerate(CAPTIONS):
        shutil.copy(pictures / f"{number}.png", tmp_path)
        given(tmp_path, f"{number}.txt", caption)
    assert read_prompts(tmp_path) == list(CAPTIONS)
