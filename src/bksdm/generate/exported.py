"""Exported folders in the place of a MODEL: pictures by their own runtime, from the same seeds."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bksdm.common.errors import InputError
from bksdm.generate.requests import Request
from bksdm.runtime.files import read_json
from bksdm.runtime.folder import open_folder
from bksdm.runtime.pipeline import Pipeline
from bksdm.runtime.spared import NOTHING, Spared

EXPORT_FILE = "export.json"


def is_exported(model: str | Path) -> bool:
    """Whether MODEL is a folder that `bksdm export` wrote."""
    return (Path(model).expanduser() / EXPORT_FILE).is_file()


def export_facts(model: str | Path) -> dict[str, object]:
    """What `export.json` says: format, precision, parameters by network, and so on.

    Raises:
        InputError: It cannot be read.
    """
    return read_json(Path(model).expanduser() / EXPORT_FILE)


def open_exported(
    model: str | Path, arithmetic: str = "f32", scheduler: str | None = None, spared: Spared = NOTHING
) -> Pipeline:
    """The pipeline of an exported folder, with as many threads as torch has.

    Arguments:
        model: The folder.
        arithmetic: Of OpenVINO: f32, bf16 or f16.
        scheduler: Name of a diffusers scheduler in the place of the folder's own.
        spared: What it will draw without; keys that are pooled have to be so already.

    Raises:
        InputError: It is incomplete, of a format that does not run here, too old for reuse, or exported otherwise.
    """
    if spared.pool_keys not in (None, export_facts(model).get("pool_keys")):
        mend = f"export it with --pool_keys {spared.pool_keys}, or leave it out"
        raise InputError(f"{model} was exported without pool_keys {spared.pool_keys}; {mend}")
    threads = torch.get_num_threads()
    pipeline = open_folder(Path(model).expanduser(), threads=threads, precision=arithmetic, scheduler=scheduler)
    if spared.reuse is not None:
        pipeline.networks.check_parted()
    return pipeline


def sample_exported(
    pipeline: Pipeline,
    requests: Sequence[Request],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    spared: Spared = NOTHING,
    batch_size: int = 4,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    image: Image.Image | None = None,
    strength: float = 0.8,
    sigmas: Sequence[float] | None = None,
) -> Iterator[list[Image.Image]]:
    """Yield the pictures of `requests`, as `bksdm.generate.sampling.sample` does, whose arguments these are.

    Steps and guidance are the folder's own by default.
    """
    batches = pipeline.sample(
        [request.prompt for request in requests],
        [request.seed for request in requests],
        steps=steps,
        guidance=guidance,
        interval=spared.interval,
        reuse=spared.reuse,
        batch_size=batch_size,
        negative_prompt=negative_prompt or "",
        height=height,
        width=width,
        image=None if image is None else np.asarray(image.convert("RGB")),
        strength=strength,
        sigmas=sigmas,
    )
    for pictures in batches:
        yield [Image.fromarray(picture) for picture in pictures]
