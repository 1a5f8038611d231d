"""Pictures with their captions in files beside them: img2dataset's `files` and kohya's folders."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from bksdm.common.errors import InputError
from bksdm.data.source import read_source


def written(folder: Path, files: Mapping[str, str | None]) -> Path:
    """A folder of small pictures (None) and text files."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            Image.new("RGB", (4, 4), "red").save(path)
        else:
            path.write_text(text, encoding="utf-8")
    return folder


def captions(folder: Path, text: str | None = None) -> list[tuple[str, str]]:
    return [(picture.name, picture.text) for picture in read_source(folder, text=text).pictures]


def refused(folder: Path, **columns: str) -> str:
    with pytest.raises(InputError) as error:
        read_source(folder, **columns)
    return str(error.value)


@pytest.mark.parametrize("suffix", ["txt", "caption", "TXT"])
def test_a_caption_lies_beside_its_picture(tmp_path: Path, suffix: str) -> None:
    written(tmp_path, {f"{n}.png": None for n in (1, 2, 10)} | {f"{n}.{suffix}": f" number {n}\n" for n in (1, 2, 10)})
    assert captions(tmp_path) == [("1.png", "number 1"), ("2.png", "number 2"), ("10.png", "number 10")]


@pytest.mark.parametrize(
    ("written_text", "caption"),
    [
        ("", ""),
        ("None", "None"),
        ("123", "123"),
        ("\ufeffred", "red"),
        ("red,\r\nround\n", "red,\r\nround"),
        ("a\u2028b\x0bc", "a\u2028b\x0bc"),
        ("été", "été"),
    ],
)
def test_a_caption_is_the_whole_file(tmp_path: Path, written_text: str, caption: str) -> None:
    (written(tmp_path, {"a.png": None}) / "a.txt").write_bytes(written_text.encode())
    assert captions(tmp_path) == [("a.png", caption)]


def test_names_may_have_dots_and_pictures_one_name(tmp_path: Path) -> None:
    written(tmp_path, {"a.v2.png": None, "a.v2.txt": "two", "a.png": None, "a.jpg": None, "a.txt": "one"})
    assert captions(tmp_path) == [("a.jpg", "one"), ("a.png", "one"), ("a.v2.png", "two")]


def files_layout(folder: Path) -> Path:
    """What img2dataset writes with `output_format="files"` and a column of captions."""
    for shard in range(2):
        for number in range(2):
            key = f"{shard:05d}{number:04d}"
            about = {"caption": f"c{key}", "alt": f"alt {key}", "url": "http://x", "key": key, "status": "success"}
            texts = {f"{shard:05d}/{key}.txt": f"c{key}", f"{shard:05d}/{key}.json": json.dumps(about, indent=4)}
            written(folder, {f"{shard:05d}/{key}.jpg": None, **texts})
        written(folder, {f"{shard:05d}_stats.json": json.dumps({"count": 2, "successes": 2})})
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return folder


def test_the_files_of_img2dataset(tmp_path: Path) -> None:
    keys = ["000000000", "000000001", "000010000", "000010001"]
    wanted = [(f"{key[:5]}/{key}.jpg", f"c{key}") for key in keys]
    folder = files_layout(tmp_path)
    assert captions(folder) == wanted
    assert [text for _, text in captions(folder, "alt")] == [f"alt {key}" for key in keys]
    for path in folder.rglob("*.txt"):
        path.unlink()
    assert captions(folder) == wanted, "without .txt, the caption is in the .json"


def test_folders_of_kohyas_trainers_say_how_often_a_picture_counts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written(
        tmp_path,
        {
            "3_sks dog/1.png": None,
            "3_sks dog/1.txt": "a dog\nwhat trainers do not read",
            "3_sks dog/2.png": None,
            "1_dog/1.webp": None,
            "1_dog/1.caption": "another dog",
        },
    )
    dogs = [("3_sks dog/1.png", "a dog")] * 3 + [("3_sks dog/2.png", "sks dog")] * 3
    assert captions(tmp_path) == [("1_dog/1.webp", "another dog"), *dogs]
    assert f"{tmp_path}: a picture counts as often as its folder says (1_dog 1, 3_sks dog 3)" in capfd.readouterr().err


@pytest.mark.parametrize("other", ["misc/1.png", "1.png", "3_dog/deeper/1.png", "0_cat/1.png"])
def test_folders_of_which_only_some_say_how_often_are_refused(tmp_path: Path, other: str) -> None:
    written(tmp_path, {"3_dog/1.png": None, "3_dog/1.txt": "a", other: None})
    place = other.rpartition("/")[0] or "no folder"
    assert refused(tmp_path) == (
        f"{tmp_path} has pictures in 3_dog, which count as often as the name says, and in {place}, "
        f"which says no number; rename one, or write a metadata.csv"
    )


