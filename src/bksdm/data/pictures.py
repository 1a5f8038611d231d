"""Captioned pictures, wherever they lie, and what training makes of them."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bksdm.data.stream import Batch
from bksdm.errors import InputError

Size = int | tuple[int, int]  # in pixels: the side of a square, or height and width


class Picture(Protocol):
    """A picture with its caption, read when it is asked for.

    `name` is what a person finds it by. `text` and `open` raise `InputError` where it is damaged.
    """

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...

    def open(self) -> Image.Image:
        """The picture as RGB, upright."""
        ...


@dataclass(frozen=True)
class Captioned:
    """A picture in a file of its own, and its caption."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        return self.path.name

    def open(self) -> Image.Image:
        return open_picture(self.path)


def open_picture(source: Path | bytes, name: str | None = None) -> Image.Image:
    """A picture of any mode as RGB: upright, transparency on white, of a moving picture the first frame.

    Arguments:
        source: The file, or what is in it.
        name: What to call it in errors; the file's path by default.

    Raises:
        InputError: It is not a picture, is cut short, or has more than 179 million pixels.
    """
    shown = name or (source if isinstance(source, Path) else "a picture")
    with _readable(shown), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        return _as_rgb(ImageOps.exif_transpose(opened))


def open_as_it_is(path: Path) -> Image.Image:
    """A picture as its file has it: neither turned upright nor converted; its `format` says what the file is.

    Raises:
        InputError: The file is missing or is not a readable picture.
    """
    with _readable(path), Image.open(path) as opened:
        opened.load()
        return opened


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


@contextmanager
def _readable(shown: str | Path) -> Iterator[None]:
    """Turn what goes wrong with a picture inside into one line that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{shown} does not exist") from error
    except Exception as error:  # on damaged files, Pillow's decoders raise errors of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{shown} is not a readable picture ({reason}); replace or remove it") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut off what is above 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode == "P" or image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image.convert("RGB")


def to_pixels(image: Image.Image, size: Size, *, flip: bool = False) -> Tensor:
    """The middle of a picture, as much of it as has the wanted shape.

    Returns:
        Pixels in [-1, 1] with shape (3, H, W).
    """
    height, width = sides(size)
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC) if image.size != (width, height) else image
    if flip:
        fitted = ImageOps.mirror(fitted)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class PictureSamples:
    """Pixels and tokens of captioned pictures.

    A sample has `pixel_values` with shape (3, H, W) in [-1, 1] and `input_ids` with shape (L,).

    Attributes:
        pictures: Pictures and captions.
        size: Of the pictures in pixels.
        tokenize: Turns a caption into `input_ids`.
        flip: Whether every other draw is mirrored, by chance.
    """

    pictures: Sequence[Picture]
    size: Size
    tokenize: Callable[[str], Tensor]
    flip: bool = False

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        return self.pictures[index].name

    def pixels(self, index: int, flipped: bool) -> Tensor:
        return to_pixels(self.pictures[index].open(), self.size, flip=flipped)

    def sample(self, index: int, rng_seed: int) -> Batch:
        pixels = self.pixels(index, self.flip and flips(rng_seed))
        return {"pixel_values": pixels, "input_ids": self.tokenize(self.pictures[index].text)}


def flips(rng_seed: int) -> bool:
    """Whether the draw with this seed is mirrored, where draws are."""
    return bool(rng_seed & 1)
