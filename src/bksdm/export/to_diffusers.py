"""A diffusers folder: the way back from a single file, with the recipe that it was pruned by, or other precision."""

from pathlib import Path

import yaml

from bksdm.export.formats import Format, Source
from bksdm.export.parity import TorchNetworks
from bksdm.models.pipelines import Origin, formats_of, load_pipeline, save_pipeline
from bksdm.pruning.told import RECIPE_FILE
from bksdm.runtime.networks import Networks


def write(source: Source, folder: Path) -> None:
    """The pipeline in `folder`."""
    recipe = source.recipe
    extra = {RECIPE_FILE: yaml.safe_dump(recipe.to_dict(), sort_keys=False)} if recipe else {}
    save_pipeline(
        source.pipeline,
        folder,
        extra,
        Origin.of(source.pipeline, changed=("scheduler",) if source.other_scheduler else ()),
        formats_of(source.model, source.precision),
    )


def _open(folder: Path, source: Source) -> Networks:  # noqa: ARG001
    return TorchNetworks(load_pipeline(folder))


FORMAT = Format(
    name="diffusers",
    precisions=("keep", "fp32", "fp16", "bf16"),
    packages={},
    write=write,
    networks=_open,
    is_model=True,
    least_psnr={"fp16": 30.0, "bf16": 15.0},
    memory=2.0,
)
