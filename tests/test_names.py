"""Which files are pictures and in which order they come, in one place for all verbs."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from bksdm.common.errors import InputError
from bksdm.data import names
from bksdm.data.names import (
    PICTURES,
    check_order,
    holds_pictures,
    how_to_read,
    in_parts,
    kind,
    list_pictures,
    picture_names,
    readable_kinds,
)
from bksdm.data.pictures import open_picture


def filled(folder: Path, *files: str) -> Path:
    """A folder with small pictures under these names."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / name, format="PNG")
    return folder


def listed(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_pictures(folder)]


@pytest.mark.parametrize(
    "ordered",
    [
        ["0.png", "1.png", "2.png", "10.png", "23.png"],
        ["00000.png", "00001.png", "00010.png"],
        ["01.png", "2.png", "003.png"],
        ["a.png", "a (2).png", "a (10).png", "b.png"],
        ["cat-9-2.png", "cat-9-10.png", "cat-10-1.png"],
        ["1.5.png", "1.10.png"],
        ["2/9.png", "2/10.png", "10/1.png"],
        ["9.jpg", "10.PNG", "11.jpg"],
    ],
)
def test_numbers_in_names_count_as_numbers(tmp_path: Path, ordered: list[str]) -> None:
    assert listed(filled(tmp_path, *reversed(ordered))) == ordered


@pytest.mark.parametrize(
    ("first", "second"), [("01.png", "1.png"), ("1.jpg", "1.png"), ("a-007.png", "a-7.png"), ("01/3.png", "1/03.png")]
)
def test_two_pictures_of_one_number_have_no_plain_order(tmp_path: Path, first: str, second: str) -> None:
    found = picture_names(filled(tmp_path, first, second, "2.png"))
    with pytest.raises(InputError, match=f"{tmp_path} has {first} and {second}, and nothing says which comes first"):
        check_order(found, tmp_path)


def test_letters_before_numbers_give_an_order(tmp_path: Path) -> None:
    check_order(picture_names(filled(tmp_path, "a1.png", "b1.png", "a01b.png", "1/1.png", "1.png")), tmp_path)


def test_hidden_files_and_folders_named_as_pictures_do_not_count(tmp_path: Path) -> None:
    filled(tmp_path, "a.png", "._a.png", ".hidden/b.png", "x.png/inside.jpg")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", "png", "._00000.tar"):
        (tmp_path / name).write_bytes(b"\0")
    assert listed(tmp_path) == ["a.png", "x.png/inside.jpg"]


def test_links_are_followed_into_each_folder_once(tmp_path: Path) -> None:
    filled(tmp_path / "elsewhere", "b.png")
    filled(tmp_path / "data", "a.png")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    assert listed(tmp_path / "data") == ["a.png", "c.png", "more/b.png"]


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (filled(tmp_path, "a.png") / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=f"{tmp_path}/b.png is a link that leads nowhere; mend or remove it"):
        list_pictures(tmp_path)


def test_a_folder_holds_pictures_if_they_lie_in_itself(tmp_path: Path) -> None:
    (filled(tmp_path, "deep/a.png", "._a.png") / "folder.png").mkdir()
    assert not holds_pictures(tmp_path)
    assert not holds_pictures(tmp_path / "nowhere")
    assert holds_pictures(filled(tmp_path, "a.JPG"))


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path} has no pictures .*; give a folder of pictures"):
        list_pictures(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}/no is not a folder; give a folder of pictures"):
        list_pictures(tmp_path / "no")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("00000.tar", "train"),
        ("test-00000.tar", "test"),
        ("my_set-val.tar", "validation"),
        ("eval/00000.tar", "test"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/rest-00000-of-00002.parquet", "rest"),
        ("data/tested.parquet", "train"),
        ("contest.tar", "train"),
        ("0.test.parquet", "test"),
    ],
)
def test_names_tell_the_part_of_a_data_set(name: str, part: str) -> None:
    assert in_parts([name]) == {part: [name]}


# Kinds


COMMON = "png PNG jpg jpeg jpe JFIF webp avif gif bmp dib tif tiff jp2 ppm tga"


@pytest.mark.parametrize("suffix", COMMON.split())
def test_what_pillow_reads_counts(tmp_path: Path, suffix: str) -> None:
    form = Image.registered_extensions()[f".{suffix.lower()}"]
    Image.new("RGB", (16, 16), "red").save(tmp_path / f"a.{suffix}", format=form)
    assert listed(tmp_path) == [f"a.{suffix}"]
    red, green, blue = open_picture(tmp_path / f"a.{suffix}").getpixel((8, 8))
    assert red > 245
    assert max(green, blue) < 10


@pytest.mark.parametrize("suffix", ["heic", "HEIF", "hif"])
def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("pillow_heif")
    assert "heic" in readable_kinds()
    Image.new("RGB", (16, 16), "red").save(tmp_path / f"a.{suffix}", format="HEIF")
    assert listed(tmp_path) == [f"a.{suffix}"]
    assert open_picture(tmp_path / f"a.{suffix}").getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=8)


@pytest.fixture
def without_pillow_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where it was never installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    names.readable_kinds.cache_clear()
    yield
    names.readable_kinds.cache_clear()


@pytest.mark.usefixtures("without_pillow_heif")
def test_without_pillow_heif_a_heic_says_how_it_could_be_read(tmp_path: Path) -> None:
    (filled(tmp_path, "a.png", "b.png") / "c.HEIC").write_bytes(b"ftypheic")
    with pytest.raises(InputError) as error:
        list_pictures(tmp_path)
    assert str(error.value) == (
        f"1 of 3 pictures in {tmp_path} are of kinds that cannot be read here, first c.HEIC; "
        f"pip install 'bksdm[heif]' or convert it, or take it away"
    )
    with pytest.raises(InputError, match=r"c.HEIC is not a readable picture \(.*\); pip install 'bksdm\[heif\]'"):
        open_picture(tmp_path / "c.HEIC")


@pytest.mark.parametrize("name", ["a.jxl", "photo.CR2", "logo.svg", "x.exr"])
def test_pictures_that_nothing_here_reads_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (filled(tmp_path, "a.png") / name).write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match=f"1 of 2 pictures in {tmp_path} are .* first {name}; convert it to PNG"):
        list_pictures(tmp_path)


def test_every_kind_is_read_or_has_a_mend() -> None:
    assert all((kind(f"x.{suffix}") in readable_kinds()) != bool(how_to_read(f"x.{suffix}")) for suffix in PICTURES)
    assert how_to_read("a.txt") is None
