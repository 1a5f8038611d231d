"""The folders of whole pipelines: whether they are, by their indices, configs and the headers of their weights.

Nothing is loaded, so that neither torch nor diffusers is imported.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bksdm.common.assets import ART, asset
from bksdm.common.errors import InputError, one_line
from bksdm.common.hub import hub_errors, is_id, missing, not_on_hub
from bksdm.common.runs import files_digest, replace_folder, write_text
from bksdm.families import FAMILIES, family_of, family_of_class
from bksdm.families.family import Family
from bksdm.families.recipe import Config
from bksdm.models.configs import UNPICKLED, check_safetensors, conversion, load_index, local, read_json
from bksdm.models.parts import copy_papers, copy_part, find_weights, load_in_float32, rewrite_weights

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
NETWORKS = tuple(dict.fromkeys(name for family in FAMILIES for name in family.networks))
_TOKENIZERS = tuple(dict.fromkeys(name for family in FAMILIES for name in family.tokenizers))
_FIRST = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")  # of digests that older runs wrote
_DECODERS = "the folder of an AutoencoderTiny, a hub id (OWNER/NAME) or 'emoji'"
_COPY = "copy the whole pipeline"
_EXPORTED = ("vae_decoder", "vae_encoder")  # the two halves of `vae`, in folders that `bksdm export` wrote


def located(model: str | Path) -> Path:
    """The folder or file that MODEL stands for; what is on the Hub and not here yet is downloaded.

    Raises:
        InputError: There is no such model, or it has no safetensors.
    """
    path = local(model)
    if path is not None:
        return path
    from diffusers import DiffusionPipeline

    for variant in (None, "fp16"):
        try:
            return Path(DiffusionPipeline.download(str(model), use_safetensors=True, variant=variant))
        except hub_errors(OSError, ValueError) as error:
            reason = error.__cause__ or error
            if isinstance(reason, hub_errors()):
                raise not_on_hub("model", str(model), reason) from error
            if "variant=" not in str(error):  # it is not that files of this variant are lacking
                raise InputError(f"model {model} cannot be loaded: {one_line(error, 300)}") from error
    raise InputError(f"model {model} has no safetensors for some of its parts; {conversion(model)}")


def fingerprint(model: str | Path) -> str | None:
    """A digest of a local MODEL's networks, tokenizer and scheduler: changed files make another model.

    None for a model on the hub, whose id and revision are its own.
    """
    path = local(model)
    if path is None:
        return None
    parts = dict.fromkeys((*_FIRST, *_EXPORTED, *NETWORKS, *_TOKENIZERS))
    files = [file for part in parts for file in sorted((path / part).rglob("*")) if file.is_file()]
    return files_digest(files if path.is_dir() else [path])


def check_folder(path: Path) -> Family:
    """Refuse a folder that is not a whole pipeline with safetensors weights.

    Returns:
        The family that it is of.

    Raises:
        InputError: Naming what is missing or damaged.
    """
    for name in part_names(path):
        check_weights(path / name, path)
    family = _family(path, read_json(path / "model_index.json"))
    for name in (*family.networks, *family.tokenizers, "scheduler"):
        if not (path / name).is_dir():
            config = path / family.denoiser / "config.json"
            reason = family.why_not(read_json(config)) if config.is_file() else None
            raise InputError(f"{path} has no folder {name}{f': {reason}' if reason else ''}; give a whole pipeline")
    for name in family.tokenizers:
        _check_tokenizer(path / name)
    return family


def _family(path: Path, index: Mapping[str, Any]) -> Family:
    found = index.get("_class_name")
    family = family_of_class(found)
    if family is None:
        raise InputError(f"{path} holds a {found}; give one of {', '.join(f.pipeline for f in FAMILIES)}")
    return family


def check_fit(family: Family, configs: Mapping[str, Config], model: str | Path) -> None:
    """Refuse a denoiser of another family than its pipeline, and networks that do not go together.

    Arguments:
        family: Of the pipeline.
        configs: Of its networks, by their names in it.
        model: The MODEL.

    Raises:
        InputError: Naming both, or what does not fit.
    """
    denoiser = configs[family.denoiser]
    if not family.claims(denoiser):
        raise InputError(f"model {model} is a {family.pipeline} around a U-Net of {family_of(denoiser).name}; {_COPY}")
    reason = family.misfit(configs)
    if reason:
        raise InputError(f"model {model} does not fit together: {reason}; {_COPY} or give another model")


def has_safety_checker(model: str | Path) -> bool:
    """Whether MODEL is a folder whose pipeline has a safety checker; of what is on the Hub, nothing is said."""
    return "safety_checker" in dict(named_parts(load_index(model)))


def part_names(path: Path) -> list[str]:
    """The names of the folders that a pipeline consists of.

    Raises:
        InputError: It is none, or a part is missing or wants code of its own.
    """
    index = path / "model_index.json"
    if not index.is_file():
        raise InputError(f"{path} is not a diffusers pipeline (no model_index.json); give the folder of a pipeline")
    values = read_json(index)
    networks = _family(path, values).networks
    for name, kind in named_parts(values):
        if len(kind) != 2:
            raise InputError(f"{index} names {name} as {kind}, not as a library and a class; copy it again")
        if name in networks and kind[1] != networks[name] and kind[0] in _LIBRARIES:
            raise InputError(f"{path} has a {kind[1]} as its {name}; give one with a {networks[name]}")
        if kind[0] not in _LIBRARIES:
            raise InputError(f"{path} wants code of its own for {name} ({kind[0]}), which is never run")
        if not (path / name).is_dir():
            raise InputError(f"{path} has no folder {name}, which its model_index.json names; copy the whole pipeline")
    return [name for name, _ in named_parts(values)]


def named_parts(index: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Name, and library and class, of the parts that a `model_index.json` names."""
    for name, kind in index.items():
        if name.startswith("_") or not isinstance(kind, list) or kind == [None, None]:
            continue
        if not name.isidentifier():
            raise InputError(f"model_index.json names a part {name!r}, which is no name of a folder; copy it again")
        yield name, kind


