"""What a single-file checkpoint with the names of original Stable Diffusion says about itself; no weights are read.

Names and shapes tell the structure of the networks. What they do not tell (heads, scheduler, vocabulary, recipe) lies,
in files written by this package, in the header as JSON text; nothing is unpickled and the hub is not asked.
"""

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bksdm.common.errors import InputError
from bksdm.families import layout_of
from bksdm.families.family import Family
from bksdm.families.single_file import Layout
from bksdm.runtime.defaults import Defaults

KEY = "bksdm"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_MOST_TEXT = 64 * 2**20


@dataclass(frozen=True)
class Contents:
    """What a checkpoint says about itself.

    Attributes:
        shapes: Of its tensors, by name.
        family, layout: What it is of, and where its networks lie.
        configs: Of its networks, by name: those written into it, or those that follow from the shapes.
        recipe: What it was pruned by, as plain values; None where it does not tell.
        scheduler: Config of the scheduler; None where it does not tell.
        tokenizers: Text files by name, of each tokenizer by its name; empty where it does not tell.
        settings: Of the pipeline; empty where it does not tell.
        sampling: What it draws best with; None where it does not tell.
    """

    shapes: dict[str, tuple[int, ...]]
    family: Family
    layout: Layout
    configs: dict[str, dict[str, Any]]
    recipe: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    tokenizers: dict[str, dict[str, str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    sampling: Defaults | None = None

    @property
    def is_stock(self) -> bool:
        """Whether it is one of those published, which diffusers knows better."""
        return self.scheduler is None and self.family.is_whole(self.configs[self.family.denoiser])


def read_contents(file: Path) -> Contents:
    """What a checkpoint says about itself; no weights are read.

    Raises:
        InputError: It is no Stable Diffusion checkpoint, or its header is damaged.
    """
    with safe_open(file, framework="np") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        written = (opened.metadata() or {}).get(KEY)
    family, layout = layout_of(shapes)
    found = _found(file, family, layout, shapes)
    if written is None:
        return Contents(shapes, family, layout, found)
    try:
        values = json.loads(written)
        return Contents(
            shapes,
            family,
            layout,
            configs={name: dict(values["configs"][name]) for name in layout.parts},
            recipe=values.get("recipe"),
            scheduler=dict(values["scheduler"]),
            tokenizers={name: _unpacked_files(values[name]) for name in family.tokenizers},
            settings={name: values["settings"][name] for name in family.settings},
            sampling=Defaults.of(values["sampling"], file) if values.get("sampling") else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, zlib.error) as error:
        raise InputError(f"{file} has a damaged header ({type(error).__name__}: {error}); make it again") from error


def _found(file: Path, family: Family, layout: Layout, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    """The configs that follow from names and shapes."""
    configs = {}
    try:
        for name, part in layout.parts.items():
            configs[name] = part.config(shapes)
            reason = family.why_not(configs[name]) if name == family.denoiser else None
            if reason:
                raise InputError(reason)
    except InputError as error:
        raise InputError(f"{file} is not a whole Stable Diffusion checkpoint: {error}") from error
    return configs


def packed(text: str) -> str:
    """A long text as base64 of zlib."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpacked(text: str) -> str:
    """The text that `packed` made short.

    Raises:
        ValueError: It is longer than any vocabulary.
    """
    opened = zlib.decompressobj()
    content = opened.decompress(base64.b64decode(text, validate=True), _MOST_TEXT)
    if opened.unconsumed_tail:
        raise ValueError("a text of more than 64 MiB")
    return content.decode()


def _unpacked_files(values: Mapping[str, str]) -> dict[str, str]:
    return {name: unpacked(values[name]) for name in TOKENIZER_FILES}
