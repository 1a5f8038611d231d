"""Loading and saving text-to-image pipelines in diffusers' format.

A MODEL is the name of an embedded model (`emoji`), a folder, a `.safetensors` checkpoint or a
Hugging Face Hub id. Weights come from safetensors only, and no code from a model folder is run.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.models.autoencoders.vae import Decoder
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from tokenizers import Encoding
from torch import Tensor, nn
from transformers import CLIPTokenizer, CLIPVisionModelWithProjection

from bksdm.common.devices import PRECISIONS
from bksdm.common.errors import InputError, one_line
from bksdm.common.hub import hub_errors, not_on_hub
from bksdm.common.progress import say
from bksdm.common.runs import files_digest, replace_folder, write_text
from bksdm.data.pictures import Size, sides
from bksdm.families import FAMILIES, family_claiming, family_of, family_of_class, family_of_pipeline
from bksdm.families.family import Family
from bksdm.families.recipe import Config
from bksdm.models.configs import (
    UNPICKLED,
    check_safetensors,
    config_of,
    conversion,
    family_of_model,
    load_contents,
    load_denoiser_config,
    load_index,
    local,
    read_json,
)
from bksdm.models.parts import (
    Tensors,
    copy_papers,
    copy_part,
    find_weights,
    half_format,
    load_in_float32,
    rewrite_weights,
    write_weights,
)
from bksdm.models.single_file import read_pipeline, unread
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults, read_defaults
from bksdm.runtime.schedulers import LEFT_OUT, told
from bksdm.runtime.tokens import beyond, encoded, hidden_words, saved_words

_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
_NETWORKS = tuple(dict.fromkeys(name for family in FAMILIES for name in family.networks))
_TOKENIZERS = tuple(dict.fromkeys(name for family in FAMILIES for name in family.tokenizers))
_OTHERS = {"safety_checker": StableDiffusionSafetyChecker, "image_encoder": CLIPVisionModelWithProjection}
_ALL_NETWORKS = (*_NETWORKS, *_OTHERS)
_FIRST = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")  # of digests that older runs wrote
_EXPORTED = ("vae_decoder", "vae_encoder")  # the two halves of `vae`, in folders that `bksdm export` wrote
_CAPTION = "\ue000"  # in no caption
_COPY = "copy the whole pipeline"


def load_pipeline(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    with_denoiser: bool = True,
    denoiser_dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """The pipeline that MODEL stands for, on the CPU, its networks in `dtype` and in eval mode.

    Arguments:
        model: The MODEL.
        dtype: Number format of the weights.
        with_denoiser: Whether its denoiser is wanted, which is None otherwise.
        denoiser_dtype: Number format of its weights, where that is another.

    Raises:
        InputError: There is no such model, it is incomplete, or its weights are not safetensors.
    """
    path = located(model)
    with _loading(model):
        if path.is_file():
            pipeline = _single_file(path, dtype, with_denoiser)
            if denoiser_dtype and with_denoiser:
                denoiser(pipeline).to(denoiser_dtype)
        else:
            pipeline = _folder(path, dtype, with_denoiser, denoiser_dtype)
        check_parts(pipeline, model)
    return _ready(pipeline, path)


def load_denoiser(model: str | Path, dtype: torch.dtype) -> Any:
    """The denoiser of MODEL alone, on the CPU and in eval mode.

    Raises:
        InputError: As `load_pipeline`.
    """
    path = located(model)
    if path.is_file():
        return denoiser(load_pipeline(path, denoiser_dtype=dtype))
    with _loading(model):
        family = check_folder(path)
        arguments = {"dtype": dtype, "use_safetensors": True}
        return _network(path / family.denoiser, family.network_class(family.denoiser), arguments).eval()


def open_pipeline(model: str | Path) -> tuple[DiffusionPipeline, Mapping[str, Tensor]]:
    """The pipeline that MODEL stands for without the weights of its U-Net, and these by name.

    They are in their own number format, and each is read when it is asked for. The other networks have their weights
    where MODEL is a single file; of a folder they can be copied, and are on the meta device.

    Raises:
        InputError: As `load_pipeline`.
    """
    path = located(model)
    with _loading(model):
        pipeline, tensors = (_open_file if path.is_file() else _open_folder)(path)
        check_parts(pipeline, model)
    return _ready(pipeline, path), tensors


@contextmanager
def _loading(model: str | Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except hub_errors(OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {model} cannot be loaded: {one_line(error, 300)}") from error


def _ready(pipeline: DiffusionPipeline, path: Path) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(_name_or_path=str(path))
    for tokenizer in tokenizers(pipeline):
        for word in hidden_words(saved_words(tokenizer.added_tokens_encoder), tokenizer.tokenize):
            say_hidden(word)
    return pipeline


def located(model: str | Path) -> Path:
    """The folder or file that MODEL stands for; what is on the Hub and not here yet is downloaded.

    Raises:
        InputError: There is no such model, or it has no safetensors.
    """
    path = local(model)
    if path is not None:
        return path
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


def _folder(
    path: Path, dtype: torch.dtype, with_denoiser: bool, denoiser_dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    family = check_folder(path)
    arguments = {"dtype": dtype, "use_safetensors": True}
    own = {family.denoiser: arguments | {"dtype": denoiser_dtype or dtype}}
    networks = {
        name: _network(path / name, family.network_class(name), own.get(name, arguments))
        if with_denoiser or name != family.denoiser
        else None
        for name in family.networks
    }
    return _around(path, family, networks | _others(path, arguments), arguments)


def _around(path: Path, family: Family, networks: Mapping[str, Any], arguments: Mapping[str, Any]) -> DiffusionPipeline:
    """The pipeline in a folder, with these of its networks."""
    kind: Any = getattr(diffusers, family.pipeline)
    pipeline: DiffusionPipeline = kind.from_pretrained(path, local_files_only=True, **networks, **arguments)
    return pipeline


def _open_folder(path: Path) -> tuple[DiffusionPipeline, Mapping[str, Tensor]]:
    """Every network is opened by itself, in half precision, to see that it is whole, and goes again."""
    family = check_folder(path)
    arguments = {"dtype": torch.float16, "use_safetensors": True}
    others = [name for name in family.networks if name != family.denoiser]
    networks = {name: _emptied(path / name, family.network_class(name), arguments) for name in others}
    denoiser, tensors = _unread(path / family.denoiser, family)
    optional = dict.fromkeys(_OTHERS.keys() & dict(_parts(read_json(path / "model_index.json"))).keys())
    return _around(path, family, networks | optional | {family.denoiser: denoiser}, arguments), tensors


def _emptied(folder: Path, kind: Any, arguments: Mapping[str, Any]) -> Any:
    """A network that is seen to be whole, without its weights; of a text encoder, which may be large, none is read."""
    if issubclass(kind, transformers.PreTrainedModel):
        return _network(folder, kind, {**arguments, "device_map": {"": "meta"}})
    return _network(folder, kind, arguments).to("meta")


def _open_file(path: Path) -> tuple[DiffusionPipeline, Mapping[str, Tensor]]:
    contents, formats = load_contents(path), set(formats_of(path, "keep").values())
    dtype = formats.pop() if len(formats) == 1 else torch.float32
    if contents.is_stock:
        pipeline = _single_file(path, dtype, with_denoiser=True)
        return pipeline, denoiser(pipeline).state_dict()
    pipeline = read_pipeline(path, contents, dtype, with_denoiser=False)
    return pipeline, unread(path, contents, denoiser(pipeline))


def _others(path: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Networks that a pipeline may have besides, where a variant stands in: diffusers takes one variant for all."""
    found = {}
    for name, kind in _OTHERS.items():
        weights = find_weights(path / name) if (path / name).is_dir() else None
        if weights and weights.variant:
            found[name] = kind.from_pretrained(path / name, variant=weights.variant, **arguments)
    return found


