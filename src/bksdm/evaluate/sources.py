"""Where the pictures that are scored come from: a model draws them, or they are finished and lie in a folder.

What draws is imported when a model is asked for pictures, for finished ones need none of it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from bksdm.common.devices import choose_device, choose_precision
from bksdm.common.errors import InputError
from bksdm.common.prompts import cut_line
from bksdm.common.runs import digest, write_text
from bksdm.common.tables import listed
from bksdm.data.folder import captions_digest
from bksdm.data.names import check_order, holds_pictures, kind, picture_names
from bksdm.data.pictures import Captioned, Picture, as_it_is, size_of, was_flagged
from bksdm.data.source import read_pictures
from bksdm.evaluate.preparation import prepare_generated, prepare_real
from bksdm.generate.requests import Request
from bksdm.models.folders import decoder_fingerprint, fingerprint
from bksdm.options.shared import Precision
from bksdm.runtime.defaults import Defaults
from bksdm.runtime.rgb import as_rgb

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PAPER = "paper"
_NAME = re.compile(r"[\w.-]+")


class Source(Protocol):
    """Pictures in a fixed order, with captions or without.

    Attributes:
        captions: One a picture, or None.
        digest: A short name for what the pictures are.
    """

    @property
    def captions(self) -> list[str] | None: ...

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def pictures(self, numbers: range, preparation: str) -> list[Image.Image]:
        """The pictures with these numbers, prepared as they are or as in the `paper`."""
        ...

    def name(self, number: int) -> str:
        """What a person finds a picture by."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How a model draws; see `sample`."""

    scheduler: str | None
    batch_size: int
    precision: Precision
    device: str
    decoder: str | None = None


@dataclass
class Drawn:
    """Pictures that a model draws when they are asked for. The safety checker is off: it would black out some.

    Attributes:
        model: The MODEL.
        requests: Prompts and seeds.
        how: Its steps and guidance.
        sampling: How it draws besides.
        folder: Where pictures are kept.
        kept: Numbers of those that are.
    """

    model: str
    requests: list[Request]
    how: Defaults
    sampling: Sampling
    folder: Path
    kept: Collection[int] = ()
    captions: list[str] = field(init=False)
    digest: str = field(init=False)
    _loaded: DiffusionPipeline | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.captions = [request.prompt for request in self.requests]
        how = self.how.to_dict() | dataclasses.asdict(self.sampling)
        others = (name for name in ("sigmas", "interval", "reuse", "pool_keys") if name in how)
        names = ("steps", "guidance", "scheduler", "precision", *others)
        drawn = [how[name] for name in names]
        asked = [[request.prompt, request.seed] for request in self.requests]
        decoder = [decoder_fingerprint(how["decoder"])] if how["decoder"] else []  # digests of those without stay
        self.digest = digest([self.model, fingerprint(self.model), drawn, asked, *decoder])

    def __len__(self) -> int:
        return len(self.requests)

    def pictures(self, numbers: range, preparation: str) -> list[Image.Image]:
        from bksdm.generate.run import save_picture
        from bksdm.generate.sampling import sample
        from bksdm.models.pipelines import image_size, scheduler_config

        pipeline, how = self._pipeline(), self.how
        height, width = image_size(pipeline)
        batches = sample(
            pipeline,
            [self.requests[number] for number in numbers],
            **vars(how),
            batch_size=self.sampling.batch_size,
            height=height,
            width=width,
        )
        made = [picture for batch in batches for picture in batch]
        for number, picture in zip(numbers, made, strict=True):
            if number in self.kept:
                self.folder.mkdir(parents=True, exist_ok=True)
                request = self.requests[number]
                about = {"prompt": request.prompt, "seed": request.seed, "model": self.model} | how.to_dict()
                save_picture(picture, self.path(number), about, scheduler_config(pipeline.scheduler))
        return [prepare_generated(picture) for picture in made] if preparation == PAPER else made

    def name(self, number: int) -> str:
        return f"{number:05d}.png"

    def path(self, number: int) -> Path:
        """Where picture `number` lies, if it is kept."""
        return self.folder / self.name(number)

    def list_kept(self) -> None:
        """Write `metadata.jsonl` beside the pictures, where it is not there, for a folder of captioned pictures."""
        lines = [
            {"file_name": self.name(number), "text": request.prompt, "seed": request.seed}
            for number, request in enumerate(self.requests)
            if number in self.kept
        ]
        file = self.folder / "metadata.jsonl"
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if lines and not (file.is_file() and file.read_text(encoding="utf-8") == text):
            write_text(file, text)

    def check(self) -> str | None:
        """Load the model once, so that one that cannot draw is refused early.

        Returns:
            What there is to say of prompts that it reads in part only.

        Raises:
            InputError: It is incomplete, damaged, or no text-to-image model.
        """
        from bksdm.generate.sampling import scheduler_named
        from bksdm.models.decoder import load_model
        from bksdm.models.pipelines import check_text_to_image, cutting

        pipeline = load_model(self.model, decoder=self.sampling.decoder)
        check_text_to_image(pipeline, self.model)
        if self.sampling.scheduler:
            scheduler_named(self.sampling.scheduler, pipeline.scheduler)
        return cut_line(self.captions, cutting(pipeline), "prompts")

    def release(self) -> None:
        """Let the model go."""
        self._loaded = None

    def _pipeline(self) -> DiffusionPipeline:
        if self._loaded is None:
            from bksdm.generate.sampling import scheduler_named
            from bksdm.models.decoder import load_model
            from bksdm.models.pipelines import safety_checker

            device = choose_device(self.sampling.device)
            dtype = choose_precision(self.sampling.precision, device, training=False)
            pipeline = load_model(self.model, dtype, self.sampling.decoder)
            if safety_checker(pipeline) is not None:
                pipeline.safety_checker = None
            if self.sampling.scheduler:
                pipeline.scheduler = scheduler_named(self.sampling.scheduler, pipeline.scheduler)
            self._loaded = pipeline.to(device)
        return self._loaded


