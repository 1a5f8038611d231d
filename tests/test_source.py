"""What DATA may be: folders, tars and data sets give the same pictures and captions."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image, ImageChops

from bksdm.data.source import read_source
from bksdm.data.tars import read_tars
from bksdm.errors import InputError
from tiny_models import CAPTIONS

datasets.disable_progress_bars()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(pictures: Path, index: int, **captions: bytes) -> dict[str, bytes]:
    """The files of one sample, as img2dataset writes them; captions by extension."""
    key = f"{index:09d}"
    image = {f"{key}.jpg": (pictures / f"{index}.png").read_bytes()}
    return image | {f"{key}.{kind}": content for kind, content in captions.items()}


def described(index: int) -> bytes:
    return json.dumps({"caption": CAPTIONS[index], "width": 32, "alt": f"alt {index}"}).encode()


@pytest.fixture
def tars(pictures: Path, tmp_path: Path) -> Path:
    """A folder of two tars of four samples."""
    for tar, rows in enumerate((range(4), range(4, 8))):
        files = [sample(pictures, row, txt=CAPTIONS[row].encode(), json=described(row)) for row in rows]
        write_tar(tmp_path / "tars" / f"{tar:05d}.tar", {name: held for some in files for name, held in some.items()})
        (tmp_path / "tars" / f"{tar:05d}_stats.json").write_text("{}")
    return tmp_path / "tars"


@pytest.fixture
def table(pictures: Path) -> datasets.Dataset:
    rows = {"image": [str(pictures / f"{index}.png") for index in range(8)], "text": list(CAPTIONS)}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def assert_the_pictures(source: str | Path, pictures: Path, **columns: str) -> None:
    found = read_source(source, **columns).pictures
    assert [picture.text for picture in found] == list(CAPTIONS)
    for index, picture in enumerate(found):
        with Image.open(pictures / f"{index}.png") as wanted:
            assert not ImageChops.difference(picture.open(), wanted.convert("RGB")).getbbox()
    assert len({picture.name for picture in found}) == 8


def refused(source: str | Path, **columns: str) -> str:
    with pytest.raises(InputError) as error:
        read_source(source, **columns)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_with_metadata(pictures: Path) -> None:
    assert_the_pictures(pictures, pictures)


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_the_embedded_art(part: str) -> None:
    assert read_source(f"emoji/{part}").pictures[0].open().size == (64, 64)


# Tars


def test_a_folder_of_tars(tars: Path, pictures: Path) -> None:
    assert_the_pictures(tars, pictures)
    assert [picture.name for picture in read_source(tars).pictures][:5] == [
        *(f"00000.tar/{row:09d}" for row in range(4)),
        "00001.tar/000000004",
    ]


def test_one_tar(tars: Path) -> None:
    assert [picture.text for picture in read_source(tars / "00001.tar").pictures] == list(CAPTIONS[4:])


def test_the_caption_may_be_in_the_json(tars: Path) -> None:
    assert [picture.text for picture in read_tars([tars / "00000.tar"], "alt")] == [f"alt {row}" for row in range(4)]


def test_without_txt_the_caption_is_in_the_json(pictures: Path, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", sample(pictures, 0, json=described(0)))
    assert [picture.text for picture in read_tars([tar])] == [CAPTIONS[0]]


@pytest.mark.parametrize(
    ("captions", "reason"),
    [
        ({}, "has no caption"),
        ({"json": b"{}"}, "has no readable caption"),
        ({"json": b"not json"}, "has no readable caption"),
        ({"json": b"[1]"}, "has no readable caption"),
        ({"json": b'{"caption": 7}'}, "has the caption 7, which is no text"),
        ({"txt": b"\xff\xfe\x00"}, "has no readable caption"),
    ],
)
def test_a_caption_that_cannot_be_read_is_named(
    captions: dict[str, bytes], reason: str, pictures: Path, tmp_path: Path
) -> None:
    (picture,) = read_tars([write_tar(tmp_path / "a.tar", sample(pictures, 0, **captions))])
    with pytest.raises(InputError, match=f"a.tar/000000000 {reason}"):
        _ = picture.text


def test_files_without_picture_are_no_samples(pictures: Path, tmp_path: Path) -> None:
    files = {"readme.txt": b"hello", **sample(pictures, 1, txt=b"one"), "000000002.txt": b"no picture"}
    assert [picture.text for picture in read_tars([write_tar(tmp_path / "a.tar", files)])] == ["one"]


def test_folders_inside_a_tar_keep_samples_apart(pictures: Path, tmp_path: Path) -> None:
    files = {
        f"{folder}/{name}": content
        for folder in ("a", "b")
        for name, content in sample(pictures, 0, txt=folder.encode()).items()
    }
    assert [picture.text for picture in read_tars([write_tar(tmp_path / "a.tar", files)])] == ["a", "b"]


def test_a_tar_that_is_cut_short_is_refused(tars: Path) -> None:
    tar = tars / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    assert refused(tars).startswith(f"{tar} is cut short or no tar")


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"hello" * 1000)
    assert "a.tar is cut short or no tar" in refused(tmp_path / "a.tar")


def test_a_tar_without_pictures_is_refused(tmp_path: Path) -> None:
    assert "holds no pictures" in refused(write_tar(tmp_path / "a.tar", {"a.txt": b"hello"}))


def test_a_tar_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "a.tar does not exist" in refused(tmp_path / "a.tar")


# Data sets


def test_a_saved_data_set(table: datasets.Dataset, pictures: Path, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "saved")
    assert_the_pictures(tmp_path / "saved", pictures)


def test_a_part_of_a_saved_data_set(table: datasets.Dataset, pictures: Path, tmp_path: Path) -> None:
    parts = datasets.DatasetDict({"train": table.select([0]), "all": table})
    parts.save_to_disk(tmp_path / "saved")
    assert len(read_source(tmp_path / "saved").pictures) == 1
    assert_the_pictures(tmp_path / "saved", pictures, split="all")
    assert "has no part 'test'; give one of train, all" in refused(tmp_path / "saved", split="test")


def test_columns_may_have_other_names(table: datasets.Dataset, pictures: Path, tmp_path: Path) -> None:
    table.rename_columns({"image": "jpg", "text": "caption"}).save_to_disk(tmp_path / "saved")
    assert_the_pictures(tmp_path / "saved", pictures, image="jpg", text="caption")
    assert "has no column 'image'; give --image_column, one of jpg, caption" in refused(tmp_path / "saved")
    assert "give --text_column" in refused(tmp_path / "saved", image="jpg")


def test_a_column_of_something_else_is_refused(table: datasets.Dataset, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "saved")
    assert "the column 'text' holds no pictures" in refused(tmp_path / "saved", image="text", text="image")


def test_rows_without_picture_or_caption_are_named(table: datasets.Dataset, tmp_path: Path) -> None:
    rows = {"image": [None, {"bytes": b"no picture", "path": None}], "text": ["a", None]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    first, second = read_source(tmp_path / "saved").pictures
    with pytest.raises(InputError, match="row 0 has no picture"):
        first.open()
    with pytest.raises(InputError, match="row 1 has the caption None"):
        _ = second.text
    with pytest.raises(InputError, match="row 1 is not a readable picture"):
        second.open()


def test_a_data_set_that_is_nowhere_is_refused() -> None:
    assert "data nobody/nothing is no folder here and cannot be loaded as a data set" in refused("nobody/nothing")


def test_other_pictures_have_another_digest(table: datasets.Dataset, tars: Path, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "saved")
    table.select(range(7)).save_to_disk(tmp_path / "fewer")
    sources = [tmp_path / "saved", tmp_path / "fewer", tars, tars / "00000.tar"]
    assert len({read_source(source).digest for source in sources}) == 4
    assert read_source(tars).digest == read_source(tars).digest
    assert read_source(tmp_path / "saved").digest == read_source(tmp_path / "saved").digest
