"""Any mode becomes RGB by one function, in training, in scores and in the runtime without torch."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bksdm.common.errors import InputError
from bksdm.data.pictures import open_picture
from bksdm.evaluate.preparation import prepare_real
from bksdm.runtime.rgb import as_rgb

RAMP = np.array([[0, 128, 257, 0x4000], [0x7FFF, 0x8000, 0xFF00, 0xFFFF]], np.uint16)
EIGHT = np.rint(RAMP / 257).astype(int)


def grey(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    pixels = np.asarray(picture).astype(int)
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_sixteen_bits_are_rounded_to_eight(kind: str) -> None:
    assert np.array_equal(grey(as_rgb(Image.fromarray(RAMP.astype(kind)))), EIGHT)


def test_sixteen_bits_in_32_are_sixteen() -> None:
    assert np.array_equal(grey(as_rgb(Image.fromarray(RAMP.astype(np.int32)))), EIGHT)


@pytest.mark.parametrize(("depth", "white"), [(65535, 65535), (4095, 4095), (255, 255)])
def test_a_pgm_says_what_white_is(depth: int, white: int, tmp_path: Path) -> None:
    levels = np.linspace(0, white, 4).astype(">u2" if depth > 255 else "u1")
    (tmp_path / "a.pgm").write_bytes(b"P5\n4 1\n%d\n" % depth + levels.tobytes())
    assert grey(open_picture(tmp_path / "a.pgm")).tolist() == [[0, 85, 170, 255]]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_in_files(form: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a", format=form)
    assert np.array_equal(grey(open_picture(tmp_path / "a")), EIGHT)


def test_a_transparent_level_of_sixteen_bits_is_white(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png", transparency=0x4000)
    assert grey(open_picture(tmp_path / "a.png"))[0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("levels", [[[0, 70000]], [[-1, 5]]])
def test_integers_past_sixteen_bits_are_refused(levels: list[list[int]]) -> None:
    with pytest.raises(InputError, match=r"its greys go from .* to .*; save it with 8 or 16 bits"):
        as_rgb(Image.fromarray(np.array(levels, np.int32)))


def test_floating_point_is_refused_by_the_name_of_the_file(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=rf"{tmp_path}/a\.tiff is not a readable picture \(its colours are float"):
        open_picture(tmp_path / "a.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert as_rgb(Image.new(mode, (2, 2))).mode == "RGB"


def test_the_papers_preparation_keeps_sixteen_bits() -> None:
    ramp = Image.fromarray(np.repeat(np.linspace(0, 65535, 256).astype(np.uint16)[None], 256, axis=0))
    prepared = grey(prepare_real(ramp))
    assert np.abs(prepared - np.arange(256)).max() <= 3  # JPEG's
    eight = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None], 256, axis=0)).convert("RGB")
    file = io.BytesIO()
    eight.save(file, "JPEG")
    assert np.array_equal(prepared, grey(Image.open(file)))
