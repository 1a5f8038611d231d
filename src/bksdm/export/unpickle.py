"""Pickled weights become safetensors, once.

Nothing else opens a model's pickles, and this reads tensors from them and runs nothing.
"""

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.common.hub import hub_errors, is_id, missing, not_on_hub
from bksdm.models.configs import load_contents
from bksdm.models.folders import part_names
from bksdm.models.parts import PAPERS, copy_papers, copy_part, find_weights, plain_name, write_index
from bksdm.models.pipelines import load_pipeline
from bksdm.pruning.told import RECIPE_FILE
from bksdm.runtime.defaults import SAMPLING_FILE

_WANTED = (
    "model_index.json",
    RECIPE_FILE,
    SAMPLING_FILE,
    *PAPERS,
    *(f"*/*{suffix}" for suffix in (".json", ".txt", ".model", ".bin", ".safetensors")),
)
_INDEX = "model_index.json"
_MEND = "copy it again, or ask who made it for safetensors"


def pickled(model: str) -> Path:
    """The folder or file of a MODEL whose weights may be pickles; what is on the Hub and not here yet is downloaded.

    Raises:
        InputError: There is no such model.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not is_id(model):
        raise missing("model", model, "a folder, a .ckpt file or a hub id (OWNER/NAME)")
    try:
        return Path(snapshot_download(model, allow_patterns=list(_WANTED)))
    except hub_errors(OSError) as error:
        raise not_on_hub("model", model, error) from error


def unpickle(source: Path, target: Path) -> None:
    """Write a model with safetensors in the place of pickles; all else is copied.

    Arguments:
        source: Folder of a pipeline, or of a single network, or a checkpoint in one file.
        target: An empty folder, or the file.

    Raises:
        InputError: A pickle holds more than tensors, or what comes out is no model.
    """
    if source.is_file():
        save_file(_tensors(source), target, metadata={"format": "pt"})
        load_contents(target)
    elif (source / _INDEX).is_file():
        for name in (_INDEX, RECIPE_FILE, SAMPLING_FILE):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        copy_papers(source, target)
        for name in part_names(source):
            _convert(source / name, target / name)
        load_pipeline(target)
    else:
        _convert(source, target)


def _convert(source: Path, target: Path) -> None:
    """Copy the folder of a part, its weights as safetensors; what is so already, and no mere variant, comes first."""
    copy_part(source, target)
    safe, weights = find_weights(source), find_weights(source, "bin")
    if safe and (not safe.variant or weights is None or weights.variant):
        return
    for file in weights.files if weights else ():
        name = Path(plain_name(file)).with_suffix(".safetensors").name
        save_file(_tensors(file), target / name.removeprefix("pytorch_"), metadata={"format": "pt"})
    write_index(target)


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a pickle; of a checkpoint of Lightning, those of the model."""
    try:
        held: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{file} is damaged, or holds more than tensors, and is not read; {_MEND}") from error
    held = held.get("state_dict", held) if isinstance(held, dict) else {}
    other = next((name for name, value in held.items() if not isinstance(value, Tensor)), None)
    if not held or other is not None:
        raise InputError(f"{file} holds {'no weights' if other is None else f'{other!r}, no tensor'}; {_MEND}")
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in held.items()}
