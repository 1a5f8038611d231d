"""What a run learns from: pictures, or latents that `bksdm prepare` has made of them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffusers import DiffusionPipeline

from bksdm.common.errors import InputError
from bksdm.common.progress import bar
from bksdm.common.tables import listed
from bksdm.data.beside import Beside
from bksdm.data.cache import CachedSamples, cache_bytes
from bksdm.data.pictures import Captioned, PictureSamples, Size, sides
from bksdm.data.prepared import Prepared, PreparedSamples, is_prepared, open_captions, read_prepared
from bksdm.data.source import Source, read_source
from bksdm.data.stream import Samples
from bksdm.distill.conditions import Conditions
from bksdm.families import family_of, family_of_pipeline
from bksdm.families.recipe import Config
from bksdm.models.digests import network_digest
from bksdm.models.pipelines import (
    caption_length,
    check_multiple,
    config_size,
    denoiser,
    image_size,
    pixels_a_side,
    pixels_of_a_token,
    text_encoders,
    tokenizing,
)

Fields = dict[str, tuple[int, ...]]  # what a sample holds, and the shape of each


@dataclass(frozen=True)
class Pictures:
    """Captioned pictures; the teacher's VAE encodes them once if their latents fit in memory, else at every step.

    Attributes:
        source: The pictures.
        resolution: Side in pixels; the teacher's own size by default.
        flip: Whether every other draw is mirrored, by chance.
        cache_gb: How many GiB the latents may take.
    """

    source: Source
    resolution: int | None
    flip: bool
    cache_gb: float

    embedded: ClassVar[bool] = False  # but those that fit in memory are, once

    @property
    def digest(self) -> str:
        return self.source.digest

    def __len__(self) -> int:
        return len(self.source.pictures)

    def captions(self, count: int) -> list[str]:
        """Some of the captions, spread over the data."""
        return [self.source.pictures[index].text for index in _spread(len(self), count)]

    def check(self, teacher: DiffusionPipeline) -> None:
        """Refuse a size that its denoiser cannot be asked about; see `check_multiple`."""
        check_multiple(pixels_of_a_token(teacher), resolution=self.resolution)

    def fields(self, unet: Config, vae: Config, tokens: int) -> Fields:
        """What a sample holds, by the configs of the teacher's networks and the length of its captions."""
        shapes = _Shapes.of(unet, vae, tokens, self.resolution)
        if self._fits(shapes):
            return {"latents_mean": shapes.latent, "latents_std": shapes.latent, **shapes.told}
        return {"pixel_values": (3, *sides(shapes.size)), **shapes.of_picture, "input_ids": shapes.tokens}

    def samples(self, teacher: DiffusionPipeline) -> Samples:
        conditions, device = Conditions.of(teacher), teacher.vae.device
        shapes = _Shapes.of(denoiser(teacher).config, teacher.vae.config, caption_length(teacher), self.resolution)
        samples = PictureSamples(
            self.source.pictures, shapes.size, tokenizing(teacher), self.flip, told=conditions.of_fitted
        )
        if not self._fits(shapes):
            return samples
        with bar(len(samples) * (2 if samples.flip else 1), "encoding pictures") as progress:
            return CachedSamples(
                samples,
                lambda pixels: conditions.posterior(pixels.to(device)),
                lambda ids: conditions.embedded(ids.to(device)),
                progress.advance,
            )

    def _fits(self, shapes: "_Shapes") -> bool:
        return cache_bytes(self.source.pictures, self.flip, shapes.latent, shapes.told) <= self.cache_gb * 2**30