def test_numbers_alone_are_names(tmp_path: Path) -> None:
    assert len(captions(written(tmp_path, {"00002/1.png": None, "00002/1.txt": "a"}))) == 1


def test_pictures_without_captions_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    written(tmp_path, {"1.png": None, "1.txt": "a", "2.png": None, "10.png": None})
    assert refused(tmp_path) == (
        f"2 of 3 pictures in {tmp_path} have no caption beside them, first 2.png; "
        f"write a .txt of the same name, or take it away"
    )


def test_captions_without_pictures_are_mentioned(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, {"1.png": None, "1.txt": "a", "2.txt": "b", "README.txt": "c", "x.json": "{}", ".hidden.txt": ""})
    assert len(captions(tmp_path)) == 1
    assert f"{tmp_path}: 2 captions have no picture and are left out, first 2.txt" in capfd.readouterr().err


def test_two_captions_beside_one_picture_are_refused_unless_one_is_asked_for(tmp_path: Path) -> None:
    written(tmp_path, {"1.png": None, "1.txt": "red", "1.caption": "blue", "1.alt": "green"})
    assert refused(tmp_path).startswith(f"{tmp_path}/1.png has a caption in a .txt and in a .caption; remove one, or")
    assert [captions(tmp_path, suffix)[0][1] for suffix in ("txt", "caption", "alt")] == ["red", "blue", "green"]


def test_a_folder_without_any_caption_says_what_it_could_have(tmp_path: Path) -> None:
    assert refused(written(tmp_path, {"1.png": None})) == (
        f"{tmp_path} has no metadata.csv or metadata.jsonl, and no .txt or .caption beside its pictures; "
        f"write one with the columns file_name,text"
    )
    written(tmp_path, {"train/1.png": None, "train/metadata.csv": "file_name,text\n1.png,red\n"})
    assert refused(tmp_path).endswith(f"beside its pictures; give {tmp_path}/train")


def test_a_folder_without_the_captions_that_are_asked_for_says_which_they_are(tmp_path: Path) -> None:
    written(tmp_path, {"1.png": None, "1.txt": "red", "2.png": None, "2.txt": "blue"})
    assert refused(tmp_path, text="caption") == (
        f"{tmp_path} has no metadata.csv or metadata.jsonl, and no .caption and no entry 'caption' in a .json beside "
        f"its pictures; give another --text_column, or leave it out"
    )
    written(tmp_path, {"1.caption": "red"})
    assert refused(tmp_path, text="caption").endswith(
        "have no caption beside them, first 2.png; write a .caption of the same name, or take it away"
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("1.txt", b"caf\xe9", "has no readable caption"),
        ("1.json", b"{", "has no readable caption"),
        ("1.json", b"[1]", "has no readable caption (its JSON has no text or caption or prompt)"),
        ("1.json", b'{"caption": null}', "has the caption None, which is no text"),
        ("1.json", b'{"caption": 12}', "has the caption 12, which is no text"),
    ],
)
def test_a_caption_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (written(tmp_path, {"1.png": None}) / name).write_bytes(content)
    (picture,) = read_source(tmp_path).pictures
    with pytest.raises(InputError) as error:
        _ = picture.text
    assert str(error.value).startswith(f"{tmp_path}/1.png {reason}")


@pytest.mark.parametrize("option", ["image", "split"])
def test_options_that_mean_nothing_here_are_refused(tmp_path: Path, option: str) -> None:
    written(tmp_path, {"1.png": None, "1.txt": "red"})
    name = {"image": "image_column"}.get(option, option)
    assert refused(tmp_path, **{option: "x"}) == (
        f"data {tmp_path} is a folder of pictures with captions beside them, "
        f"where --{name} x means nothing; leave it out"
    )


def test_what_is_asked_for_and_not_there_is_named(tmp_path: Path) -> None:
    written(tmp_path, {"1.png": None, "1.txt": "red", "1.json": '{"caption": "blue"}'})
    (picture,) = read_source(tmp_path, text="alt").pictures
    with pytest.raises(InputError, match=r"has no readable caption \(its JSON has no alt\)"):
        _ = picture.text


def test_other_captions_or_pictures_have_another_digest(tmp_path: Path) -> None:
    written(tmp_path, {"1.png": None, "1.txt": "red"})
    digests = [read_source(tmp_path).digest for _ in range(2)]
    assert digests[0] == digests[1]
    written(tmp_path, {"1.txt": "green"})
    digests.append(read_source(tmp_path).digest)
    written(tmp_path, {"2.png": None, "2.txt": "red"})
    digests.append(read_source(tmp_path).digest)
    assert len(set(digests)) == 3
