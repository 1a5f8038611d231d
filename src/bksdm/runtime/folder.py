"""An exported folder becomes a `Pipeline`."""

from pathlib import Path
from typing import Any

from bksdm.common.errors import InputError
from bksdm.runtime.conditions import Conditions
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults, read_defaults
from bksdm.runtime.files import read_json
from bksdm.runtime.folder_networks import FolderNetworks
from bksdm.runtime.kinds import Flow, Scale
from bksdm.runtime.onnx_networks import OnnxNetworks
from bksdm.runtime.openvino_networks import OpenvinoNetworks
from bksdm.runtime.pipeline import Pipeline
from bksdm.runtime.schedulers import check_scheduler, with_scheduler
from bksdm.runtime.tokens import Tokenizer, Tokenizers

_FORMATS: dict[str, type[FolderNetworks]] = {"onnx": OnnxNetworks, "web": OnnxNetworks, "openvino": OpenvinoNetworks}
_DENOISERS = ("unet", "transformer")


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
    for part in ("text_encoder", _denoiser(path), "vae_decoder"):
        if not (path / part / _FORMATS[name].file).is_file():
            raise InputError(f"{path / part / _FORMATS[name].file} is missing; export the model again")
    if _FORMATS[name] is OnnxNetworks:
        networks: FolderNetworks = OnnxNetworks(path, threads=threads, low_memory=low_memory)
    else:
        kept = Path(cache) if cache is not None else None
        networks = OpenvinoNetworks(path, threads=threads, low_memory=low_memory, precision=precision, cache=kept)
    return _pipeline(path, networks, about, scheduler)


def _pipeline(path: Path, networks: FolderNetworks, about: dict[str, Any], scheduler: str | None) -> Pipeline:
    conditions, vae = Conditions.of(path), read_json(path / "vae_decoder" / "config.json")
    denoiser = read_json(path / conditions.asks.denoiser / "config.json")
    flow = Flow.of(read_json(path / "model_index.json"), denoiser) if conditions.asks.denoiser != "unet" else None
    own = read_json(path / "scheduler" / "scheduler_config.json")
    config = own if scheduler is None else with_scheduler(own, scheduler)
    check_scheduler(config, flows=flow is not None)
    if denoiser.get("time_cond_proj_dim") is not None:
        raise InputError(f"{path / 'unet'} takes the guidance scale as an input, which is not known here")
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1) * (flow.patch if flow else 1)
        sides = flow.sides(denoiser) if flow else _sides(denoiser)
        return Pipeline(
            networks=networks,
            tokenizer=_tokenizers(path, conditions, about),
            conditions=conditions,
            scheduler=config,
            channels=flow.channels(denoiser) if flow else vae["latent_channels"],
            scale=Scale.of(vae),
            factor=factor,
            multiple=factor * (flow.side_of_a_token if flow else 2 ** (len(denoiser["block_out_channels"]) - 1)),
            height=about.get("height") or sides[0] * factor,
            width=about.get("width") or sides[1] * factor,
            fixed=about.get("height") is not None,
            defaults=_defaults(path, flow),
            flow=flow,
        )
    except KeyError as error:
        raise InputError(f"a config.json in {path} lacks {error}; export the model again") from error


def _sides(unet: dict[str, Any]) -> list[int]:
    """Height and width of a U-Net's latents."""
    side = unet["sample_size"]
    return side if isinstance(side, list) else [side, side]


def _tokenizers(path: Path, conditions: Conditions, about: dict[str, Any]) -> Tokenizers:
    """Those of a folder, which says of chats what is written around prompts and, of captions, how long they are."""
    captions = about.get("captions")
    if captions is None and conditions.asks.denoiser != "unet":
        raise InputError(f"{path} does not say how captions are written; export the model again by bksdm export")
    if captions is None:
        length = read_json(path / "text_encoder" / "config.json")["max_position_embeddings"]
        captions = [{"length": length}] * len(conditions.tokenizers)
    return Tokenizers(
        [
            Tokenizer(
                path / name,
                caption["length"],
                (caption.get("before", ""), caption.get("after", "")),
                marks=conditions.marked,
            )
            for name, caption in zip(conditions.tokenizers, captions, strict=True)
        ]
    )


def _defaults(path: Path, flow: Flow | None) -> Defaults:
    usual = flow.usual if flow else Defaults()
    found = read_defaults(path, usual) or usual
    if found.sigmas is not None and flow is None:
        raise InputError(f"{path} draws by timesteps and takes no sigmas; remove them from {SAMPLING_FILE}")
    return found


def _format_of(path: Path) -> str:
    """The format of a folder that does not name it."""
    for name, kind in _FORMATS.items():
        if (path / _denoiser(path) / kind.file).is_file():
            return name
    raise InputError(f"{path} has neither export.json nor networks; give a folder that bksdm export has written")


def _denoiser(path: Path) -> str:
    """The folder of the denoiser, the U-Net's where there is none."""
    return next((name for name in _DENOISERS if (path / name).is_dir()), _DENOISERS[0])
