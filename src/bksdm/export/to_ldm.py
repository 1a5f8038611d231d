"""One `.safetensors` in the layout of the original Stable Diffusion, for other programs; see `bksdm.export.ldm`."""

from pathlib import Path

import torch

from bksdm.export.formats import Format, Source
from bksdm.export.ldm import why_not, write_single_file
from bksdm.export.parity import TorchNetworks
from bksdm.models.pipelines import load_pipeline
from bksdm.runtime.networks import Networks


def write(source: Source, file: Path) -> None:
    """The checkpoint `file`."""
    dtype = torch.float16 if source.precision == "fp16" else torch.float32
    write_single_file(source.pipeline, file, dtype=dtype, recipe=source.recipe, sampling=source.sampling)


def _open(file: Path, source: Source) -> Networks:  # noqa: ARG001
    return TorchNetworks(load_pipeline(file))


FORMAT = Format(
    name="ldm",
    precisions=("fp32", "fp16"),
    packages={},
    write=write,
    networks=_open,
    suffix=".safetensors",
    why_not=lambda source: why_not(source.pipeline),
    least_psnr={"fp16": 30.0},
    memory=3.0,
    unets_alone="their authors have no file of a whole pipeline, but of the transformer alone",
)
