"""Loading and saving text-to-image pipelines in diffusers' format.

A MODEL is the name of an embedded model (`emoji`), a folder, a `.safetensors` checkpoint or a
Hugging Face Hub id. Weights come from safetensors only, and no code from a model folder is run.
"""

import functools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
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
from safetensors import SafetensorError
from tokenizers import Encoding
from torch import Tensor, nn
from transformers import CLIPTokenizer, CLIPVisionModelWithProjection

from bksdm.common.devices import PRECISIONS
from bksdm.common.errors import InputError, one_line
from bksdm.common.hub import hub_errors
from bksdm.common.progress import say
from bksdm.common.runs import write_text
from bksdm.data.pictures import Size, sides
from bksdm.families import FAMILIES, family_claiming, family_of_pipeline
from bksdm.families.family import Family
from bksdm.families.recipe import Config
from bksdm.models.configs import config_of, load_contents, load_denoiser_config, read_json
from bksdm.models.folders import (
    NETWORKS,
    check_fit,
    check_folder,
    check_weights,
    complete,
    copy_parts,
    located,
    named_parts,
    new_folder,
    save_vocabulary,
)
from bksdm.models.parts import Tensors, find_weights, half_format, write_weights
from bksdm.models.single_file import read_pipeline, unread
from bksdm.runtime.schedulers import LEFT_OUT, told
from bksdm.runtime.tokens import beyond, encoded, hidden_words, saved_words

_OTHERS = {"safety_checker": StableDiffusionSafetyChecker, "image_encoder": CLIPVisionModelWithProjection}
_ALL_NETWORKS = (*NETWORKS, *_OTHERS)
if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1":  # which diffusers itself does not ask
    diffusers.utils.logging.disable_progress_bar()
_CAPTION = "\ue000"  # in no caption


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
    optional = dict.fromkeys(_OTHERS.keys() & dict(named_parts(read_json(path / "model_index.json"))).keys())
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


def check_parts(pipeline: DiffusionPipeline, model: str | Path) -> None:
    """Refuse a U-Net of another family than its pipeline, and networks that do not go together.

    Raises:
        InputError: Naming both, or what does not fit.
    """
    family = family_of_pipeline(pipeline)
    networks = {name: getattr(pipeline, name) for name in family.networks}
    if networks[family.denoiser] is None:
        networks[family.denoiser] = family.outline(load_denoiser_config(model))
    check_fit(family, {name: config_of(network) for name, network in networks.items()}, model)


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
    check_weights(folder, folder)
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
    denoiser = family.outline(read_json(folder / "config.json"))
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
    with new_folder(folder) as partial:
        if origin:
            _copy_parts(pipeline, origin, partial, weights)
        else:
            _write_parts(pipeline, partial)
        _complete(pipeline, partial, formats or {})
        for name, content in (extra or {}).items():
            write_text(partial / name, content)


def _write_parts(pipeline: DiffusionPipeline, folder: Path) -> None:
    pipeline.save_pretrained(folder, safe_serialization=True)
    text = json.dumps(said(pipeline.scheduler), indent=2, sort_keys=True)
    write_text(folder / "scheduler" / "scheduler_config.json", text + "\n")


def _copy_parts(
    pipeline: DiffusionPipeline, origin: Origin, folder: Path, weights: Mapping[str, Tensor] | None
) -> None:
    """The papers and parts of where the pipeline came from, and its own parts that changed."""
    copy_parts(origin.folder, folder, origin.changed)
    index = read_json(origin.folder / "model_index.json")
    named = dict(named_parts(index))
    for name in origin.changed:
        part = getattr(pipeline, name)
        if getattr(part, "device", None) == torch.device("meta"):
            assert weights is not None
            part.save_config(folder / name)
            write_weights(folder / name, weights, part.state_dict())
        else:
            part.save_pretrained(folder / name)
        named[name] = [named[name][0], type(part).__name__]
    if index | named != index:
        write_text(folder / "model_index.json", json.dumps(index | named, indent=2) + "\n")


def _complete(pipeline: DiffusionPipeline, folder: Path, formats: Mapping[str, torch.dtype]) -> None:
    """What readers of the folder look for, where it lacks that."""
    family = family_of_pipeline(pipeline)
    complete(folder, family, formats)
    for name in family.tokenizers:
        tokenizer = getattr(pipeline, name)
        if isinstance(tokenizer, CLIPTokenizer) and not (folder / name / "merges.txt").is_file():
            save_vocabulary(tokenizer.backend_tokenizer, folder / name)


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
