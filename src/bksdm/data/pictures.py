"""Captioned pictures, wherever they lie, and what training makes of them."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from bksdm.common.errors import InputError, one_line
from bksdm.data.names import how_to_read, readable_kinds
from bksdm.data.stream import Batch
from bksdm.runtime.parameters import KEY
from bksdm.runtime.rgb import as_rgb

Size = int | tuple[int, int]  # in pixels: the side of a square, or height and width


class Picture(Protocol):
    """A picture with its caption, read when it is asked for.

    `name` is what a person finds it by. `text`, `content` and `open` raise `InputError` where it is damaged, and `open`
    where a safety checker has made it black.
    """

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...

    def content(self) -> Path | bytes:
        """Its file, or what is in it."""
        ...

    def open(self) -> Image.Image:
        """The picture as RGB, upright."""
        ...


@dataclass(frozen=True)
class Captioned:
    """A picture in a file of its own, and its caption.

    Attributes:
        path: The file.
        text: The caption.
        folder: What the picture is named from; its own folder by default.
        flagged: Whether it is said that a safety checker has made it black.
    """

    path: Path
    text: str
    folder: Path | None = None
    flagged: bool = False

    @property
    def name(self) -> str:
        return name_in(self.folder or self.path.parent, self.path)

    def content(self) -> Path:
        return self.path

    def open(self) -> Image.Image:
        if self.flagged:
            raise _is_flagged(self.path)
        return open_unflagged(self.path)


def name_in(folder: Path, path: Path) -> str:
    """What a file is called in a folder."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def open_picture(source: Path | bytes, name: str | None = None) -> Image.Image:
    """A picture of any mode as RGB: upright, transparency on white, of a moving picture the first frame.

    Arguments:
        source: The file, or what is in it.
        name: What to call it in errors; the file's path by default.

    Raises:
        InputError: It is not a picture, is cut short, or has more than 179 million pixels.
    """
    with _opened(source, name) as opened:
        return as_rgb(ImageOps.exif_transpose(opened))


def open_unflagged(source: Path | bytes, name: str | None = None) -> Image.Image:
    """The same of a picture to learn from, which a safety checker must not have made black.

    Raises:
        InputError: It has, or the picture cannot be read.
    """
    with _opened(source, name) as opened:
        picture, flagged = as_rgb(ImageOps.exif_transpose(opened)), _says_flagged(opened)
    if flagged:
        raise _is_flagged(name or source)
    return picture


def was_flagged(picture: Path | bytes) -> bool:
    """Whether a picture, a file or what is in it, was made by `bksdm generate` and made black by a safety checker."""
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            return _says_flagged(opened)
    except Exception:  # no picture, and what reads it says so
        return False


def _says_flagged(opened: Image.Image) -> bool:
    try:
        return bool(dict(json.loads(opened.info.get(KEY, "{}"))).get("flagged"))
    except (ValueError, TypeError):  # no text of ours
        return False


def _is_flagged(name: object) -> InputError:
    return InputError(f"{name} was made black by a model's safety checker, and shows nothing; take it away")


@contextmanager
def as_it_is(picture: Picture) -> Iterator[Image.Image]:
    """A picture as its file has it: neither turned upright nor converted; its `format` says what the file is.

    Raises:
        InputError: The file is missing or is not a readable picture, or what is done with it inside fails.
    """
    source = picture.content()
    with _opened(source, None if isinstance(source, Path) else picture.name) as opened:
        yield opened


def size_of(picture: Picture) -> tuple[int, int]:
    """Width and height, by the beginning of its file.

    Raises:
        InputError: The file is missing or is not a readable picture.
    """
    with as_it_is(picture) as opened:
        return opened.size


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


@contextmanager
def _opened(source: Path | bytes, name: str | None) -> Iterator[Image.Image]:
    """A picture that Pillow opened; what goes wrong with it inside becomes one line that names it."""
    shown = name or (source if isinstance(source, Path) else "a picture")
    readable_kinds()  # so that Pillow knows them
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            yield opened
    except FileNotFoundError as error:
        raise InputError(f"{shown} does not exist") from error
    except Exception as error:  # on damaged files, Pillow's decoders raise errors of any kind
        reason = one_line(error, None)
        if isinstance(error, UnidentifiedImageError):  # whose own words have the address of an object
            reason = "of no kind that is known here"
        mend = how_to_read(shown) or "replace or remove it"
        raise InputError(f"{shown} is not a readable picture ({reason}); {mend}") from error


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

    A sample has `pixel_values` with shape (3, H, W) in [-1, 1], `input_ids`, and what is told of the picture.

    Attributes:
        pictures: Pictures and captions.
        size: Of the pictures in pixels.
        tokenize: Turns a caption into `input_ids`.
        flip: Whether every other draw is mirrored, by chance.
        told: What is told of a picture, by its original size and the wanted one, each height and width.
    """

    pictures: Sequence[Picture]
    size: Size
    tokenize: Callable[[str], Tensor]
    flip: bool = False
    told: Callable[[tuple[int, int], tuple[int, int]], Batch] = lambda original, size: {}

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        return self.pictures[index].name

    def seen(self, index: int, flipped: bool) -> Batch:
        """Pixels, and what is told of the picture."""
        picture = self.pictures[index].open()
        pixels = to_pixels(picture, self.size, flip=flipped)
        return {"pixel_values": pixels, **self.told((picture.height, picture.width), sides(self.size))}

    def sample(self, index: int, rng_seed: int) -> Batch:
        seen = self.seen(index, self.flip and flips(rng_seed))
        return seen | {"input_ids": self.tokenize(self.pictures[index].text)}


def flips(rng_seed: int) -> bool:
    """Whether the draw with this seed is mirrored, where draws are."""
    return bool(rng_seed & 1)