@dataclass(frozen=True)
class Latents:
    """A prepared folder.

    Attributes:
        folder: The folder.
        about: What it holds.
        resolution: Side in pixels that is asked for, if any.
        flip: Whether every other draw is mirrored, by chance.
    """

    folder: Path
    about: Prepared
    resolution: int | None
    flip: bool

    @property
    def embedded(self) -> bool:
        """Whether captions are embedded already."""
        return bool(self.about.context_shape)

    @property
    def digest(self) -> str:
        return self.about.digest

    def __len__(self) -> int:
        return self.about.pictures

    def captions(self, count: int) -> list[str]:
        """Some of the captions, spread over the data."""
        return open_captions(self.folder, self.about, _spread(len(self), count))

    def check(self, teacher: DiffusionPipeline) -> None:
        """Refuse what these latents do not stand for.

        Raises:
            InputError: Another VAE or text encoder made them, or they have another size or no mirrored copies.
        """
        about = self.about
        made = {"vae": (about.vae, [teacher.vae]), "text encoder": (about.text_encoder, text_encoders(teacher))}
        for name, (digest, networks) in made.items():
            if digest is not None and digest != network_digest(*networks):
                raise InputError(
                    f"data {self.folder} was made by the {name} of {about.teacher}, which is not this teacher's; "
                    f"run bksdm prepare with this teacher"
                )
        family = family_of_pipeline(teacher)
        lacking = [f"no {name}" for name in family.of_picture if name not in about.told]
        extra = [name for name in about.told if name not in (*family.of_caption, *family.of_picture)]
        if lacking or extra:
            raise InputError(
                f"data {self.folder} was prepared for another kind of teacher, and has {[*lacking, *extra][0]}; "
                f"run bksdm prepare with this teacher"
            )
        if self.resolution not in (None, about.resolution):
            raise InputError(
                f"resolution is {self.resolution}, and data {self.folder} was prepared at {about.resolution}; "
                f"leave it out or prepare again"
            )
        if self.flip and not about.flip:
            raise InputError(f"data {self.folder} has no mirrored copies; give --flip false, or prepare with --flip")

    def fields(self, unet: Config, vae: Config, tokens: int) -> Fields:
        """What a sample holds, by the configs of the teacher's networks and the length of its captions."""
        shapes = _Shapes.of(unet, vae, tokens, self.about.resolution)
        texts = {} if self.about.context_shape else {"input_ids": shapes.tokens}
        return {"latents_mean": shapes.latent, "latents_std": shapes.latent, **self.about.conditions, **texts}

    def samples(self, teacher: DiffusionPipeline) -> Samples:
        return PreparedSamples(self.folder, self.about, tokenizing(teacher), self.flip)


def open_data(data: str, resolution: int | None, flip: bool, cache_gb: float) -> Pictures | Latents:
    """What DATA stands for; see `Pictures` and `Latents`.

    Raises:
        InputError: There is no such data, or pictures of it were made black by a safety checker.
    """
    if is_prepared(data):
        return Latents(Path(data), read_prepared(Path(data)), resolution, flip)
    source = read_source(data)
    _check_not_flagged(source, data)
    return Pictures(source, resolution, flip, cache_gb)


def _check_not_flagged(source: Source, data: str) -> None:
    """Refuse what a table, or a PNG without one, says of itself; all others are refused when they are opened."""
    files = (picture for picture in source.pictures if isinstance(picture, Captioned | Beside))
    flagged = [picture.name for picture in files if picture.flagged]
    if flagged:
        raise InputError(
            f"{len(flagged)} of {len(source.pictures)} pictures of {data} were made black by a model's safety checker "
            f"({listed(flagged)}), and show nothing; take them and their captions away"
        )


def latent_sides(teacher: DiffusionPipeline, data: str, resolution: int | None) -> tuple[int, int]:
    """Height and width of the latents that a run learns from; the arguments are those of `open_data`."""
    size = read_prepared(Path(data)).resolution if is_prepared(data) else resolution
    height, width = sides(size) if size else image_size(teacher)
    factor = pixels_a_side(teacher)
    return height // factor, width // factor


@dataclass(frozen=True)
class _Shapes:
    """Of one sample.

    Attributes:
        size: Of the picture in pixels.
        latent: Of its latents.
        tokens: Of its caption's tokens.
        told, of_picture: Of all conditions by name, and of those that say something of the picture.
    """

    size: Size
    latent: tuple[int, int, int]
    tokens: tuple[int, ...]
    told: Fields
    of_picture: Fields

    @classmethod
    def of(cls, unet: Config, vae: Config, tokens: int, resolution: Size | None) -> "_Shapes":
        """By the configs of the networks and the length of captions."""
        family = family_of(unet)
        factor = family.patch * 2 ** (len(vae["block_out_channels"]) - 1)
        size = resolution or config_size(unet, factor)
        height, width = sides(size)
        told = family.condition_shapes(unet, tokens)
        return cls(
            size,
            (family.channels_of(vae), height // factor, width // factor),
            family.token_shape(tokens),
            told,
            {name: told[name] for name in family.of_picture},
        )


def _spread(length: int, count: int) -> range:
    return range(0, length, max(1, math.ceil(length / count)))
