"""Folders of captioned pictures: the two metadata forms, pictures of every kind, and what is refused."""

import csv
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.data.folder import read_captions
from bksdm.data.pictures import Captioned, PictureSamples, flips, open_picture, to_pixels, was_flagged
from tiny_models import CAPTIONS, PICTURE, build_tokenizer, tokenize

SIZE = 32


def folder_with(folder: Path, metadata: str | bytes, name: str = "metadata.jsonl") -> Path:
    """A folder with one picture, `a.png`, and this metadata file."""
    Image.new("RGB", (4, 4), "red").save(folder / "a.png")
    (folder / name).write_bytes(metadata.encode() if isinstance(metadata, str) else metadata)
    return folder


def table(folder: Path, form: str, rows: list[dict[str, str]]) -> Path:
    """A folder with one picture and a metadata file of this form."""
    folder_with(folder, "", f"metadata.{form}")
    file = folder / f"metadata.{form}"
    if form == "csv":
        with file.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif form == "jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        read_captions(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def opened(path: Path) -> Image.Image:
    image = open_picture(path)
    assert image.mode == "RGB"
    return image


# Captions


def test_jsonl_gives_pictures_and_captions_in_its_order(pictures: Path) -> None:
    entries = read_captions(pictures)
    assert entries == [Captioned(pictures / f"{index}.png", text, pictures) for index, text in enumerate(CAPTIONS)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_gives_the_same(tmp_path: Path, newline: str, encoding: str) -> None:
    text = newline.join(["file_name,text", 'a.png,"a red, red square"', "a.png,été", ""])
    folder = folder_with(tmp_path, text.encode(encoding), "metadata.csv")
    assert [entry.text for entry in read_captions(folder)] == ["a red, red square", "été"]


@pytest.mark.parametrize(
    "caption", ["", "with, comma", 'with "quotes"', "été 文字", "  spaces ", "a\u2028b", "a\x85b", "a\x0bb", "a\x1cb"]
)
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_any_caption_comes_back_as_it_was_written(tmp_path: Path, form: str, caption: str) -> None:
    folder = table(tmp_path, form, [{"file_name": "a.png", "text": text} for text in (caption, "the next")])
    assert [entry.text for entry in read_captions(folder)] == [caption, "the next"]


def test_a_csv_caption_may_span_lines(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 'file_name,text\na.png,"two\nlines"\na.png,one\n', "metadata.csv")
    assert [entry.text for entry in read_captions(folder)] == ["two\nlines", "one"]


def test_other_columns_and_empty_lines_do_not_matter(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, '\n{"file_name": "a.png", "text": "red", "width": 4}\n\n')
    assert [entry.text for entry in read_captions(folder)] == ["red"]


def test_pictures_may_lie_in_folders(tmp_path: Path) -> None:
    folder_with(tmp_path, '{"file_name": "deep/a.png", "text": "red"}')
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "deep" / "a.png")
    (entry,) = read_captions(tmp_path)
    assert (entry.name, entry.path, entry.text) == ("deep/a.png", tmp_path / "deep" / "a.png", "red")


@pytest.mark.parametrize("column", ["text", "caption", "prompt", "Caption", "TEXT"])
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_the_column_of_captions_may_have_its_other_names(tmp_path: Path, form: str, column: str) -> None:
    texts = ["red", "None", "7"]
    folder = table(tmp_path, form, [{"file_name": "a.png", "width": "4", column: text} for text in texts])
    assert [entry.text for entry in read_captions(folder)] == texts


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_of_several_columns_text_is_the_caption_unless_another_is_asked_for(tmp_path: Path, form: str) -> None:
    row = {"file_name": "b.png", "prompt": "one", "caption": "two", "text": "three", "alt": "four", "image": "a.png"}
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    folder = table(tmp_path, form, [row])
    assert [(entry.name, entry.text) for entry in read_captions(folder)] == [("b.png", "three")]
    assert [(entry.name, entry.text) for entry in read_captions(folder, "image", "alt")] == [("a.png", "four")]


def test_two_tables_are_refused(tmp_path: Path) -> None:
    folder_with(tmp_path, "file_name,text\na.png,x\n", "metadata.csv")
    assert refused(folder_with(tmp_path, "")) == f"{tmp_path} has metadata.jsonl and metadata.csv; remove one"


