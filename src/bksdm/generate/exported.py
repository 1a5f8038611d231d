"""Exported folders in the place of a MODEL: pictures by their own runtime, from the same seeds."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bksdm.common.errors import InputError
from bksdm.generate.requests import Request
from bksdm.runtime.defaults import Interval
from bksdm.runtime.files import read_json
from bksdm.runtime.folder import open_folder
from bksdm.runtime.pipeline import Pipeline

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
    model: str | Path,
    arithmetic: str = "f32",
    scheduler: str | None = None,
    *,
    reuses: bool = False,
    pool_keys: int | None = None,
) -> Pipeline:
    """The pipeline of an exported folder, with as many threads as torch has.

    Arguments:
        model: The folder.
        arithmetic: Of OpenVINO: f32, bf16 or f16.
        scheduler: Name of a diffusers scheduler in the place of the folder's own.
        reuses: Whether the inside of its U-Net is to be computed in some steps alone.
        pool_keys: How it has to have been exported, where that matters.

    Raises:
        InputError: It is incomplete, of a format that does not run here, too old for `reuses`, or exported otherwise.
    """
    if pool_keys not in (None, export_facts(model).get("pool_keys")):
        mend = f"export it with --pool_keys {pool_keys}, or leave it out"
        raise InputError(f"{model} was exported without pool_keys {pool_keys}; {mend}")
    threads = torch.get_num_threads()
    pipeline = open_folder(Path(model).expanduser(), threads=threads, precision=arithmetic, scheduler=scheduler)
    if reuses:
        pipeline.networks.check_parted()
    return pipeline


def sample_exported(
    pipeline: Pipeline,
    requests: Sequence[Request],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    interval: Interval | None = None,
    reuse: int | None = None,
    pool_keys: int | None = None,  # noqa: ARG001 - the network is so already, or is not opened
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
        interval=interval,
        reuse=reuse,
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
