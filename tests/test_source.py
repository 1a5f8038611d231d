"""What DATA may be: folders, tars and data sets give the same pictures and captions."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageChops

from bksdm.common.errors import InputError
from bksdm.data.source import read_source
from bksdm.data.tars import TarPicture, read_tars
from tiny_models import CAPTIONS

datasets.disable_progress_bars()
pytestmark = pytest.mark.usefixtures("own_data_cache")


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
    found = read_tars([tars / "00000.tar"], text="alt")
    assert [picture.text for picture in found] == [f"alt {row}" for row in range(4)]


def test_without_txt_the_caption_is_in_the_json(pictures: Path, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", sample(pictures, 0, json=described(0)))
    assert [picture.text for picture in read_tars([tar])] == [CAPTIONS[0]]


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "jfif", "png", "tiff", "avif", "heic"])
def test_a_picture_of_any_kind_makes_a_sample(pictures: Path, tmp_path: Path, suffix: str) -> None:
    held = (pictures / "0.png").read_bytes()
    (picture,) = read_tars([write_tar(tmp_path / "a.tar", {f"0.{suffix}": held, "0.TXT": b"red"})])
    assert (picture.text, picture.open().size) == ("red", (32, 32))


def files_in(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        return {info.name: opened.extractfile(info).read() for info in opened}


def test_the_order_of_the_files_does_not_matter(tars: Path, pictures: Path) -> None:
    """As where all pictures lie before all captions."""
    for tar in tars.glob("*.tar"):
        write_tar(tar, dict(sorted(files_in(tar).items(), key=lambda file: (file[0].rpartition(".")[2], file[0]))))
    assert_the_pictures(tars, pictures)


def test_what_a_mac_adds_does_not_matter(tars: Path, pictures: Path) -> None:
    double = b"\0\5\x16\7"
    for tar in list(tars.glob("*.tar")):
        pairs = [(f"._{name}", double, name, content) for name, content in files_in(tar).items()]
        beside = {name: held for first, one, second, two in pairs for name, held in ((first, one), (second, two))}
        write_tar(tar, {"._.": double, ".DS_Store": double, **beside})
        (tars / f"._{tar.name}").write_bytes(double)
    assert_the_pictures(tars, pictures)


DOTTED = [
    "4.5 m",
    "4.6 m",
    "4",
    "Screenshot 2026-01-02 at 12.30.45",
    "Screenshot 2026-01-02 at 12.30.46",
    "img.final",
    "img.FINAL",
    "a..b",
    "v1.0/x.y",
]


@pytest.mark.parametrize(("image", "caption"), [("png", "txt"), ("png", "json"), ("JPG", "caption")])
def test_names_may_have_dots(pictures: Path, tmp_path: Path, image: str, caption: str) -> None:
    files = {}
    for name in DOTTED:
        text = json.dumps({"caption": name}) if caption == "json" else name
        files |= {f"{name}.{image}": (pictures / "0.png").read_bytes(), f"{name}.{caption}": text.encode()}
    found = read_tars([write_tar(tmp_path / "a.tar", files)])
    assert {picture.name: picture.text for picture in found} == {f"a.tar/{name}": name for name in DOTTED}


def test_what_follows_the_first_dot_may_say_what_a_file_is(pictures: Path, tmp_path: Path) -> None:
    held = (pictures / "0.png").read_bytes()
    files = {"0.jpg": held, "0.mask.png": held, "0.txt": b"red", "0.left.depth.png": held, "0.seg.npy": b""}
    (picture,) = read_tars([write_tar(tmp_path / "a.tar", files)])
    assert (picture.name, picture.text, picture.image.name) == ("a.tar/0", "red", "0.jpg")


def without_caption(picture: TarPicture) -> str:
    with pytest.raises(InputError) as error:
        _ = picture.text
    return str(error.value)


def test_a_sample_without_caption_among_names_with_dots_is_named(pictures: Path, tmp_path: Path) -> None:
    held = (pictures / "0.png").read_bytes()
    files = {"v1.0.png": held, "v1.0.txt": b"red", "v1.1.png": held, "w1.0.png": held}
    first, second, third = read_tars([write_tar(tmp_path / "a.tar", files)])
    assert first.text == "red"
    assert without_caption(second) == "a.tar/v1.1 has no caption, only png; add one or remove it"
    assert without_caption(third).startswith("a.tar/w1 has 0.png, and which of them is the picture is not plain; name")


def test_files_of_other_names_are_asked_for(pictures: Path, tmp_path: Path) -> None:
    before, after = ((pictures / f"{index}.png").read_bytes() for index in range(2))
    files = {"0.input.jpg": before, "0.edited.jpg": after, "0.prompt.txt": b"make it green"}
    tar = write_tar(tmp_path / "a.tar", files)
    (picture,) = read_source(tar, "edited.jpg", "prompt.txt").pictures
    assert (picture.content(), picture.text) == (after, "make it green")
    assert without_caption(read_tars([tar])[0]) == (
        "a.tar/0 has input.jpg, edited.jpg, prompt.txt, and which of them is the picture is not plain; "
        "name it by --image_column, and its caption by --text_column, to bksdm prepare"
    )
    assert "a.tar/0 has input.jpg, edited.jpg" in without_caption(read_tars([tar], "other.jpg")[0])


def test_of_two_pictures_one_is_asked_for(pictures: Path, tmp_path: Path) -> None:
    held = [(pictures / f"{index}.png").read_bytes() for index in range(2)]
    tar = write_tar(tmp_path / "a.tar", {"0.jpg": held[0], "0.png": held[1], "0.txt": b"red"})
    assert "a.tar/0 has jpg, png, txt, and which of them is the picture" in without_caption(read_tars([tar])[0])
    assert [read_tars([tar], kind)[0].content() for kind in ("jpg", "png")] == held


def test_tars_joined_with_keys_that_begin_anew_keep_all_samples(pictures: Path, tmp_path: Path) -> None:
    held = [(pictures / f"{index}.png").read_bytes() for index in range(3)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for index, content in enumerate(held):
            for name, part in (("0.png", content), ("0.txt", str(index).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    found = read_tars([tmp_path / "a.tar"])
    assert [(picture.text, picture.content()) for picture in found] == [(str(n), one) for n, one in enumerate(held)]


def test_links_in_a_tar(pictures: Path, tmp_path: Path) -> None:
    shutil.copy(pictures / "0.png", tmp_path)
    (tmp_path / "1.png").hardlink_to(tmp_path / "0.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "0.png")
    for tar, names in (("a.tar", ["0.png", "1.png"]), ("b.tar", ["0.png", "2.png"])):
        with tarfile.open(tmp_path / tar, "w") as opened:
            for name in names:
                opened.add(tmp_path / name, name)
    first, second = read_tars([tmp_path / "a.tar"])
    assert first.content() == second.content() == (pictures / "0.png").read_bytes()
    assert refused(tmp_path / "b.tar") == f"{tmp_path}/b.tar has 2.png as a link; make it again with tar --dereference"


def test_captions_without_pictures_are_mentioned(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {"readme.txt": b"hello", **sample(pictures, 1, txt=b"one"), "000000002.txt": b"no", "stats.json": b"{}"}
    assert len(read_tars([write_tar(tmp_path / "a.tar", files)])) == 1
    assert "2 captions have no picture and are left out, first a.tar/readme" in capfd.readouterr().err


@pytest.mark.parametrize("beside", ["a.png", "00002.tar.gz", "b.zip"])
def test_tars_with_other_data_beside_them_are_refused(tars: Path, beside: str) -> None:
    (tars / beside).write_bytes(b"x")
    suffix = beside.rpartition(".")[2]
    assert refused(tars) == f"{tars} has .{suffix} beside its tars; unpack or take away those"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "a.tgz"])
def test_packed_data_are_to_be_unpacked(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path / name) == f"{tmp_path / name} is packed; unpack it and give the folder"


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


def test_a_part_of_a_saved_data_set(
    table: datasets.Dataset, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": table.select([0]), "all": table}).save_to_disk(saved)
    assert len(read_source(saved).pictures) == 1
    assert f"data {saved} has the parts train 1, all 8; train is read" in capfd.readouterr().err
    assert_the_pictures(saved, pictures, split="all")
    message = "has no part 'test'; give --split to bksdm prepare, one of train, all"
    assert message in refused(saved, split="test")


@pytest.mark.parametrize("caption", ["text", "caption", "Prompt"])
@pytest.mark.parametrize("image", ["image", "jpg"])
def test_the_only_pictures_and_usual_captions_are_found(
    table: datasets.Dataset, pictures: Path, tmp_path: Path, image: str, caption: str
) -> None:
    table.rename_columns({"image": image, "text": caption}).save_to_disk(tmp_path / "saved")
    assert_the_pictures(tmp_path / "saved", pictures)


def test_columns_that_are_not_plain_are_asked_for(table: datasets.Dataset, pictures: Path, tmp_path: Path) -> None:
    mask = [str(pictures / f"{index}.png") for index in range(8)]
    table = table.rename_columns({"image": "jpg", "text": "alt"}).add_column("mask", mask)
    saved = tmp_path / "saved"
    table.cast_column("mask", datasets.Image()).save_to_disk(saved)
    assert_the_pictures(saved, pictures, image="jpg", text="alt")
    assert "has no column image, only jpg, alt, mask; rename one, or give --image_column to" in refused(saved)
    assert "has no column text or caption or prompt, only alt, mask;" in refused(saved, image="jpg")
    assert "no column 'x'; give --text_column, one of alt, mask" in refused(saved, image="jpg", text="x")


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


# Parquet

COLUMNS = {
    "binary": lambda held: pa.array(held, pa.binary()),
    "large binary": lambda held: pa.array(held, pa.large_binary()),
    "struct": lambda held: pa.array([{"bytes": one, "path": f"{n}.png"} for n, one in enumerate(held)]),
    "struct of bytes": lambda held: pa.array([{"bytes": one} for one in held]),
}


def held_in(pictures: Path) -> list[bytes]:
    return [(pictures / f"{index}.png").read_bytes() for index in range(8)]


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize(("image", "caption"), [("image", "text"), ("jpg", "caption")])
def test_parquet_holds_pictures_as_bytes(pictures: Path, tmp_path: Path, kind: str, image: str, caption: str) -> None:
    columns = {image: COLUMNS[kind](held_in(pictures)), "url": ["x"] * 8, caption: CAPTIONS}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert_the_pictures(tmp_path / "a.parquet", pictures)
    assert_the_pictures(tmp_path, pictures)


def test_parquet_as_datasets_writes_it(table: datasets.Dataset, pictures: Path, tmp_path: Path) -> None:
    table.to_parquet(tmp_path / "a.parquet")
    assert_the_pictures(tmp_path / "a.parquet", pictures)


def test_the_parquet_of_img2dataset(pictures: Path, tmp_path: Path) -> None:
    """With `output_format="parquet"`: what was not downloaded is a row without a picture."""
    held = held_in(pictures)
    for shard, indices in enumerate((range(4), range(4, 8))):
        captions = [CAPTIONS[index] for index in indices]
        columns = {
            "key": [f"{shard:05d}{number:04d}" for number in range(5)],
            "caption": [*captions, "gone"],
            "status": ["success"] * 4 + ["failed_to_download"],
            "jpg": pa.array([*(held[index] for index in indices), None], pa.binary()),
            "txt": [*captions, None],
        }
        pq.write_table(pa.table(columns), tmp_path / f"{shard:05d}.parquet")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
        (tmp_path / f"._{shard:05d}.parquet").write_bytes(b"\0")
    found = read_source(tmp_path).pictures
    assert [picture.text for picture in found] == [*CAPTIONS[:4], "gone", *CAPTIONS[4:], "gone"]
    assert found[5].content() == held[4]
    with pytest.raises(InputError, match="row 4 has no picture; mend or remove it"):
        found[4].open()


def test_parts_of_a_data_set_are_told_by_the_names_of_its_parquet_files(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for part, count in {"train": 8, "test": 2}.items():
        columns = {"image": held_in(pictures)[:count], "text": CAPTIONS[:count]}
        pq.write_table(pa.table(columns), tmp_path / "data" / f"{part}-00000-of-00001.parquet")
    Image.new("RGB", (2, 2)).save(tmp_path / "banner.png")
    (tmp_path / "README.md").write_text("a data set")
    assert_the_pictures(tmp_path, pictures)
    assert "has the parts test 1, train 1; train is read, and --split" in capfd.readouterr().err
    assert len(read_source(tmp_path, split="test").pictures) == 2
    assert "has no part 'all'; give --split to bksdm prepare, one of test, train" in refused(tmp_path, split="all")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PAR1", "cannot be loaded as a data set"),
        ({"image": ["a.png"], "text": ["red"]}, "the column 'image' holds no pictures but Value('string')"),
        ({"url": ["http://x"], "caption": ["red"]}, "has no column image, only url, caption; rename one, or give"),
        ({"image": [b"x"], "alt": ["red"]}, "has no column text or caption or prompt, only alt; rename one, or give"),
    ],
)
def test_parquet_without_pictures_or_captions_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / "a.parquet").write_bytes(content)
    else:
        pq.write_table(pa.table(content), tmp_path / "a.parquet")
    assert reason in refused(tmp_path / "a.parquet")


def test_parquet_that_is_not_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    assert refused(file) == f"{file} does not exist; give a .parquet or a folder of such"


# Options


def test_a_part_means_nothing_where_there_are_none(pictures: Path) -> None:
    message = refused(pictures, split="test")
    assert message == f"data {pictures} is a folder of pictures, where --split test means nothing; leave it out"


def test_parts_of_a_data_set_are_told_by_the_names_of_its_tars(
    tars: Path, pictures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tar(tars / "test" / "00000.tar", sample(pictures, 0, txt=b"held out"))
    assert_the_pictures(tars, pictures)
    assert capfd.readouterr().err == (
        f"data {tars} has the parts train 2, test 1; train is read, and --split of bksdm prepare takes another\n"
    )
    assert [picture.text for picture in read_source(tars, split="test").pictures] == ["held out"]
    assert read_source(tars / "test").pictures[0].text == "held out"
    assert not capfd.readouterr().err, "a part that is asked for, or the only one, needs no word"
    assert "has no part 'dev'; give --split to bksdm prepare, one of train, test" in refused(tars, split="dev")


def test_the_only_part_needs_no_name(table: datasets.Dataset, pictures: Path, tmp_path: Path) -> None:
    datasets.DatasetDict({"all": table}).save_to_disk(tmp_path / "saved")
    assert_the_pictures(tmp_path / "saved", pictures)


def test_columns_of_a_folder_of_pictures_count(pictures: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pictures, tmp_path / "data")
    lines = [json.dumps({"image": f"{n}.png", "alt": text, "text": "x"}) for n, text in enumerate(CAPTIONS)]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    assert_the_pictures(data, pictures, image="image", text="alt")
    message = refused(data, image="image", text="y")
    assert message == f"{data}/metadata.jsonl has no column 'y'; give --text_column, one of image, alt, text"


def test_a_data_set_that_is_nowhere_is_refused() -> None:
    assert "data nobody/nothing is no folder here and cannot be loaded as a data set" in refused("nobody/nothing")


def test_other_pictures_have_another_digest(table: datasets.Dataset, tars: Path, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "saved")
    table.select(range(7)).save_to_disk(tmp_path / "fewer")
    sources = [tmp_path / "saved", tmp_path / "fewer", tars, tars / "00000.tar"]
    assert len({read_source(source).digest for source in sources}) == 4
    assert read_source(tars).digest == read_source(tars).digest
    assert read_source(tmp_path / "saved").digest == read_source(tmp_path / "saved").digest