def test_a_picture_may_have_several_captions(tmp_path: Path) -> None:
    line = '{"file_name": "a.png", "text": "red"}\n'
    assert len(read_captions(folder_with(tmp_path, line * 3))) == 3


# Folders that are refused


@pytest.mark.parametrize("name", ["nowhere", "file.txt"])
def test_what_is_not_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("text")
    assert refused(tmp_path / name).startswith(f"{tmp_path / name} is not a folder; give a folder of pictures")


def test_a_folder_without_metadata(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    message = refused(tmp_path)
    assert message == f"{tmp_path} has no metadata.csv or metadata.jsonl; write one with the columns file_name,text"


@pytest.mark.parametrize(
    ("name", "text"), [("metadata.jsonl", ""), ("metadata.jsonl", "\n"), ("metadata.csv", "file_name,text\n")]
)
def test_metadata_that_lists_nothing(tmp_path: Path, name: str, text: str) -> None:
    assert f"{tmp_path / name} lists no pictures" in refused(folder_with(tmp_path, text, name))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name"', "line 2 is not JSON"),
        ("metadata.jsonl", "\n\nfile_name,text\n", "line 3 is not JSON"),
        ("metadata.jsonl", '["a.png", "x"]', "line 1 is not an object"),
        (
            "metadata.jsonl",
            '{"text": "x"}',
            "has no column file_name, only text; rename one, or give --image_col",
        ),
        ("metadata.jsonl", '{"file_name": "a.png"}', "has no column text or caption or prompt, only file_name; rename"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": null}', "line 1 has no text; mend or remove it"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 7}', "line 1 has the text 7, which is no text; mend or"),
        ("metadata.jsonl", '{"file_name": 7, "text": "x"}', "line 1 has the file_name 7, which is no text; mend or"),
        ("metadata.jsonl", '{"file_name": "", "text": "x"}', "lists 1 of 1 pictures that are not there"),
        ("metadata.csv", "image,text\na.png,x\n", "has no column file_name, only image, text; rename one, or give"),
        ("metadata.csv", "file_name;text\na.png;x\n", "has no column file_name, only file_name;text; rename one"),
        ("metadata.csv", "file_name,url\na.png,x\n", "has no column text or caption or prompt, only file_name, url;"),
        ("metadata.csv", "file_name,text,text\na.png,x,y\n", "has two columns of one name (file_name, text, text)"),
        ("metadata.csv", "file_name,text\na.png,red, round\n", "line 2 has more columns than the first line; mend it"),
        ("metadata.csv", "file_name,text\na.png,x\na.png\n", "line 3 has no text"),
        ("metadata.parquet", "PAR1", "is cut short or no parquet file"),
        ("metadata.csv", 'file_name,text\na.png,"x\ny"\na.png\n', "line 4 has no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    assert f"{tmp_path / name} {message}" in refused(folder_with(tmp_path, text, name))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path, "file_name,text\na.png,été\n".encode("latin-1"), name)
    assert f"{tmp_path / name} is not UTF-8 text" in refused(folder)


@pytest.mark.parametrize("words", [3, 50_000])
def test_a_quote_that_is_never_closed_does_not_swallow_the_lines_after_it(tmp_path: Path, words: int) -> None:
    text = 'file_name,text\na.png,"red\n' + "a.png,green\n" * words
    assert "is not CSV" in refused(folder_with(tmp_path, text, "metadata.csv"))


def test_pictures_that_are_not_listed_are_mentioned(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more").mkdir()
    for name in ("more/b.png", "2.png", "10.jpg", ".hidden.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    folder_with(tmp_path, "file_name,text\n./a.png,red\nmore/b.png,blue\n", "metadata.csv")
    assert len(read_captions(tmp_path)) == 2
    said = f"{tmp_path}: 2 pictures are not in metadata.csv and are left out: 2.png, 10.jpg"
    assert capfd.readouterr().err.splitlines() == [said]
    for number in range(3, 10):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    read_captions(tmp_path)
    assert capfd.readouterr().err.endswith(": 2.png, 3.png, 4.png, 5.png, 6.png and 4 more\n")


def test_pictures_that_are_not_there_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in ("a.png", "b.png", "c.png")]
    message = refused(folder_with(tmp_path, "\n".join(lines)))
    assert "lists 2 of 3 pictures that are not there, first b.png; add them or remove their lines" in message


# Pictures of every kind


@pytest.mark.parametrize("form", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_every_common_file_type_opens(tmp_path: Path, form: str) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / f"a.{form}")
    assert all(
        abs(x - y) <= 8 for x, y in zip(opened(tmp_path / f"a.{form}").getpixel((4, 4)), (255, 0, 0), strict=True)
    )


@pytest.mark.parametrize(("mode", "colour", "wanted"), [("L", 100, 100), ("1", 1, 255), ("I;16", 0x8000, 128)])
def test_greyscale_becomes_grey(tmp_path: Path, mode: str, colour: int, wanted: int) -> None:
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
    assert opened(tmp_path / "a.png").getpixel((1, 1)) == pytest.approx((wanted,) * 3, abs=1)


@pytest.mark.parametrize("level", [0, 0x0100, 0x4000, 0xFFFF])
def test_sixteen_bits_become_eight(tmp_path: Path, level: int) -> None:
    Image.new("I;16", (4, 4), level).save(tmp_path / "a.png")
    assert opened(tmp_path / "a.png").getpixel((1, 1)) == pytest.approx((level / 257,) * 3, abs=1)


@pytest.mark.parametrize(
    ("mode", "colour", "wanted"),
    [
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("LA", (0, 255), (0, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)),
    ],
)
def test_transparency_lies_on_white(tmp_path: Path, mode: str, colour: tuple, wanted: tuple) -> None:
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
    assert opened(tmp_path / "a.png").getpixel((1, 1)) == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize("form", ["png", "gif"])
def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path: Path, form: str) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / f"a.{form}", transparency=0)
    assert [opened(tmp_path / f"a.{form}").getpixel(at) for at in ((0, 0), (1, 1))] == [(255, 255, 255), (0, 0, 255)]


def test_a_palette_without_transparency_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.save(tmp_path / "a.png")
    assert opened(tmp_path / "a.png").getpixel((1, 1)) == (0, 0, 255)


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (0, 0, 0)), ("L", 0)])
def test_a_transparent_colour_without_alpha_lies_on_white(tmp_path: Path, mode: str, colour: object) -> None:
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png", transparency=colour)
    assert opened(tmp_path / "a.png").getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["jpg", "tiff"])
