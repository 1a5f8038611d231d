"""Loading and saving text-to-image pipelines in diffusers' format.

A MODEL is the name of an embedded model (`emoji`), a folder, a `.safetensors` checkpoint or a
Hugging Face Hub id. Weights come from safetensors only, and no code from a model folder is run.
"""

import functools
import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Encoding
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from bksdm.assets import asset
from bksdm.cost import TOKENS
from bksdm.errors import InputError
from bksdm.progress import say
from bksdm.runs import files_digest, replace_folder, write_text
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults, read_defaults
from bksdm.runtime.tokens import beyond, encoded, saved_words
from bksdm.single_file import Contents, read_contents, read_pipeline

EMBEDDED = ("emoji",)
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
_NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
_EXPORTED = ("vae_decoder", "vae_encoder")  # the two halves of `vae`, in folders that `bksdm export` wrote
HUB_ERRORS = (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, ConnectionError)
_UNPICKLED = (".bin", ".ckpt", ".pt", ".pth")


def load_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, *, with_unet: bool = True
) -> StableDiffusionPipeline:
    """The pipeline that MODEL stands for, on the CPU, its networks in `dtype` and in eval mode.

    Arguments:
        model: The MODEL.
        dtype: Number format of the weights.
        with_unet: Whether its U-Net is wanted; without it, `unet` is None.

    Raises:
        InputError: There is no such model, it is incomplete, or its weights are not safetensors.
    """
    path = _local(model)
    arguments = {"dtype": dtype, "use_safetensors": True}
    try:
        if path is not None and path.is_file():
            pipeline = _single_file(path, dtype, with_unet)
        elif path is not None:
            check_folder(path)
            networks = {
                name: _network(path / name, kind, arguments) if with_unet or name != "unet" else None
                for name, kind in _NETWORKS.items()
            }
            pipeline = StableDiffusionPipeline.from_pretrained(path, local_files_only=True, **networks, **arguments)
        else:
            snapshot = StableDiffusionPipeline.download(str(model), use_safetensors=True)
            return load_pipeline(Path(snapshot), dtype, with_unet=with_unet)
    except InputError:
        raise
    except (*HUB_ERRORS, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {model} cannot be loaded: {_one_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    if with_unet:
        _check_parts(pipeline, model)
    for word in hidden_words(pipeline.tokenizer):
        _say_hidden(str(model), word)
    return pipeline


def load_contents(file: str | Path) -> Contents:
    """What a single-file checkpoint says about itself; no weights are read.

    Raises:
        InputError: It is not there, damaged, no safetensors file or no Stable Diffusion checkpoint.
    """
    path = _local(Path(file))
    assert path is not None  # a Path is never taken for a hub id
    _check_safetensors(path)
    return read_contents(path)


def _single_file(path: Path, dtype: torch.dtype, with_unet: bool) -> StableDiffusionPipeline:
    contents = load_contents(path)
    if not contents.is_stock:
        return read_pipeline(path, contents, dtype, with_unet)
    pipeline = StableDiffusionPipeline.from_single_file(str(path), dtype=dtype)
    pipeline.unet = pipeline.unet if with_unet else None
    return pipeline


def fingerprint(model: str | Path) -> str | None:
    """A digest of a local MODEL's networks, tokenizer and scheduler: changed files make another model.

    None for a model on the hub, whose id and revision are its own.
    """
    path = _local(model)
    if path is None:
        return None
    parts = (*_NETWORKS, "tokenizer", "scheduler", *_EXPORTED)
    files = [file for part in parts for file in sorted((path / part).rglob("*")) if file.is_file()]
    return files_digest(files if path.is_dir() else [path])


def drawing_defaults(model: str | Path) -> Defaults | None:
    """What MODEL, or an exported folder, says that it draws best with; None where it does not tell.

    Raises:
        InputError: There is no such model, or what it says means nothing here.
    """
    path = _local(model)
    if path is None:
        try:
            return read_defaults(Path(hf_hub_download(str(model), SAMPLING_FILE)).parent)
        except (*HUB_ERRORS, OSError):
            return None
    return read_defaults(path) if path.is_dir() else load_contents(path).sampling


def drawing(model: str | Path, steps: int | None = None, guidance: float | None = None) -> Defaults:
    """How MODEL draws: as is asked for, else as it draws best, else as usual.

    Raises:
        InputError: As `drawing_defaults` does.
    """
    return (drawing_defaults(model) or Defaults()).chosen(steps, guidance)


def drawings(models: Mapping[str, str], steps: int | None, guidance: float | None) -> dict[str, Defaults]:
    """How each of several models draws, by name.

    Arguments:
        models: MODELs by name.
        steps, guidance: For all of them, where they are asked for.

    Raises:
        InputError: As `drawing_defaults` does.
    """
    return {name: drawing(model, steps, guidance) for name, model in models.items()}


def say_unlike(ways: Mapping[str, Defaults]) -> None:
    """A line where models, by name, do not draw alike."""
    if len(set(ways.values())) > 1:
        told = "; ".join(f"{name}: steps {how.steps}, guidance {how.guidance:g}" for name, how in ways.items())
        say(f"each model draws as it draws best ({told}); --steps and --guidance hold for all")


def network_digest(network: nn.Module) -> str:
    """A short name for what a network computes: its weights, and the factor by which a VAE scales its latents.

    Weights count by value, so that a copy in another file, or in a wider number format, is the same network.
    """
    whole = hashlib.sha256(str(getattr(network.config, "scaling_factor", "")).encode())
    for name, tensor in sorted(network.state_dict().items()):
        whole.update(name.encode())
        whole.update(tensor.float().cpu().contiguous().numpy())
    return whole.hexdigest()[:16]


def check_text_to_image(pipeline: StableDiffusionPipeline, model: str | Path) -> None:
    """Refuse a U-Net that takes more than noisy latents, as those for inpainting and depth do.

    Raises:
        InputError: Naming the numbers of channels.
    """
    takes, latent = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes != latent:
        raise InputError(
            f"model {model} has a U-Net of {takes} channels, and its latents have {latent}; give a text-to-image "
            f"model, not one for inpainting or depth"
        )


def check_drawing(pipeline: StableDiffusionPipeline, model: str | Path, *, masked: bool) -> None:
    """Refuse a U-Net that cannot draw: with a mask, one for in-painting can too.

    Raises:
        InputError: Saying what it takes.
    """
    takes, latent = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes != 2 * latent + 1:
        check_text_to_image(pipeline, model)
    elif not masked:
        raise InputError(f"model {model} is one for in-painting; give it --image and --mask, or another model")


def _check_parts(pipeline: StableDiffusionPipeline, model: str | Path) -> None:
    """Refuse a text encoder whose embeddings the U-Net does not take."""
    width, takes = pipeline.text_encoder.config.hidden_size, pipeline.unet.config.cross_attention_dim
    if width not in (takes if isinstance(takes, (list, tuple)) else (takes,)):
        raise InputError(
            f"model {model} does not fit together: its text encoder gives embeddings of width {width}, and its U-Net "
            f"takes {takes}; copy the whole pipeline"
        )


def _network(folder: Path, kind: Any, arguments: Mapping[str, Any]) -> Any:
    """A network of a pipeline; diffusers and transformers would fill what its file lacks with random numbers."""
    network, report = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **arguments)
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise InputError(f"{folder} lacks {len(lacking)} of its tensors, first {lacking[0]}; copy or make it again")
    return network


def load_network(folder: Path, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A single network from a folder of its own, on the CPU and in eval mode.

    Arguments:
        folder: With `config.json` and safetensors.
        kind: Its class in diffusers.
        dtype: Number format of the weights.

    Raises:
        InputError: It is of another kind, incomplete or damaged, or its weights are not safetensors.
    """
    found = _read_json(folder / "config.json").get("_class_name")
    if found != kind.__name__:
        raise InputError(f"{folder} holds {found}; give the folder of {kind.__name__}")
    _check_weights(folder)
    try:
        return _network(folder, kind, {"dtype": dtype, "use_safetensors": True}).eval()
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {_one_line(error)}") from error


def load_unet_config(model: str | Path) -> dict[str, Any]:
    """The U-Net config of MODEL; no weights are read. A folder may hold no more than `unet/config.json`.

    Raises:
        InputError: There is no such model, or it has no U-Net config.
    """
    path = _local(model)
    if path is None:
        try:
            path = Path(hf_hub_download(str(model), "unet/config.json"))
        except (*HUB_ERRORS, OSError) as error:
            raise InputError(f"model {model} is no folder here and not on the hub: {_one_line(error)}") from error
    elif path.is_dir():
        candidates = [path / "unet" / "config.json", path / "config.json"]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise InputError(f"{path} has no unet/config.json; give a diffusers pipeline folder")
        path = found
    elif path.suffix == ".safetensors":
        return load_config(path, "unet")
    config = _read_json(path)
    if "block_out_channels" not in config:
        raise InputError(f"{path} is not the config of a U-Net (it has no block_out_channels)")
    return config


def load_config(model: str | Path, part: str) -> dict[str, Any]:
    """The config of a network of MODEL, by the name of its folder; no weights are read.

    Raises:
        InputError: There is no such model, or it has no such network.
    """
    path = _local(model)
    if path is None:
        try:
            return _read_json(Path(hf_hub_download(str(model), f"{part}/config.json")))
        except (*HUB_ERRORS, OSError) as error:
            raise InputError(f"model {model} is no folder here and not on the hub: {_one_line(error)}") from error
    if path.is_dir():
        return _read_json(path / part / "config.json")
    contents = load_contents(path)
    if not contents.is_stock:
        return contents.configs[part]
    config = getattr(load_pipeline(path), part).config
    return dict(config) if isinstance(config, Mapping) else dict(config.to_dict())


def context_tokens(model: str | Path) -> int:
    """How many tokens the text encoder of MODEL gives; Stable Diffusion's 77 where MODEL does not tell."""
    path = _local(model)
    if path is not None and path.is_file():
        return int(load_contents(path).configs["text_encoder"]["max_position_embeddings"])
    config = path / "text_encoder" / "config.json" if path else None
    found = _read_json(config).get("max_position_embeddings") if config and config.is_file() else None
    return found if isinstance(found, int) else TOKENS


def check_folder(path: Path) -> None:
    """Refuse a folder that is not a whole Stable Diffusion pipeline with safetensors weights.

    Raises:
        InputError: Naming what is missing or damaged.
    """
    index = path / "model_index.json"
    if not index.is_file():
        raise InputError(f"{path} is not a diffusers pipeline (no model_index.json); give the folder of a pipeline")
    parts = _read_json(index)
    if parts.get("_class_name") not in _PIPELINES:
        raise InputError(f"{path} holds a {parts.get('_class_name')}; give a StableDiffusionPipeline")
    for name, kind in parts.items():
        if name.startswith("_") or not isinstance(kind, list) or kind == [None, None]:
            continue
        if len(kind) != 2:
            raise InputError(f"{index} names {name} as {kind}, not as a library and a class; copy it again")
        if name in _NETWORKS and kind[1] != _NETWORKS[name].__name__ and kind[0] in _LIBRARIES:
            raise InputError(f"{path} has a {kind[1]} as its {name}; give one with a {_NETWORKS[name].__name__}")
        if kind[0] not in _LIBRARIES:
            raise InputError(f"{path} wants code of its own for {name} ({kind[0]}), which is never run")
        if not (path / name).is_dir():
            raise InputError(f"{path} has no folder {name}, which its model_index.json names; copy the whole pipeline")
        _check_weights(path / name)
    for name in (*_NETWORKS, "tokenizer", "scheduler"):
        if not (path / name).is_dir():
            raise InputError(f"{path} has no folder {name}; give a whole pipeline")
    _check_tokenizer(path / "tokenizer")


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path, extra: Mapping[str, str] | None = None) -> None:
    """Write a pipeline so that diffusers, and tools with older habits, load it; whole or not at all.

    transformers 5 leaves out the prefix `text_model.` and the files `vocab.json` and `merges.txt`,
    which transformers 4 and other runtimes look for; they are written here.

    Arguments:
        pipeline: The pipeline.
        folder: Where to; an existing folder is replaced.
        extra: Text files to put beside it, name -> content.

    Raises:
        InputError: The folder cannot be written, or the VAE has a decoder that no config describes.
    """
    if not isinstance(pipeline.vae.decoder, Decoder):
        raise InputError(
            f"cannot write {folder}: the pipeline has a small decoder, which such a folder cannot hold; save it without"
        )
    try:
        with replace_folder(folder) as partial:
            pipeline.save_pretrained(partial, safe_serialization=True)
            _prefix_text_encoder(partial / "text_encoder" / "model.safetensors")
            save_vocabulary(pipeline.tokenizer, partial / "tokenizer")
            for name, content in (extra or {}).items():
                write_text(partial / name, content)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error


def save_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` from a fast tokenizer."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines, ""]))


def with_parts(pipeline: StableDiffusionPipeline, **parts: nn.Module) -> StableDiffusionPipeline:
    """The same pipeline with other parts, by their names; everything else is shared."""
    components = pipeline.components | parts
    needs_checker = pipeline.config.get("requires_safety_checker", components.get("safety_checker") is not None)
    made = StableDiffusionPipeline(**components, requires_safety_checker=needs_checker)
    made.set_progress_bar_config(disable=True)
    return made


def quiet_libraries() -> None:
    """Keep diffusers and transformers from printing bars and notices of their own."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def image_size(pipeline: StableDiffusionPipeline) -> int:
    """The side in pixels of the pictures that a pipeline was made for."""
    return int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)


def check_resolution(resolution: int | None) -> None:
    """Refuse a side in pixels that does not become latents.

    Raises:
        InputError: Naming it.
    """
    if resolution is not None and (resolution < 8 or resolution % 8):
        raise InputError(f"resolution is {resolution}; give a multiple of 8")


def tokenizing(tokenizer: CLIPTokenizer) -> Callable[[str], Tensor]:
    """A function from a caption to its tokens with shape (L,), padded or cut to the model's length.

    Saved words of several vectors are written out, as diffusers' pipelines do.
    """
    encode = _encoding(tokenizer)
    return lambda text: torch.tensor(encode(text)[1].ids)


def cutting(tokenizer: CLIPTokenizer) -> Callable[[str], str]:
    """A function from a caption to its end that `tokenizing` cuts off; nothing where all of it fits."""
    encode = _encoding(tokenizer)
    return lambda text: beyond(*encode(text))


def hidden_words(tokenizer: CLIPTokenizer) -> list[str]:
    """Saved words of several vectors that diffusers, and we with it, reads as their first vector.

    Their names have capital letters, and their tokens small ones, by which diffusers does not find them.
    """
    return [word for word in saved_words(tokenizer.added_tokens_encoder) if word not in tokenizer.tokenize(word)]


@functools.cache  # so that it is said once
def _say_hidden(model: str, word: str) -> None:
    say(f"of the saved word {word} of {model}, the first vector counts alone: give it a name in small letters")


def _encoding(tokenizer: CLIPTokenizer) -> Callable[[str], tuple[str, Encoding]]:
    words, length = saved_words(tokenizer.added_tokens_encoder), tokenizer.model_max_length

    def encode(text: str) -> Encoding:
        made = tokenizer(text, padding="max_length", truncation=True, max_length=length)
        return cast(Encoding, made.encodings[0])

    return lambda text: encoded(text, encode, words)


def _local(model: str | Path) -> Path | None:
    """The path of a local MODEL, or None where it can only be a hub id."""
    if str(model) in EMBEDDED:
        return asset(str(model), "model")
    path = Path(model).expanduser()
    if path.is_dir() or path.is_file():
        if path.is_file() and path.suffix != ".safetensors":
            raise InputError(f"{path} is not a .safetensors file or a folder; other files are not loaded")
        return path
    if isinstance(model, Path) or path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise InputError(f"model {model} does not exist; give a folder, a .safetensors file, a hub id or 'emoji'")
    return None


def _check_weights(folder: Path) -> None:
    found = sorted(folder.glob("*.safetensors"))
    for file in found:
        _check_safetensors(file)
    pickled = [file for file in folder.iterdir() if file.suffix in _UNPICKLED]
    if pickled and not found:
        raise InputError(f"{pickled[0]} is a pickle, which is never loaded; convert it to safetensors")
    if not found and folder.name in _NETWORKS:
        raise InputError(f"{folder} has no weights (*.safetensors); copy the whole pipeline")


def _check_tokenizer(folder: Path) -> None:
    """transformers would make an empty tokenizer where the files are missing."""
    has = {file.name for file in folder.iterdir()}
    if "tokenizer.json" not in has and not {"vocab.json", "merges.txt"} <= has:
        raise InputError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; copy the whole pipeline")
    if "tokenizer_config.json" not in has:
        raise InputError(f"{folder} has no tokenizer_config.json; copy the whole pipeline")


def _check_safetensors(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError, struct.error) as error:
        raise InputError(f"{file} is cut short or damaged ({_one_line(error)}); copy or make it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({_one_line(error)})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object")
    return values


def _prefix_text_encoder(file: Path) -> None:
    tensors = load_file(file)
    prefixed = {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in tensors.items()}
    if prefixed.keys() != tensors.keys():
        save_file(prefixed, file, metadata={"format": "pt"})


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