def _single_file(path: Path, dtype: torch.dtype, with_denoiser: bool) -> DiffusionPipeline:
    contents = load_contents(path)
    family = contents.family
    pipeline: DiffusionPipeline
    if contents.is_stock:
        pipeline = getattr(diffusers, family.pipeline).from_single_file(str(path), dtype=dtype)
    else:
        pipeline = read_pipeline(path, contents, dtype, with_denoiser)
    if not with_denoiser:
        setattr(pipeline, family.denoiser, None)
    return pipeline


def fingerprint(model: str | Path) -> str | None:
    """A digest of a local MODEL's networks, tokenizer and scheduler: changed files make another model.

    None for a model on the hub, whose id and revision are its own.
    """
    path = local(model)
    if path is None:
        return None
    parts = dict.fromkeys((*_FIRST, *_EXPORTED, *_NETWORKS, *_TOKENIZERS))
    files = [file for part in parts for file in sorted((path / part).rglob("*")) if file.is_file()]
    return files_digest(files if path.is_dir() else [path])


def drawing_defaults(model: str | Path) -> Defaults | None:
    """What MODEL, or an exported folder, says that it draws best with; None where it does not tell.

    Raises:
        InputError: There is no such model, or what it says means nothing here.
    """
    path = local(model)
    if path is None:
        try:
            return read_defaults(Path(hf_hub_download(str(model), SAMPLING_FILE)).parent, _usual(model))
        except hub_errors(OSError) as error:
            if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, EntryNotFoundError):
                _say_unknown(str(model), type(error).__name__, _usual(model))
            return None
    own = read_defaults(path, _usual(model)) if path.is_dir() else load_contents(path).sampling
    if own and own.sigmas is not None and not family_of_model(model).by_flow:
        raise InputError(
            f"{path / SAMPLING_FILE} has sigmas, and models of {family_of_model(model).name} draw by timesteps; remove "
            f"them from it"
        )
    return own