def check_weights(folder: Path, model: Path) -> None:
    """Refuse the folder of a part whose weights are damaged, pickled or lacking.

    Arguments:
        folder: The folder.
        model: What to convert where they are pickled.

    Raises:
        InputError: Naming the file.
    """
    weights = find_weights(folder)
    for file in weights.files if weights else ():
        check_safetensors(file)
    pickled = [file for file in sorted(folder.iterdir()) if file.suffix in UNPICKLED]
    if pickled and not weights:
        mend = conversion(model) if find_weights(folder, "bin") else "convert it to safetensors"
        raise InputError(f"{pickled[0]} is a pickle, which can run code and is not loaded; {mend}")
    if not weights and folder.name in NETWORKS:
        raise InputError(f"{folder} has no weights (*.safetensors); copy the whole pipeline")


def _check_tokenizer(folder: Path) -> None:
    """transformers would make an empty tokenizer where the files are missing."""
    has = {file.name for file in folder.iterdir()}
    if "tokenizer.json" not in has and not {"vocab.json", "merges.txt"} <= has:
        raise InputError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; copy the whole pipeline")
    if "tokenizer_config.json" not in has:
        raise InputError(f"{folder} has no tokenizer_config.json; copy the whole pipeline")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """As `replace_folder`.

    Raises:
        InputError: It cannot be written.
    """
    try:
        with replace_folder(folder) as partial:
            yield partial
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error


def copy_parts(source: Path, target: Path, but: Collection[str]) -> None:
    """Copy the index, the papers and the parts of a pipeline's folder, every byte, `but` for some of the parts."""
    copy_papers(source, target)
    for name, _ in named_parts(read_json(source / "model_index.json")):
        if name not in but:
            copy_part(source / name, target / name)
    shutil.copyfile(source / "model_index.json", target / "model_index.json")


def complete(folder: Path, family: Family, formats: Mapping[str, "torch.dtype"]) -> None:
    """Bring the weights of a pipeline's folder into the names and number formats that its readers look for."""
    for part in folder.iterdir():
        if part.is_dir():
            prefixed = family.networks.get(part.name) == "CLIPTextModel"
            rewrite_weights(part, formats.get(part.name), "text_model." if prefixed else "")
            load_in_float32(part)


def save_vocabulary(tokenizer: "Tokenizer", folder: Path) -> None:
    """Write `vocab.json` and `merges.txt`, which older readers look for."""
    model = json.loads(tokenizer.to_str())["model"]
    write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines, ""]))


def decoder_fingerprint(decoder: str | Path | None) -> str | None:
    """A digest of a decoder's files: changed files make another decoder. None for none.

    Raises:
        InputError: There is no such decoder.
    """
    if decoder is None:
        return None
    folder = decoder_folder(decoder)
    return files_digest([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def decoder_folder(decoder: str | Path) -> Path:
    """The folder of the `AutoencoderTiny` that a name stands for; what is on the Hub and not here yet is downloaded.

    Raises:
        InputError: There is no such folder.
    """
    if str(decoder) == ART:
        return asset(ART, "decoder")
    path = Path(decoder).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"decoder {decoder} has no config.json; give the folder of an AutoencoderTiny")
        return path
    if path.is_file():
        raise InputError(f"decoder {decoder} is no folder; give {_DECODERS}")
    if not is_id(decoder):
        raise missing("decoder", decoder, _DECODERS)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(decoder), allow_patterns=["config.json", "*.safetensors"]))
    except hub_errors(OSError) as error:
        raise not_on_hub("decoder", str(decoder), error) from error
