"""What an export format is: what it can hold, what it needs, how it is written and read back.

Every format is a module `to_NAME` with a `FORMAT`. It is imported when it is asked for, and imports its own libraries,
which are optional, inside its functions.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from diffusers import DiffusionPipeline

from bksdm.common.errors import InputError
from bksdm.export.parity import Parity
from bksdm.families.family import Family
from bksdm.families.recipe import Recipe
from bksdm.models.pipelines import denoiser, text_encoders
from bksdm.runtime.defaults import Defaults
from bksdm.runtime.networks import Networks

FORMATS = (
    "onnx",
    "openvino",
    "coreml",
    "gguf",
    "executorch",
    "ldm",
    "taesd",
    "tensorrt",
    "diffusers",
    "transformer",
    "web",
)
_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "w8a8": 1.0, "q8_0": 1.07, "6bit": 0.75, "4bit": 0.5, "int4": 0.55}
_BYTES |= {"q4_0": 0.57, "bf16": 2.0, "keep": 4.0}
_COMPARING = 8192  # bytes a pixel, while both sides decode a picture (docs/log.md)


@dataclass(frozen=True)
class Source:
    """What is exported, and how.

    Attributes:
        model: The MODEL, as it was named.
        pipeline: Its pipeline, on the CPU, in float32, in eval mode.
        recipe: What it was pruned by; None for a model that is whole.
        precision: One of the format's.
        height, width: Of its pictures in pixels; all that the export can make where the format has fixed sizes.
        batch_size: Pictures at a time, of an export with fixed sizes.
        attention: How attention is written down, original or split_einsum.
        calibration: Prompts whose denoising steps a quantiser looks at; empty where none were given.
        sampling: What it draws best with, where that is known.
        other_scheduler: Whether the pipeline's scheduler is not the model's own.
        pool_keys: What `Family.sparing` is told while networks are traced, which then are so.
        npm: Folder with the archives of npm's packages; None to have npm fetch them.
    """

    model: str
    pipeline: DiffusionPipeline
    recipe: Recipe | None
    precision: str
    height: int
    width: int
    batch_size: int = 1
    attention: str = "original"
    calibration: tuple[str, ...] = ()
    sampling: Defaults | None = None
    other_scheduler: bool = False
    pool_keys: int | None = None
    npm: str | None = None


def _streamed(source: Source, path: Path) -> None:
    raise NotImplementedError("a format that is streamed is not written at once")


@dataclass(frozen=True)
class Needs:
    """Bytes of memory, at most, and of disk that a conversion takes."""

    memory: int
    disk: int


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        name: As `--to` takes it.
        precisions: Of the weights, the default first.
        packages: What is imported -> what pip installs.
        write: Write the export into an empty folder, or, with a `suffix`, as the file that is named.
        stream: Write the MODEL that is named in a precision, one tensor after the other, in the place of `write`.
        networks: Open what was written, to be compared with torch; None where it cannot run here.
        check: Compare what was written with torch in the format's own way, where its runtime opens no networks.
        suffix: Of the file, for formats of one file; empty for folders.
        is_model: Whether what is written is a MODEL again, that every verb takes.
        fixed_size: Whether an export makes pictures of one size only.
        has_scheduler: Whether an export says by which scheduler it is drawn from.
        pools_keys: Whether networks are written as they compute, with pooled keys where that is asked for.
        needs_decoder: Whether it is a small decoder that an export holds, and nothing else.
        prefers_small_decoder: Whether it takes the small decoder that ships for a model's VAE where none is named.
        told: Names of the conditions that a denoiser in it can be told; None for all.
        unets_alone: Why no transformer can be held, where that is so.
        of_unets: Precisions that U-Nets alone can have.
        why_not: Why a source cannot be held, in words that name the mend; None where it can.
        least_psnr: By precision, the parity with torch in dB below which an export is refused; precisions that are
            not here are only reported, and fp32 has to be within 2/255.
        memory: Peak of memory as a multiple of the weights in float32, over and above the pipeline itself and what
            the pictures take that are compared.
        scratch: Bytes a parameter that lie on the disk meanwhile.
    """

    name: str
    precisions: tuple[str, ...]
    packages: Mapping[str, str]
    write: Callable[[Source, Path], None] = _streamed
    stream: Callable[[str, str, Path], None] | None = None
    networks: Callable[[Path, Source], Networks] | None = None
    check: Callable[[Path, Source], Parity] | None = None
    suffix: str = ""
    is_model: bool = False
    fixed_size: bool = False
    has_scheduler: bool = True
    pools_keys: bool = False
    needs_decoder: bool = False
    prefers_small_decoder: bool = False
    told: tuple[str, ...] | None = None
    unets_alone: str = ""
    of_unets: tuple[str, ...] = ()
    why_not: Callable[[Source], str | None] = lambda source: None
    least_psnr: Mapping[str, float] = field(default_factory=dict)
    memory: float = 2.0
    scratch: float = 0.0

    def needs(self, source: Source) -> Needs:
        """An estimate, from the number of parameters."""
        pipeline = source.pipeline
        networks = (*text_encoders(pipeline), denoiser(pipeline), pipeline.vae)
        parameters = sum(p.numel() for network in networks for p in network.parameters())
        comparing = _COMPARING * source.height * source.width
        return Needs(
            int(4 * parameters * self.memory) + comparing, int(parameters * (_BYTES[source.precision] + self.scratch))
        )

    def why_not_family(self, family: Family, precision: str | None = None) -> str | None:
        """Why no model of a family can be held, in a precision if one is given; None where some can."""
        if self.name not in family.exports:
            reason = self.unets_alone if family.denoiser == "transformer" else ""
            return f"{reason or f'not for {family.name} yet'}; export to {' or '.join(family.exports)}"
        if family.denoiser == "transformer" and precision in self.of_unets:
            return f"{precision} is for U-Nets, and this is a transformer; give another --precision"
        told = {*family.of_caption, *family.of_picture}
        if self.told is None or told <= {*self.told}:
            return None
        return f"not for {family.name} yet; export to onnx or openvino"

    def missing_packages(self) -> list[str]:
        """What pip would have to install."""
        return [package for module, package in self.packages.items() if importlib.util.find_spec(module) is None]

    def check_packages(self) -> None:
        """Say what to install where something is missing.

        Raises:
            InputError: Naming the command.
        """
        missing = self.missing_packages()
        if missing:
            raise InputError(f"format {self.name} needs {', '.join(missing)}; run pip install 'bksdm[{self.name}]'")


def format_named(name: str) -> Format:
    """The format that `--to` names."""
    return cast(Format, importlib.import_module(f"bksdm.export.to_{name}").FORMAT)
