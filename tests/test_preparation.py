"""Pictures prepared in memory are, to the bit, what Pillow's defaults leave in files."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bksdm.common.assets import asset
from bksdm.data.folder import read_captions
from bksdm.evaluate.preparation import prepare_generated, prepare_real


@pytest.fixture(scope="module")
def art() -> Image.Image:
    """Colours with sharp edges, 96 x 80."""
    return read_captions(asset("emoji", "art", "heldout"))[0].open().resize((96, 80), Image.Resampling.NEAREST)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("size", [256, 32])
def test_a_generated_picture_is_what_two_jpeg_files_leave_of_it(art: Image.Image, size: int, tmp_path: Path) -> None:
    first, second = tmp_path / "512.jpg", tmp_path / "256.jpg"
    art.save(first)
    with Image.open(first) as opened:
        opened.resize((size, size)).save(second)
    with Image.open(second) as opened:
        expected = opened.convert("RGB")
    prepared = prepare_generated(art, size)
    assert (prepared.mode, prepared.size) == ("RGB", (size, size))
    assert np.array_equal(pixels(prepared), pixels(expected))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_real_picture_is_what_one_jpeg_file_leaves_of_it(art: Image.Image, mode: str, tmp_path: Path) -> None:
    real, small = tmp_path / "real.jpg", tmp_path / "256.jpg"
    art.convert(mode).save(real, quality=95)
    with Image.open(real) as opened:
        opened.resize((256, 256)).save(small)
    with Image.open(small) as written, Image.open(real) as opened:
        assert np.array_equal(pixels(prepare_real(opened)), pixels(written.convert("RGB")))


def test_a_mode_that_jpeg_does_not_have_becomes_rgb(art: Image.Image) -> None:
    assert np.array_equal(pixels(prepare_real(art.convert("RGBA"))), pixels(prepare_real(art)))


def test_preparing_leaves_the_picture_as_it_was(art: Image.Image) -> None:
    before = art.tobytes()
    prepare_generated(art)
    assert (art.size, art.tobytes()) == ((96, 80), before)


def test_a_generated_picture_loses_more_than_a_real_one(art: Image.Image) -> None:
    assert not np.array_equal(pixels(prepare_generated(art)), pixels(prepare_real(art)))


def test_pillows_own_filter_is_bicubic(art: Image.Image) -> None:
    by_default, bicubic = art.resize((32, 32)), art.resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(by_default), pixels(bicubic))
    for other in (Image.Resampling.BILINEAR, Image.Resampling.LANCZOS, Image.Resampling.BOX):
        assert not np.array_equal(pixels(by_default), pixels(art.resize((32, 32), other)))


def test_torchs_bicubic_without_antialiasing_is_another_picture(art: Image.Image) -> None:
    """The reason to resize by Pillow: its filter widens as the picture shrinks, and torch's does not by itself."""
    ours = pixels(art.resize((32, 32)))
    planes = torch.from_numpy(pixels(art)).permute(2, 0, 1)[None].float()
    off = [
        np.abs(F.interpolate(planes, (32, 32), mode="bicubic", antialias=smooth)[0].permute(1, 2, 0).numpy() - ours)
        for smooth in (False, True)
    ]
    assert off[0].max() > 20
    assert off[1].mean() < off[0].mean() / 4
