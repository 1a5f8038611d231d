"""What a run learns from: pictures, or latents that `bksdm prepare` has made of them."""

import math
from dataclasses import dataclass
from pathlib import Path

from diffusers import StableDiffusionPipeline

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
from bksdm.families.recipe import Config
from bksdm.models.pipelines import config_size, network_digest, tokenizing

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

    @property
    def digest(self) -> str:
        return self.source.digest

    def __len__(self) -> int:
        return len(self.source.pictures)

    def captions(self, count: int) -> list[str]:
        """Some of the captions, spread over the data."""
        return [self.source.pictures[index].text for index in _spread(len(self), count)]

    def check(self, teacher: StableDiffusionPipeline) -> None:
        """Pictures go with every teacher."""

    def fields(self, unet: Config, vae: Config, text_encoder: Config) -> Fields:
        """What a sample holds, by the configs of the teacher's networks."""
        size, latent, context = _shapes(unet, vae, text_encoder, self.resolution)
        if self._fits(latent, context):
            return {"latents_mean": latent, "latents_std": latent, "context": context}
        return {"pixel_values": (3, *sides(size)), "input_ids": context[:1]}

    def samples(self, teacher: StableDiffusionPipeline) -> Samples:
        configs = teacher.unet.config, teacher.vae.config, teacher.text_encoder.config.to_dict()
        size, latent, context = _shapes(*configs, self.resolution)
        samples = PictureSamples(self.source.pictures, size, tokenizing(teacher.tokenizer), self.flip)
        if not self._fits(latent, context):
            return samples
        conditions, device = Conditions(teacher.vae, teacher.text_encoder), teacher.vae.device
        with bar(len(samples) * (2 if samples.flip else 1), "encoding pictures") as progress:
            return CachedSamples(
                samples,
                lambda pixels: conditions.posterior(pixels.to(device)),
                lambda ids: conditions.embedding(ids.to(device)),
                progress.advance,
            )

    def _fits(self, latent: tuple[int, ...], context: tuple[int, ...]) -> bool:
        return cache_bytes(self.source.pictures, self.flip, latent, context) <= self.cache_gb * 2**30


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
    def digest(self) -> str:
        return self.about.digest

    def __len__(self) -> int:
        return self.about.pictures

    def captions(self, count: int) -> list[str]:
        """Some of the captions, spread over the data."""
        return open_captions(self.folder, self.about, _spread(len(self), count))

    def check(self, teacher: StableDiffusionPipeline) -> None:
        """Refuse what these latents do not stand for.

        Raises:
            InputError: Another VAE or text encoder made them, or they have another size or no mirrored copies.
        """
        about = self.about
        made = {"vae": (about.vae, teacher.vae), "text encoder": (about.text_encoder, teacher.text_encoder)}
        for name, (digest, network) in made.items():
            if digest is not None and digest != network_digest(network):
                raise InputError(
                    f"data {self.folder} was made by the {name} of {about.teacher}, which is not this teacher's; "
                    f"run bksdm prepare with this teacher"
                )
        if self.resolution not in (None, about.resolution):
            raise InputError(
                f"resolution is {self.resolution}, and data {self.folder} was prepared at {about.resolution}; "
                f"leave it out or prepare again"
            )
        if self.flip and not about.flip:
            raise InputError(f"data {self.folder} has no mirrored copies; give --flip false, or prepare with --flip")

    def fields(self, unet: Config, vae: Config, text_encoder: Config) -> Fields:
        """What a sample holds, by the configs of the teacher's networks."""
        _, latent, context = _shapes(unet, vae, text_encoder, self.about.resolution)
        texts = {"context": context} if self.about.context_shape else {"input_ids": context[:1]}
        return {"latents_mean": latent, "latents_std": latent, **texts}

    def samples(self, teacher: StableDiffusionPipeline) -> Samples:
        return PreparedSamples(self.folder, self.about, tokenizing(teacher.tokenizer), self.flip)


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


def _shapes(
    unet: Config, vae: Config, text_encoder: Config, resolution: Size | None
) -> tuple[Size, tuple[int, int, int], tuple[int, int]]:
    """Size of the pictures in pixels, shape of their latents, and shape of an embedded caption."""
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    size = resolution or config_size(unet, factor)
    height, width = sides(size)
    latent = (vae["latent_channels"], height // factor, width // factor)
    return size, latent, (text_encoder["max_position_embeddings"], text_encoder["hidden_size"])


def _spread(length: int, count: int) -> range:
    return range(0, length, max(1, math.ceil(length / count)))