@functools.cache  # so that it is said once
def _say_unknown(model: str, reason: str, usual: Defaults) -> None:
    say(
        f"whether {model} has a {SAMPLING_FILE} could not be asked ({reason}); it draws in {usual.steps} "
        f"steps with guidance {usual.guidance:g} unless --steps and --guidance say otherwise"
    )


def drawing(
    model: str | Path,
    steps: int | None = None,
    guidance: float | None = None,
    interval: Sequence[float] | None = None,
    reuse: int | None = None,
) -> Defaults:
    """How MODEL draws: as is asked for, else as it draws best, else as is usual for its family.

    Raises:
        InputError: As `drawing_defaults` and `Defaults.chosen` do.
    """
    return (drawing_defaults(model) or _usual(model)).chosen(steps, guidance, interval, reuse)


def _usual(model: str | Path) -> Defaults:
    """How models of the same family are drawn; what is none says so where it is loaded."""
    try:
        return family_of_model(model).usual
    except InputError:
        return Defaults()


def drawings(
    models: Mapping[str, str],
    steps: int | None,
    guidance: float | None,
    interval: Sequence[float] | None = None,
    reuse: int | None = None,
) -> dict[str, Defaults]:
    """How each of several models draws, by name.

    Arguments:
        models: MODELs by name.
        steps, guidance, interval, reuse: For all of them, where they are asked for.

    Raises:
        InputError: As `drawing` does.
    """
    return {name: drawing(model, steps, guidance, interval, reuse) for name, model in models.items()}


def say_unlike(ways: Mapping[str, Defaults]) -> None:
    """A line where models, by name, do not draw alike."""
    if len(set(ways.values())) > 1:
        told = "; ".join(f"{name}: steps {how.steps}, guidance {how.guidance:g}" for name, how in ways.items())
        say(f"each model draws as it draws best ({told}); --steps and --guidance hold for all")


def network_digest(*networks: Any) -> str:
    """A short name for what networks compute: their weights, and the factor by which a VAE scales its latents.

    Weights count by value, so that a copy in another file, or in a wider number format, is the same network.
    """
    whole = hashlib.sha256()
    for network in networks:
        whole.update(str(getattr(network.config, "scaling_factor", "")).encode())
        for name, tensor in sorted(network.state_dict().items()):
            whole.update(name.encode())
            whole.update(tensor.float().cpu().contiguous().numpy())
    return whole.hexdigest()[:16]


def check_text_to_image(pipeline: DiffusionPipeline, model: str | Path) -> None:
    """Refuse a U-Net that takes more than noisy latents, as those for inpainting and depth do.

    Raises:
        InputError: Naming the numbers of channels.
    """
    takes, latent = _channels(pipeline)
    if takes != latent:
        raise InputError(
            f"model {model} has a U-Net of {takes} channels, and its latents have {latent}; give a text-to-image "
            f"model, not one for inpainting or depth"
        )


