"""What a MODEL says about itself: configs of its networks, its index, and a file's header. No weights are read.

A MODEL is the name of an embedded model (`emoji`), a folder, a `.safetensors` checkpoint or a Hugging Face Hub id.
Nothing here needs torch, so that a config is described at once.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bksdm.common.assets import EMBEDDED, asset
from bksdm.common.errors import InputError, one_line
from bksdm.common.hub import hub_errors, is_id, missing, not_on_hub
from bksdm.families import FAMILIES, family_of, family_of_class
from bksdm.families.family import Family
from bksdm.families.recipe import Config
from bksdm.models.contents import Contents, read_contents

_DENOISERS = tuple(dict.fromkeys(family.denoiser for family in reversed(FAMILIES)))
_TRANSFORMER = ("Transformer2DModel", "DiT2DModel")
_MODELS = "a folder, a .safetensors file, a hub id (OWNER/NAME) or 'emoji'"
UNPICKLED = (".bin", ".ckpt", ".pt", ".pth")


def load_denoiser_config(model: str | Path) -> dict[str, Any]:
    """The config of MODEL's denoiser; no weights are read. A folder may hold no more than that config.

    Raises:
        InputError: There is no such model, or it has no such config.
    """
    path = local(model)
    if path is None:
        path = _config_on_hub(str(model))
    elif path.is_dir():
        places = [path / name / "config.json" for name in _DENOISERS] + [path / "config.json"]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise InputError(
                f"{path} has no {' or '.join(f'{name}/config.json' for name in _DENOISERS)}; give a diffusers pipeline "
                f"folder"
            )
        path = found
    elif path.suffix == ".safetensors":
        return load_config(path, load_contents(path).family.denoiser)
    config = read_json(path)
    if "block_out_channels" not in config and not str(config.get("_class_name")).endswith(_TRANSFORMER):
        raise InputError(f"{path} is not the config of a U-Net or a transformer (it has no block_out_channels)")
    return config


def load_structure(model: str | Path) -> dict[str, Any]:
    """As `load_denoiser_config`, but of a published single file only what its names and shapes tell.

    Those leave out nothing that is counted or drawn but whether one of version 2 draws 512 or 768 pixels; the first is
    taken. diffusers would read the whole file.

    Raises:
        InputError: As `load_denoiser_config`.
    """
    path = local(model)
    if path is None or path.is_dir():
        return load_denoiser_config(model)
    contents = load_contents(path)
    return contents.configs[contents.family.denoiser]


def _config_on_hub(model: str) -> Path:
    """The config of the denoiser of a model on the Hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in _DENOISERS:
        try:
            return Path(hf_hub_download(model, f"{name}/config.json"))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) or name == _DENOISERS[-1]:
                raise not_on_hub("model", model, error) from error
        except hub_errors(OSError) as error:
            raise not_on_hub("model", model, error) from error
    raise AssertionError


def load_config(model: str | Path, part: str) -> dict[str, Any]:
    """The config of a network of MODEL, by the name of its folder; no weights are read.

    Raises:
        InputError: There is no such model, or it has no such network.
    """
    path = local(model)
    if path is None:
        from huggingface_hub import hf_hub_download

        try:
            return read_json(Path(hf_hub_download(str(model), f"{part}/config.json")))
        except hub_errors(OSError) as error:
            raise not_on_hub("model", str(model), error) from error
    if path.is_dir():
        return read_json(path / part / "config.json")
    contents = load_contents(path)
    if not contents.is_stock:
        return contents.configs[part]
    from bksdm.models.pipelines import load_pipeline

    return dict(config_of(getattr(load_pipeline(path), part)))


def load_scheduler_config(model: str | Path) -> dict[str, Any] | None:
    """What the scheduler_config.json of a local MODEL says, or its single file; None where there is none.

    Raises:
        InputError: There is no such model, or the file cannot be read.
    """
    path = local(model)
    if path is not None and path.is_file():
        return load_contents(path).scheduler
    file = path / "scheduler" / "scheduler_config.json" if path else None
    return read_json(file) if file and file.is_file() else None


