"""A few pictures of a subject as samples: several views of each, and pictures of its kind beside them."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from bksdm.common.randomness import generator
from bksdm.data.names import list_pictures
from bksdm.data.pictures import Size, name_in, open_unflagged, sides, to_pixels
from bksdm.data.stream import Batch

SMALLEST_CUT = 0.8  # side of a view over that of the largest that its picture has room for
_CHUNK = 8

Posterior = tuple[Tensor, Tensor]


def read_subject(folder: str | Path) -> dict[str, Image.Image]:
    """The pictures of a folder by their names.

    Raises:
        InputError: There is no such folder, it has no pictures, or one of them cannot be read or was made black by a
            safety checker.
    """
    return {name_in(Path(folder), path): open_unflagged(path) for path in list_pictures(Path(folder))}


def view(picture: Image.Image, size: Size, number: int, seed: int, *, flip: bool) -> Tensor:
    """A picture cut in its own way.

    Arguments:
        picture: Of any size.
        size: Of the view in pixels.
        number: 0 is the middle; any other a cut of that shape, somewhere, with sides of at least `SMALLEST_CUT` of the
            largest's.
        seed: Of the cuts.
        flip: Whether views with odd numbers are mirrored.

    Returns:
        Pixels in [-1, 1] with shape (3, H, W).
    """
    if number:
        low, x, y = torch.rand(3, generator=generator(seed, "view", number)).tolist()
        height, width = sides(size)
        largest = (
            min(picture.width, picture.height * width / height),
            min(picture.height, picture.width * height / width),
        )
        cut = [math.ceil(side * (SMALLEST_CUT + (1 - SMALLEST_CUT) * low)) for side in largest]
        left, top = (round(share * (room - side)) for share, room, side in zip((x, y), picture.size, cut, strict=True))
        picture = picture.crop((left, top, left + cut[0], top + cut[1]))
    return to_pixels(ImageOps.mirror(picture) if flip and number % 2 else picture, size)


def encoded(pixels: Sequence[Tensor], posterior: Callable[[Tensor], Posterior]) -> Posterior:
    """Mean and deviation of the latents, each with shape (N, C, h, w), on the CPU, of N pictures (3, H, W)."""
    made = [posterior(torch.stack(list(pixels[start : start + _CHUNK]))) for start in range(0, len(pixels), _CHUNK)]
    mean, deviation = (torch.cat([part.float().cpu() for part in parts]) for parts in zip(*made, strict=True))
    return mean, deviation


class SubjectSamples:
    """The views of a subject, each drawn with a picture of its kind.

    A sample has `latents_mean` and `latents_std` with shape (C, h, w), and, where there are pictures of the kind,
    `class_mean` and `class_std`, of one that the draw chooses.

    Arguments:
        names: Of the views.
        subject: Posterior of their latents, N of them.
        kind: Posterior of the pictures of the kind, if there are any.
    """

    def __init__(self, names: Sequence[str], subject: Posterior, kind: Posterior | None) -> None:
        self._names = names
        self._subject = subject
        self._kind = kind

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def sample(self, index: int, rng_seed: int) -> Batch:
        mean, deviation = self._subject
        found = {"latents_mean": mean[index], "latents_std": deviation[index]}
        if self._kind is None:
            return found
        mean, deviation = self._kind
        drawn = rng_seed % len(mean)
        return found | {"class_mean": mean[drawn], "class_std": deviation[drawn]}
