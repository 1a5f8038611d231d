"""A whole pipeline as one `.safetensors` file with the names of original Stable Diffusion checkpoints.

Where each tensor goes follows from the structure of the networks, and the family knows it. What names and shapes do not
tell goes into the header, so that `load_pipeline` gives back the same pipeline without the hub.
"""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedModel

from bksdm.common.errors import InputError
from bksdm.common.runs import replace_file
from bksdm.families import family_of_pipeline
from bksdm.families.recipe import Recipe
from bksdm.families.single_file import Place
from bksdm.models.contents import KEY, TOKENIZER_FILES, packed
from bksdm.models.pipelines import said
from bksdm.runtime.defaults import Defaults


def write_single_file(
    pipeline: DiffusionPipeline,
    file: Path,
    *,
    dtype: torch.dtype = torch.float32,
    recipe: Recipe | None = None,
    sampling: Defaults | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a pipeline as one file, whole or not at all; an existing file is replaced.

    Arguments:
        pipeline: The pipeline.
        file: Where to, `.safetensors`.
        dtype: Number format of the weights.
        recipe: What it was pruned by; None for a model that is whole.
        sampling: What it draws best with, where that is known.
        metadata: More texts for the header.

    Raises:
        InputError: The layout cannot hold the pipeline, or the file cannot be written.
    """
    if file.suffix != ".safetensors":
        raise InputError(f"out is {file}; give a file name that ends in .safetensors")
    tensors = original_tensors(pipeline, dtype)
    header = {"format": "pt", **(metadata or {}), KEY: json.dumps(_description(pipeline, recipe, sampling))}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as partial:
            save_file(tensors, partial, metadata=header)
            with partial.open("rb") as opened:
                os.fsync(opened.fileno())
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}; choose another --out") from error


def why_not(pipeline: DiffusionPipeline) -> str | None:
    """Why the layout cannot hold a pipeline; None where it can."""
    try:
        _places(pipeline)
    except InputError as error:
        return str(error)
    return None


def original_tensors(pipeline: DiffusionPipeline, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a pipeline by their original names.

    Raises:
        InputError: The layout has no place for one.
    """
    whole: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for part, places in _places(pipeline).items():
        for key, tensor in getattr(pipeline, part).state_dict().items():
            place, value = places[key], tensor.detach().cpu().to(dtype)
            if place.third is not None:
                thirds[place.name][place.third] = value
            else:
                value = value[:, :, None, None] if place.spatial else value.T if place.turned else value
                whole[place.name] = value.contiguous()
    return whole | {name: torch.cat([parts[third] for third in range(3)]) for name, parts in thirds.items()}


def _places(pipeline: DiffusionPipeline) -> dict[str, dict[str, Place]]:
    family = family_of_pipeline(pipeline)
    parts = family.layout(getattr(pipeline, family.denoiser).config).parts
    return {name: part.places(getattr(pipeline, name).state_dict()) for name, part in parts.items()}


def _description(pipeline: DiffusionPipeline, recipe: Recipe | None, sampling: Defaults | None) -> dict[str, Any]:
    """What names and shapes do not tell, as plain values."""
    family = family_of_pipeline(pipeline)
    settings = {name: pipeline.config[name] for name in family.settings}
    return {
        "configs": {name: _plain(getattr(pipeline, name)) for name in family.networks},
        "scheduler": said(pipeline.scheduler),
        **{name: _packed_files(getattr(pipeline, name)) for name in family.tokenizers},
        "recipe": recipe.to_dict() if recipe else None,
        **({"settings": settings} if settings else {}),
        **({"sampling": json.loads(sampling.text())} if sampling else {}),
    }


def _packed_files(tokenizer: CLIPTokenizer) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {name: packed((Path(folder) / name).read_text(encoding="utf-8")) for name in TOKENIZER_FILES}


def _plain(network: Any) -> dict[str, Any]:
    """A config as it is written into a folder; one of transformers in full."""
    of_transformers = isinstance(network, PreTrainedModel)
    text = network.config.to_json_string(use_diff=False) if of_transformers else network.to_json_string()
    values: dict[str, Any] = json.loads(text)
    values.pop("_name_or_path", None)  # where it was loaded from is nobody's business
    return values