@dataclass
class Finished:
    """Pictures that are there already, in the order of their data or of their names.

    Attributes:
        data: Where they are.
        entries: The pictures.
        captions: One a picture, or None.
        digest: A short name for what they are.
        real: Whether they are photographs or the like, and not some model's.
    """

    data: str
    entries: Sequence[Picture]
    captions: list[str] | None
    digest: str
    real: bool

    @classmethod
    def of(cls, data: str, prompts: Sequence[str] | None = None, *, real: bool) -> Finished:
        """The pictures that DATA stands for.

        Arguments:
            data: See `read_source`; a folder of pictures may have no captions.
            prompts: Captions for pictures that have none, in the order of their names.
            real: Whether they are real; pictures of one model must have one size.

        Raises:
            InputError: There are no pictures, or not as many as prompts, or they have mixed sizes.
        """
        source = read_pictures(data)
        if source.captioned:
            captions = [picture.text for picture in source.pictures]
            found = cls(data, source.pictures, captions, source.digest, real)
        elif prompts is None:
            found = cls(data, source.pictures, None, source.digest, real)
        else:
            entries = _captioned(Path(data), prompts)
            found = cls(data, entries, list(prompts), captions_digest(entries), real)
        check_not_flagged(found.entries, data)
        if not real:
            found.check_one_size()
        return found

    def __len__(self) -> int:
        return len(self.entries)

    def pictures(self, numbers: range, preparation: str) -> list[Image.Image]:
        entries = [self.entries[number] for number in numbers]
        return [self._prepared(entry) if preparation == PAPER else entry.open() for entry in entries]

    def name(self, number: int) -> str:
        return self.entries[number].name

    def _prepared(self, entry: Picture) -> Image.Image:
        """Through JPEG twice in all, as pictures of a model that were kept as PNG have yet to go."""
        with as_it_is(entry) as picture:
            if self.real or picture.format == "JPEG":
                return prepare_real(picture)
            return prepare_generated(as_rgb(picture))

    def check_one_size(self) -> None:
        """Refuse pictures of mixed sizes.

        Raises:
            InputError: Naming two of them.
        """
        first = self.entries[0].open().size
        for entry in self.entries:
            try:
                size = size_of(entry)
            except InputError:
                continue  # refused with its reason when it is read
            if size != first:
                raise InputError(
                    f"{self.data} has pictures of mixed sizes ({self.entries[0].name} "
                    f"{first[0]}x{first[1]}, {entry.name} {size[0]}x{size[1]}); give pictures of one size"
                )


def _captioned(folder: Path, prompts: Sequence[str]) -> list[Captioned]:
    """The pictures of a folder with a prompt for each, in the order of their names.

    Raises:
        InputError: There are more or fewer, or the order is not plain.
    """
    names = picture_names(folder)
    if len(prompts) != len(names):
        raise InputError(
            f"{folder} has {len(names)} pictures and no metadata.jsonl, and there are {len(prompts)} prompts; "
            f"give a prompt for each, in the order of the pictures' names"
        )
    check_order(names, folder)
    return [Captioned(folder / name, text, folder) for name, text in zip(names, prompts, strict=True)]


def check_not_flagged(pictures: Sequence[Picture], whose: str) -> None:
    """Refuse to score pictures that a safety checker has made black.

    Raises:
        InputError: Naming them.
    """
    files = (picture for picture in pictures if kind(picture.name) == "png")  # others hold no text of ours
    flagged = [picture.name for picture in files if was_flagged(picture.content())]
    if flagged:
        raise InputError(
            f"{len(flagged)} of {len(pictures)} pictures of {whose} were made black by the model's safety checker "
            f"({listed(flagged)}), and are worth nothing in a score; bksdm evaluate MODEL draws without it"
        )


def are_pictures(model: str) -> bool:
    """Whether MODEL is a folder of finished pictures, and no pipeline."""
    return holds_pictures(Path(model)) and not (Path(model) / "model_index.json").exists()


def named(models: Sequence[str]) -> dict[str, str]:
    """Name -> MODEL, from what the command line gives: NAME=MODEL, or a MODEL that gets a name from its path.

    That is the last two parts of its path, which also serve as the name of a folder.

    Raises:
        InputError: Two have one name.
    """
    found: dict[str, str] = {}
    for given in models:
        name, equals, model = given.partition("=")
        if not (equals and _NAME.fullmatch(name)):
            model = given
            path = Path(model)
            parts = (path.with_suffix("") if path.suffix == ".safetensors" else path).parts
            name = "-".join(part for part in parts[-2:] if part.strip("/."))
        if name in found:
            raise InputError(f"two models have the name {name!r}; write NAME=MODEL, such as first={model}")
        found[name] = model
    return found
