"""What a model is told of a picture is what was cut out of it."""

import numpy as np
import pytest
import torch
from PIL import Image

from bksdm.data.pictures import to_pixels
from bksdm.families.family import Frame

Size = tuple[int, int]
SIZES = [
    ((96, 128), (64, 64)),
    ((128, 96), (64, 64)),
    ((200, 300), (64, 32)),
    ((300, 200), (32, 64)),
    ((20, 31), (64, 64)),
    ((31, 20), (64, 96)),
    ((97, 131), (64, 64)),
    ((64, 64), (64, 64)),
    ((48, 80), (48, 64)),
]


def slope(size: Size) -> Image.Image:
    """Red grows from the top to the bottom, green from left to right."""
    down, across = (np.linspace(0, 255, side).round().astype(np.uint8) for side in size)
    picture = np.zeros((*size, 3), np.uint8)
    picture[..., 0], picture[..., 1] = down[:, None], across[None]
    return Image.fromarray(picture)


def middle(pixels: torch.Tensor, size: Size) -> list[float]:
    """Where in the whole picture, in its pixels, the middle of a cut out piece comes from, by its colours."""
    shares = (pixels[:2].mean(dim=(1, 2)) + 1) / 2
    return [float(share) * (side - 1) + 0.5 for share, side in zip(shares, size, strict=True)]


@pytest.mark.parametrize(("original", "size"), SIZES)
@pytest.mark.parametrize("flip", [False, True])
def test_the_corner_is_where_the_picture_was_cut(original: Size, size: Size, flip: bool) -> None:
    frame = Frame.fitted(original, size)
    scale = max(wanted / whole for whole, wanted in zip(original, size, strict=True))
    pixels = to_pixels(slope(original), size, flip=flip)
    told = [(corner + side / 2) / scale for corner, side in zip(frame.corner, size, strict=True)]
    found = middle(pixels, original)
    assert (frame.original, frame.size) == (original, size)
    assert told == pytest.approx(found, abs=0.5 / scale + 0.2), "to half a pixel of what is learnt from"
    assert min(frame.corner) == 0, "one side is seen whole"


@pytest.mark.parametrize(("original", "size"), SIZES)
def test_what_was_cut_shows_as_much_as_the_frame_says(original: Size, size: Size) -> None:
    scale = max(wanted / whole for whole, wanted in zip(original, size, strict=True))
    pixels = (to_pixels(slope(original), size) + 1) / 2
    seen = [float(pixels[0, -1].mean() - pixels[0, 0].mean()), float(pixels[1, :, -1].mean() - pixels[1, :, 0].mean())]
    for share, side, part in zip(seen, original, size, strict=True):
        assert share * (side - 1) == pytest.approx((part - 1) / scale, abs=1.5)


def test_of_a_mirrored_picture_the_same_is_told() -> None:
    """The middle is cut out, so as much is missing at the left as at the right, but for a pixel that is split."""
    for original, size in SIZES:
        frame, plain = Frame.fitted(original, size), to_pixels(slope(original), size)
        scale = max(wanted / whole for whole, wanted in zip(original, size, strict=True))
        right = scale * original[1] - size[1] - frame.corner[1]
        assert abs(right - frame.corner[1]) <= 1
        assert torch.equal(to_pixels(slope(original), size, flip=True), plain.flip(-1))


def test_of_a_drawn_picture_nothing_is_cut() -> None:
    assert Frame.whole((64, 32)) == Frame((64, 32), (0, 0), (64, 32)) == Frame.fitted((64, 32), (64, 32))
