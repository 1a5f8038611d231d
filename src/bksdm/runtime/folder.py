"""An exported folder becomes a `Pipeline`."""

from pathlib import Path
from typing import Any

from bksdm.common.errors import InputError
from bksdm.runtime.conditions import Conditions
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults, read_defaults
from bksdm.runtime.files import read_json
from bksdm.runtime.folder_networks import FolderNetworks
from bksdm.runtime.onnx_networks import OnnxNetworks
from bksdm.runtime.openvino_networks import OpenvinoNetworks
from bksdm.runtime.pipeline import Pipeline
from bksdm.runtime.schedulers import check_scheduler, with_scheduler
from bksdm.runtime.tokens import Tokenizer, Tokenizers

_STABLE_DIFFUSION_SCALE = 0.18215
_FORMATS: dict[str, type[FolderNetworks]] = {"onnx": OnnxNetworks, "openvino": OpenvinoNetworks}
_NEEDED = ("text_encoder", "unet", "vae_decoder")


def open_folder(
    folder: str | Path,
    *,
    threads: int | None = None,
    low_memory: bool = False,
    precision: str | None = "f32",
    cache: str | Path | None = None,
    scheduler: str | None = None,
) -> Pipeline:
    """The pipeline that an exported folder holds; its networks are loaded when they are first used.

    Arguments:
        folder: In optimum's layout; what `bksdm export` adds to it, `export.json`, may be missing.
        threads: Of the CPU; all by default.
        low_memory: Whether a network leaves the memory when another is loaded.
        precision: Of OpenVINO's arithmetic; see `OpenvinoNetworks`.
        cache: Where OpenVINO keeps what it compiled.
        scheduler: Name of a scheduler in the place of the folder's own.

    Raises:
        InputError: The folder is incomplete, of a format or with a scheduler that is unknown here, or the
            runtime is not installed.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; give one that bksdm export has written")
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; give at least 1")
    about = read_json(path / "export.json") if (path / "export.json").exists() else {}
    name = about.get("format") or _format_of(path)
    if name not in _FORMATS:
        raise InputError(f"{path} has format {name!r}; give a folder of {' or '.join(_FORMATS)}")
    for part in _NEEDED:
        if not (path / part / _FORMATS[name].file).is_file():
            raise InputError(f"{path / part / _FORMATS[name].file} is missing; export the model again")
    if name == "onnx":
        networks: FolderNetworks = OnnxNetworks(path, threads=threads, low_memory=low_memory)
    else:
        kept = Path(cache) if cache is not None else None
        networks = OpenvinoNetworks(path, threads=threads, low_memory=low_memory, precision=precision, cache=kept)
    return _pipeline(path, networks, about, scheduler)


def _pipeline(path: Path, networks: FolderNetworks, about: dict[str, Any], scheduler: str | None) -> Pipeline:
    text, unet, vae = (read_json(path / part / "config.json") for part in _NEEDED)
    own = read_json(path / "scheduler" / "scheduler_config.json")
    config = own if scheduler is None else with_scheduler(own, scheduler)
    check_scheduler(config)
    if unet.get("time_cond_proj_dim") is not None:
        raise InputError(f"{path / 'unet'} takes the guidance scale as an input, which is not known here")
    conditions = Conditions.of(path)
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        side = unet["sample_size"]
        sides = side if isinstance(side, list) else [side, side]
        size = [about.get(name) or side * factor for name, side in zip(("height", "width"), sides, strict=True)]
        length, channels = text["max_position_embeddings"], vae["latent_channels"]
        halvings = len(unet["block_out_channels"]) - 1
    except KeyError as error:
        raise InputError(f"a config.json in {path} lacks {error}; export the model again") from error
    return Pipeline(
        networks=networks,
        tokenizer=Tokenizers([Tokenizer(path / name, length) for name in conditions.tokenizers]),
        conditions=conditions,
        scheduler=config,
        channels=channels,
        scaling_factor=vae.get("scaling_factor", _STABLE_DIFFUSION_SCALE),
        factor=factor,
        multiple=factor * 2**halvings,
        height=size[0],
        width=size[1],
        fixed=about.get("height") is not None,
        defaults=_defaults(path),
    )


def _defaults(path: Path) -> Defaults:
    found = read_defaults(path) or Defaults()
    if found.sigmas is not None:
        raise InputError(f"{path} draws by timesteps and takes no sigmas; remove them from {SAMPLING_FILE}")
    return found


def _format_of(path: Path) -> str:
    """The format of a folder that does not name it."""
    for name, kind in _FORMATS.items():
        if (path / "unet" / kind.file).is_file():
            return name
    raise InputError(f"{path} has neither export.json nor networks; give a folder that bksdm export has written")