def _channels(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Channels that the denoiser takes, and those of latents."""
    family, vae = family_of_pipeline(pipeline), pipeline.vae.config
    return family.latent_channels(denoiser(pipeline).config), family.channels_of(vae)


def check_drawing(pipeline: DiffusionPipeline, model: str | Path, *, masked: bool) -> None:
    """Refuse a U-Net that cannot draw: with a mask, one for in-painting can too.

    Raises:
        InputError: Saying what it takes.
    """
    takes, latent = _channels(pipeline)
    if takes != 2 * latent + 1:
        check_text_to_image(pipeline, model)
    elif not masked:
        raise InputError(f"model {model} is one for in-painting; give it --image and --mask, or another model")


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


def check_parts(pipeline: DiffusionPipeline, model: str | Path) -> None:
    """Refuse a U-Net of another family than its pipeline, and networks that do not go together.

    Raises:
        InputError: Naming both, or what does not fit.
    """
    family = family_of_pipeline(pipeline)
    networks = {name: getattr(pipeline, name) for name in family.networks}
    if networks[family.denoiser] is None:
        with torch.device("meta"):
            networks[family.denoiser] = family.build(load_denoiser_config(model))
    configs = {name: config_of(network) for name, network in networks.items()}
    denoiser = configs[family.denoiser]
    if not family.claims(denoiser):
        raise InputError(f"model {model} is a {family.pipeline} around a U-Net of {family_of(denoiser).name}; {_COPY}")
    reason = family.misfit(configs)
    if reason:
        raise InputError(f"model {model} does not fit together: {reason}; {_COPY} or give another model")


def remark_on(teacher: DiffusionPipeline) -> None:
    """Say what its family has to say of a teacher."""
    configs = (teacher.config, denoiser(teacher).config, teacher.scheduler.config)
    remark = family_of_pipeline(teacher).remark(*configs)
    if remark:
        say(remark)


def denoiser(pipeline: DiffusionPipeline) -> Any:
    """The network of a pipeline that is made smaller; None where it was left out."""
    return getattr(pipeline, family_of_pipeline(pipeline).denoiser)


def text_encoders(pipeline: DiffusionPipeline) -> list[Any]:
    """The text encoders of a pipeline."""
    family = family_of_pipeline(pipeline)
    return [getattr(pipeline, name) for name in family.encoders]


def safety_checker(pipeline: DiffusionPipeline) -> Any:
    """The network that makes pictures black; None where there is none."""
    return getattr(pipeline, "safety_checker", None)


def tokenizers(pipeline: DiffusionPipeline) -> list[CLIPTokenizer]:
    """Their tokenizers, in the same order."""
    family = family_of_pipeline(pipeline)
    return [getattr(pipeline, name) for name in family.tokenizers]


def _network(folder: Path, kind: Any, arguments: Mapping[str, Any]) -> Any:
    """A network of a pipeline; diffusers and transformers would fill what its file lacks with random numbers."""
    weights = find_weights(folder)
    network, report = kind.from_pretrained(
        folder,
        variant=weights.variant if weights else None,
        local_files_only=True,
        output_loading_info=True,
        **arguments,
    )
    _check_complete(folder, report["missing_keys"])
    return network


def _check_complete(folder: Path, lacking: Collection[str]) -> None:
    if lacking:
        raise InputError(f"{folder} lacks {len(lacking)} of its tensors, first {min(lacking)}; copy or make it again")


def load_network(folder: Path, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A single network from a folder of its own, on the CPU and in eval mode.

    Arguments:
        folder: With `config.json` and safetensors.
        kind: Its class in diffusers.
        dtype: Number format of the weights.

    Raises:
        InputError: It is of another kind, incomplete or damaged, or its weights are not safetensors.
    """
    found = read_json(folder / "config.json").get("_class_name")
    if found != kind.__name__:
        raise InputError(f"{folder} holds {found}; give the folder of {kind.__name__}")
    _check_weights(folder, folder)
    try:
        return _network(folder, kind, {"dtype": dtype, "use_safetensors": True}).eval()
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {one_line(error, 300)}") from error


def _unread(folder: Path, family: Family) -> tuple[Any, Tensors]:
    """A denoiser on the meta device, and its tensors, each read when it is asked for."""
    weights = find_weights(folder)
    assert weights, "the folder was checked"
    with torch.device("meta"):
        denoiser = family.build(read_json(folder / "config.json"))
    wanted, tensors = denoiser.state_dict(), Tensors(weights)
    _check_complete(folder, wanted.keys() - tensors.keys())
    for name, tensor in wanted.items():
        if tensors.shape(name) != tuple(tensor.shape):
            raise InputError(
                f"{folder}: {name} has shape {tensors.shape(name)}, and its config wants "
                f"{tuple(tensor.shape)}; copy or make it again"
            )
    return denoiser, tensors


def formats_of(model: str | Path, precision: str) -> dict[str, torch.dtype]:
    """Number formats of the parts of what is made from MODEL, for `save_pipeline`.

    Arguments:
        model: The MODEL.
        precision: keep, for that which each of its networks has, or the one for all of them.
    """
    if precision != "keep":
        return dict.fromkeys(_ALL_NETWORKS, PRECISIONS[precision])
    path = located(model)
    if path.is_dir():
        return {}  # files are copied
    parts = load_contents(path).layout.parts
    return {name: half_format([path], part.prefix) or torch.float32 for name, part in parts.items()}


def check_folder(path: Path) -> Family:
    """Refuse a folder that is not a whole pipeline with safetensors weights.

    Returns:
        The family that it is of.

    Raises:
        InputError: Naming what is missing or damaged.
    """
    for name in part_names(path):
        _check_weights(path / name, path)
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


def has_safety_checker(model: str | Path) -> bool:
    """Whether MODEL is a folder whose pipeline has a safety checker; of what is on the Hub, nothing is said."""
    return "safety_checker" in dict(_parts(load_index(model)))


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
    for name, kind in _parts(values):
        if len(kind) != 2:
            raise InputError(f"{index} names {name} as {kind}, not as a library and a class; copy it again")
        if name in networks and kind[1] != networks[name] and kind[0] in _LIBRARIES:
            raise InputError(f"{path} has a {kind[1]} as its {name}; give one with a {networks[name]}")
        if kind[0] not in _LIBRARIES:
            raise InputError(f"{path} wants code of its own for {name} ({kind[0]}), which is never run")
        if not (path / name).is_dir():
            raise InputError(f"{path} has no folder {name}, which its model_index.json names; copy the whole pipeline")
    return [name for name, _ in _parts(values)]


def _parts(index: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Name, and library and class, of the parts that a `model_index.json` names."""
    for name, kind in index.items():
        if name.startswith("_") or not isinstance(kind, list) or kind == [None, None]:
            continue
        if not name.isidentifier():
            raise InputError(f"model_index.json names a part {name!r}, which is no name of a folder; copy it again")
        yield name, kind


@dataclass(frozen=True)
class Origin:
    """Where a pipeline came from.

    Attributes:
        folder: Of the pipeline that it was made from.
        changed: Names of the parts that are not in that folder.
    """

    folder: Path
    changed: tuple[str, ...]

    @classmethod
    def of(cls, loaded: DiffusionPipeline, changed: tuple[str, ...] | None = None) -> "Origin | None":
        """The folder that `load_pipeline` read, whose denoiser alone changed if nothing is said; None for a file."""
        path = Path(loaded.config["_name_or_path"])
        if changed is None:
            changed = (family_of_pipeline(loaded).denoiser,)
        return cls(path, changed) if path.is_dir() else None


def save_pipeline(
    pipeline: DiffusionPipeline,
    folder: Path,
    extra: Mapping[str, str] | None = None,
    origin: Origin | None = None,
    formats: Mapping[str, torch.dtype] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a pipeline so that diffusers, and tools with older habits, load it; whole or not at all.

    What did not change is copied from where it came from, for a saved copy would say more than its original: the
    scheduler's defaults of today, which other schedulers would then take over. transformers 5 leaves out the prefix
    `text_model.` and the files `vocab.json` and `merges.txt`, which transformers 4 and other runtimes look for; what
    lacks them gets them here.

    Arguments:
        pipeline: The pipeline.
        folder: Where to; an existing folder is replaced.
        extra: Text files to put beside it, name -> content.
        origin: What the parts that did not change are copied from; without one, all is written from the pipeline.
        formats: Number formats of the weights by part; the others stay as they are.
        weights: Those of the denoiser, where it lies on the meta device and there is an origin.

    Raises:
        InputError: The folder cannot be written, or the VAE has a decoder that no config describes.
    """
    if not isinstance(pipeline.vae.decoder, Decoder):
        raise InputError(
            f"cannot write {folder}: the pipeline has a small decoder, which such a folder cannot hold; save it without"
        )
    try:
        with replace_folder(folder) as partial:
            if origin:
                _copy_parts(pipeline, origin, partial, weights)
            else:
                _write_parts(pipeline, partial)
            _complete(pipeline, partial, formats or {})
            for name, content in (extra or {}).items():
                write_text(partial / name, content)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error


def _write_parts(pipeline: DiffusionPipeline, folder: Path) -> None:
    pipeline.save_pretrained(folder, safe_serialization=True)
    text = json.dumps(said(pipeline.scheduler), indent=2, sort_keys=True)
    write_text(folder / "scheduler" / "scheduler_config.json", text + "\n")


def _copy_parts(
    pipeline: DiffusionPipeline, origin: Origin, folder: Path, weights: Mapping[str, Tensor] | None
) -> None:
    """The papers and parts of where the pipeline came from, and its own parts that changed."""
    copy_papers(origin.folder, folder)
    index = read_json(origin.folder / "model_index.json")
    named = dict(_parts(index))
    for name in named:
        if name not in origin.changed:
            copy_part(origin.folder / name, folder / name)
    for name in origin.changed:
        part = getattr(pipeline, name)
        if getattr(part, "device", None) == torch.device("meta"):
            assert weights is not None
            part.save_config(folder / name)
            write_weights(folder / name, weights, part.state_dict())
        else:
            part.save_pretrained(folder / name)
        named[name] = [named[name][0], type(part).__name__]
    if index | named == index:
        shutil.copyfile(origin.folder / "model_index.json", folder / "model_index.json")
    else:
        write_text(folder / "model_index.json", json.dumps(index | named, indent=2) + "\n")


def _complete(pipeline: DiffusionPipeline, folder: Path, formats: Mapping[str, torch.dtype]) -> None:
    """What readers of the folder look for, where it lacks that."""
    family = family_of_pipeline(pipeline)
    for part in folder.iterdir():
        if part.is_dir():
            prefixed = family.networks.get(part.name) == "CLIPTextModel"
            rewrite_weights(part, formats.get(part.name), "text_model." if prefixed else "")
            load_in_float32(part)
    for name in family.tokenizers:
        if isinstance(getattr(pipeline, name), CLIPTokenizer) and not (folder / name / "merges.txt").is_file():
            save_vocabulary(getattr(pipeline, name), folder / name)


def called(model: str) -> str:
    """A MODEL's name for people: its folder's, or that of the run whose artefact it is."""
    path = Path(model)
    return path.parent.name if path.name in ("student", "model") and path.parent.name else path.name


def scheduler_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """All options of a scheduler as scheduler_config.json has them, and the names of those that are only defaults.

    Another scheduler that is made of it takes its own defaults for these, as it does of the model's own file.
    """
    values: dict[str, Any] = json.loads(scheduler.to_json_string())
    return values | {LEFT_OUT: sorted(scheduler.config.get(LEFT_OUT, ()))}


def said(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The config of a scheduler without what it was not told: another scheduler has defaults of its own there."""
    return told(scheduler_config(scheduler))


def save_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` from a fast tokenizer."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines, ""]))


def with_parts(pipeline: DiffusionPipeline, **parts: nn.Module) -> DiffusionPipeline:
    """The same pipeline with other parts, by their names; everything else is shared."""
    family = family_of_pipeline(pipeline)
    made = family.assembled(pipeline.components | parts, pipeline.config, family.pipeline)
    made.set_progress_bar_config(disable=True)
    return made


def quiet_libraries() -> None:
    """Keep diffusers and transformers from printing bars and notices of their own."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def image_size(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Height and width in pixels of the pictures that a pipeline was made for."""
    return sides(config_size(denoiser(pipeline).config, pixels_a_side(pipeline)))


def pixels_a_side(pipeline: DiffusionPipeline) -> int:
    """Pixels to a side of one of the denoiser's latents."""
    return int(pipeline.vae_scale_factor * family_of_pipeline(pipeline).patch)


def config_size(unet: Config, factor: int) -> Size:
    """The size in pixels of the pictures that a denoiser was made for: the side, where they are squares.

    Arguments:
        unet: Its config.
        factor: Pixels to a side of a latent.

    Raises:
        InputError: The config does not say.
    """
    height, width = (side * factor for side in family_claiming(unet).latent_sides(unet))
    return height if height == width else (height, width)


def pixels_of_a_token(pipeline: DiffusionPipeline) -> int:
    """Of which heights and widths of pictures in pixels are multiples."""
    return pixels_a_side(pipeline) * isqrt(family_of_pipeline(pipeline).latents_of_a_token)


def check_multiple(multiple: int, **sides_by_name: int | None) -> None:
    """Refuse sides in pixels that do not become tokens, of which they are a `multiple`; see `pixels_of_a_token`.

    Raises:
        InputError: Naming one.
    """
    for name, side in sides_by_name.items():
        if side is not None and side % multiple:
            raise InputError(f"{name} is {side}; give a multiple of {multiple} for this model")


def check_resolution(resolution: int | None) -> None:
    """Refuse a side in pixels that does not become latents.

    Raises:
        InputError: Naming it.
    """
    if resolution is not None and (resolution < 8 or resolution % 8):
        raise InputError(f"resolution is {resolution}; give a multiple of 8")


def tokenizing(model: DiffusionPipeline | CLIPTokenizer) -> Callable[[str], Tensor]:
    """A function from a caption to its tokens, padded or cut to the model's length; see `Family.token_shape`.

    Of a pipeline, or of CLIP alone. Saved words of several vectors are written out, as diffusers does.
    """
    family, encoders = _encoders(model)
    return lambda text: family.tokens([encode(text)[1] for encode in encoders])


def cutting(model: DiffusionPipeline | CLIPTokenizer) -> Callable[[str], str]:
    """A function from a caption to its end that `tokenizing` cuts off, at most; nothing where all of it fits."""
    _, encoders = _encoders(model)
    return lambda text: max((beyond(*encode(text)) for encode in encoders), key=len)


def captions(pipeline: DiffusionPipeline) -> list[dict[str, Any]]:
    """Of each tokenizer of a pipeline, how many tokens it gives, and what is written before and behind a caption."""
    family, own = family_of_pipeline(pipeline), tokenizers(pipeline)
    found = []
    for tokenizer, length in zip(own, family.token_lengths(own), strict=True):
        before, after = family.prompted(tokenizer, _CAPTION).split(_CAPTION)
        found.append({"length": length, "before": before, "after": after})
    return found


def caption_length(pipeline: DiffusionPipeline) -> int:
    """How many tokens of a caption the denoiser of a pipeline is told."""
    return family_of_pipeline(pipeline).token_lengths(tokenizers(pipeline))[-1]


def _encoders(
    model: DiffusionPipeline | CLIPTokenizer,
) -> tuple[Family, list[Callable[[str], tuple[str, Encoding]]]]:
    """Of each tokenizer, a function from a caption to the text that it is given and what it makes of that."""
    family, own = FAMILIES[-1], [model]
    if isinstance(model, DiffusionPipeline):
        family, own = family_of_pipeline(model), tokenizers(model)
    return family, [
        _encoding(tokenizer, length, functools.partial(family.prompted, tokenizer))
        for tokenizer, length in zip(own, family.token_lengths(own), strict=True)
    ]


@functools.cache  # so that it is said once
def say_hidden(word: str) -> None:
    """A line about a word of `hidden_words`."""
    say(f"of the saved word {word} of the model, the first vector counts alone: give it a name in small letters")


def _encoding(
    tokenizer: CLIPTokenizer, length: int, prompted: Callable[[str], str]
) -> Callable[[str], tuple[str, Encoding]]:
    words = saved_words(tokenizer.added_tokens_encoder)

    def encode(text: str) -> Encoding:
        made = tokenizer(text, padding="max_length", truncation=True, max_length=length)
        return cast(Encoding, made.encodings[0])

    return lambda text: encoded(prompted(text), encode, words)


def _check_weights(folder: Path, model: Path) -> None:
    weights = find_weights(folder)
    for file in weights.files if weights else ():
        check_safetensors(file)
    pickled = [file for file in sorted(folder.iterdir()) if file.suffix in UNPICKLED]
    if pickled and not weights:
        mend = conversion(model) if find_weights(folder, "bin") else "convert it to safetensors"
        raise InputError(f"{pickled[0]} is a pickle, which can run code and is not loaded; {mend}")
    if not weights and folder.name in _NETWORKS:
        raise InputError(f"{folder} has no weights (*.safetensors); copy the whole pipeline")


def _check_tokenizer(folder: Path) -> None:
    """transformers would make an empty tokenizer where the files are missing."""
    has = {file.name for file in folder.iterdir()}
    if "tokenizer.json" not in has and not {"vocab.json", "merges.txt"} <= has:
        raise InputError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; copy the whole pipeline")
    if "tokenizer_config.json" not in has:
        raise InputError(f"{folder} has no tokenizer_config.json; copy the whole pipeline")