def context_tokens(model: str | Path) -> int:
    """How many tokens of a caption MODEL's denoiser is told; as is usual of its family where MODEL does not say."""
    path = local(model)
    if path is not None and path.is_file():
        contents = load_contents(path)
        return contents.family.caption_length(contents.configs[contents.family.encoders[0]])
    family = family_of(load_denoiser_config(model))
    file = path / family.encoders[0] / "config.json" if path else None
    return family.caption_length(read_json(file) if file and file.is_file() else {})


def load_index(model: str | Path) -> dict[str, Any]:
    """The `model_index.json` of a local MODEL; empty where it has none, or is on the hub."""
    path = local(model)
    index = path / "model_index.json" if path and path.is_dir() else None
    return read_json(index) if index and index.is_file() else {}


def family_of_model(model: str | Path) -> Family:
    """As the index of MODEL's folder says, or else its denoiser.

    Raises:
        InputError: There is no such model, or its family is not known.
    """
    return family_of_class(load_index(model).get("_class_name")) or family_of(load_denoiser_config(model))


def check_ready(verb: str, *models: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse a verb, or an option of it, that models of some family do not go through yet.

    Arguments:
        verb: The verb.
        models: The MODELs; what is none says so elsewhere.
        options: Options by name, that count where they are set.

    Raises:
        InputError: Naming the family and what it is not ready for.
    """
    asked = [verb, *(f"--{name}" for name, value in (options or {}).items() if value)]
    for model in models:
        try:
            family = family_of_model(model)
        except InputError:  # which is said where it is loaded
            continue
        for word in asked:
            if word in family.unready:
                what = verb if word == verb else f"{verb} {word}"
                raise InputError(f"model {model} is of {family.name}, for which there is no {what} yet")
        if "--pool_keys" in asked and not family.pools_keys(load_denoiser_config(model)):
            raise InputError(
                f"model {model} has no self-attention in the outermost stage of its {family.noun}, and pool_keys pools "
                f"the keys of these alone; leave it out"
            )


def load_contents(file: str | Path) -> Contents:
    """What a single-file checkpoint says about itself; no weights are read.

    Raises:
        InputError: It is not there, damaged, no safetensors file or no Stable Diffusion checkpoint.
    """
    path = local(Path(file))
    assert path is not None  # a Path is never taken for a hub id
    check_safetensors(path)
    return read_contents(path)


def local(model: str | Path) -> Path | None:
    """The path of a local MODEL, or None where it can only be a hub id."""
    if str(model) in EMBEDDED:
        return asset(str(model), "model")
    path = Path(model).expanduser()
    if path.is_file() and path.suffix in UNPICKLED:
        raise InputError(f"{path} is a pickle, which can run code and is not loaded; {conversion(path, 'ldm')}")
    if path.is_file() and path.suffix != ".safetensors":
        raise InputError(f"{path} is not a .safetensors file or a folder; other files are not loaded")
    if path.exists():
        return path
    if not is_id(model):
        raise missing("model", model, _MODELS)
    return None


def conversion(model: str | Path, to: str = "diffusers") -> str:
    """What to do about a MODEL that is pickled."""
    out = "NEW.safetensors" if to == "ldm" else "NEW"
    return f"convert it, once, by bksdm export {model} --to {to} --unpickle --out {out}"


def check_safetensors(file: Path) -> None:
    """Refuse a file that is cut short or damaged.

    Raises:
        InputError: Saying how.
    """
    try:
        with safe_open(file, framework="np") as opened:
            opened.keys()
    except (SafetensorError, OSError, struct.error) as error:
        raise InputError(f"{file} is cut short or damaged ({one_line(error, 300)}); copy or make it again") from error


def config_of(network: Any) -> Config:
    """The config of a network of diffusers or transformers."""
    config = network.config
    return config if isinstance(config, Mapping) else config.to_dict()


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        InputError: It does not.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({one_line(error, 300)})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object")
    return values