def test_print_colours_become_rgb(tmp_path: Path, form: str) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / f"a.{form}")
    red, green, blue = opened(tmp_path / f"a.{form}").getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_that_the_camera_turned_stands_upright(tmp_path: Path, orientation: int) -> None:
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = Image.new("RGB", (6, 4), "white")
    ImageDraw.Draw(upright).rectangle((0, 0, 2, 1), fill="red")
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert opened(tmp_path / "a.png").size == (6, 4)
    assert opened(tmp_path / "a.png").tobytes() == upright.tobytes()


# Pictures that are refused


@pytest.fixture
def no_pillow_warnings() -> Iterator[None]:
    """Pillow warns of what it then refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def unreadable(path: Path) -> str:
    with pytest.raises(InputError) as error:
        open_picture(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", bytes(500)])
def test_a_file_that_is_not_a_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    message = unreadable(tmp_path / "a.png")
    assert "is not a readable picture" in message
    assert message.endswith("replace or remove it")


@pytest.mark.usefixtures("no_pillow_warnings")
@pytest.mark.parametrize("form", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_a_picture_that_is_cut_short(tmp_path: Path, form: str) -> None:
    noise = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / f"whole.{form}")
    whole = (tmp_path / f"whole.{form}").read_bytes()
    for length in range(0, int(0.9 * len(whole)), max(1, len(whole) // 50)):
        (tmp_path / f"a.{form}").write_bytes(whole[:length])
        assert "is not a readable picture" in unreadable(tmp_path / f"a.{form}"), length


@pytest.mark.usefixtures("no_pillow_warnings")
@pytest.mark.parametrize("form", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_a_damaged_byte_gives_a_picture_or_a_refusal(tmp_path: Path, form: str) -> None:
    Image.effect_noise((16, 16), 50).convert("RGB").save(tmp_path / f"whole.{form}")
    whole = (tmp_path / f"whole.{form}").read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        damaged = whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :]
        (tmp_path / f"a.{form}").write_bytes(damaged)
        try:
            opened(tmp_path / f"a.{form}")
        except InputError as error:
            assert "is not a readable picture" in str(error)  # noqa: PT017


def test_a_picture_that_is_not_there(tmp_path: Path) -> None:
    assert unreadable(tmp_path / "a.png") == f"{tmp_path / 'a.png'} does not exist"


def test_a_folder_in_place_of_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    assert "is not a readable picture" in unreadable(tmp_path / "a.png")


def test_a_picture_far_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "is not a readable picture" in unreadable(tmp_path / "a.png")
    assert not was_flagged(tmp_path / "a.png"), "what reads it says what is wrong"


# Pixels


def thirds(width: int, height: int) -> Image.Image:
    """Red, green and blue side by side; the green square is in the middle."""
    image = Image.new("RGB", (width, height), "lime")
    side = (width - height) // 2
    image.paste("red", (0, 0, side, height))
    image.paste("blue", (width - side, 0, width, height))
    return image


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("turn", [Image.Transpose.ROTATE_180, Image.Transpose.TRANSPOSE])
def test_the_centre_square_is_taken(scale: int, turn: Image.Transpose) -> None:
    pixels = to_pixels(thirds(64 * scale, 32 * scale).transpose(turn), SIZE)
    inside = pixels[:, 2:-2, 2:-2]  # at the rim, scaling down mixes in what lies beside the square
    assert torch.equal(inside, torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1).expand_as(inside))
    assert (pixels[1] > 0.5).all()


@pytest.mark.parametrize("side", [1, 16, 31, 32, 33, 100])
def test_any_square_is_scaled_to_the_size(side: int) -> None:
    pixels = to_pixels(Image.new("RGB", (side, side), (255, 0, 51)), SIZE)
    assert pixels.shape == (3, SIZE, SIZE)
    assert pixels.dtype == torch.float32
    assert pixels.mean(dim=(1, 2)).tolist() == pytest.approx([1.0, -1.0, -0.6], abs=1e-6)


def test_a_picture_of_the_right_size_stays_as_it_is() -> None:
    image = Image.effect_noise((SIZE, SIZE), 80).convert("RGB")
    restored = ((to_pixels(image, SIZE) + 1) * 127.5).round().byte().permute(1, 2, 0)
    assert Image.fromarray(restored.numpy()).tobytes() == image.tobytes()


def test_a_flip_mirrors_left_and_right() -> None:
    image = Image.effect_noise((40, 60), 80).convert("RGB")
    assert torch.equal(to_pixels(image, SIZE, flip=True), to_pixels(image, SIZE).flip(-1))


# Samples


def samples(folder: Path, *, flip: bool = False, size: int = PICTURE) -> PictureSamples:
    tokenizer = build_tokenizer()
    return PictureSamples(read_captions(folder), size, lambda text: tokenize(tokenizer, text), flip)


def flipped(pixels: Tensor) -> bool:
    """The pictures of the fixture are white on the right."""
    return bool((pixels[:, :, 0] == 1).all())


def test_a_sample_is_pixels_and_tokens(pictures: Path) -> None:
    tokenizer, found = build_tokenizer(), samples(pictures)
    assert len(found) == 8
    for index, text in enumerate(CAPTIONS):
        sample = found.sample(index, 0)
        assert sample.keys() == {"pixel_values", "input_ids"}
        assert torch.equal(sample["pixel_values"], to_pixels(open_picture(pictures / f"{index}.png"), PICTURE))
        assert torch.equal(sample["input_ids"], tokenize(tokenizer, text))


def test_pictures_are_scaled(pictures: Path) -> None:
    assert samples(pictures, size=16).sample(0, 0)["pixel_values"].shape == (3, 16, 16)


def test_without_flips_no_picture_is_mirrored(pictures: Path) -> None:
    assert not any(flipped(samples(pictures).sample(0, seed)["pixel_values"]) for seed in range(20))


def test_with_flips_the_seed_decides(pictures: Path) -> None:
    found = samples(pictures, flip=True)
    mirrored = [flipped(found.sample(0, seed)["pixel_values"]) for seed in range(100)]
    assert mirrored == [flipped(found.sample(0, seed)["pixel_values"]) for seed in range(100)]
    assert mirrored == [flips(seed) for seed in range(100)]
    assert 35 <= sum(mirrored) <= 65
