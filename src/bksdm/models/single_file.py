"""Whole pipelines in one `.safetensors` file with the names of original Stable Diffusion checkpoints, read back.

Names and shapes tell the structure of the networks. What they do not tell (heads, scheduler, vocabulary, recipe) lies,
in files written by this package, in the header as JSON text; nothing is unpickled and the hub is not asked.
"""

import base64
import binascii
import json
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoencoderKL, PNDMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bksdm.common.errors import InputError
from bksdm.families.unet import names
from bksdm.runtime.defaults import Defaults

KEY = "bksdm"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
NETWORKS = ("unet", "vae", "text_encoder")
_MOST_TEXT = 64 * 2**20
_TOKENIZERS = {False: "openai/clip-vit-large-patch14", True: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}


@dataclass(frozen=True)
class Contents:
    """What a checkpoint says about itself.

    Attributes:
        shapes: Of its tensors, by name.
        configs: Of `unet`, `vae` and `text_encoder`: those written into it, or those that follow from the shapes.
        recipe: What it was pruned by, as plain values; None where it does not tell.
        scheduler: Config of the scheduler; None where it does not tell.
        tokenizer: Text files by name; empty where it does not tell.
        sampling: What it draws best with; None where it does not tell.
    """

    shapes: dict[str, tuple[int, ...]]
    configs: dict[str, dict[str, Any]]
    recipe: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    tokenizer: dict[str, str]
    sampling: Defaults | None = None

    @property
    def is_stock(self) -> bool:
        """Whether it is one of Stable Diffusion's own, which diffusers knows better."""
        return self.scheduler is None and not names.is_pruned(self.configs["unet"])


def read_contents(file: Path) -> Contents:
    """What a checkpoint says about itself; no weights are read.

    Raises:
        InputError: It is no Stable Diffusion checkpoint, or its header is damaged.
    """
    with safe_open(file, framework="pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        written = (opened.metadata() or {}).get(KEY)
    try:
        found = {
            "unet": names.unet_config(shapes),
            "vae": names.vae_config(shapes),
            "text_encoder": names.text_config(shapes),
        }
    except InputError as error:
        raise InputError(f"{file} is not a whole Stable Diffusion checkpoint: {error}") from error
    if written is None:
        return Contents(shapes, found, None, None, {})
    try:
        values = json.loads(written)
        configs = {name: dict(values["configs"][name]) for name in NETWORKS}
        tokenizer = {name: unpacked(values["tokenizer"][name]) for name in TOKENIZER_FILES}
        sampling = Defaults.of(values["sampling"], file) if values.get("sampling") else None
        return Contents(shapes, configs, values.get("recipe"), dict(values["scheduler"]), tokenizer, sampling)
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, zlib.error) as error:
        raise InputError(f"{file} has a damaged header ({type(error).__name__}: {error}); make it again") from error


def read_pipeline(
    file: Path, contents: Contents, dtype: torch.dtype, with_unet: bool = True
) -> StableDiffusionPipeline:
    """The pipeline in a checkpoint, on the CPU, in eval mode, its networks in `dtype`.

    Raises:
        InputError: A tensor is missing, has another shape or has no place; or there is no tokenizer.
    """
    configs, open_clip = contents.configs, names.has_open_clip(contents.shapes)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        vae = AutoencoderKL.from_config(configs["vae"])
        text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
    places = {
        "unet": names.unet_places(unet.state_dict()),
        "vae": names.vae_places(vae.state_dict()),
        "text_encoder": names.text_places(text.state_dict(), open_clip),
    }
    networks = {"unet": unet, "vae": vae, "text_encoder": text}
    _check_names(file, contents, places)
    with safe_open(file, framework="pt") as opened:
        for name, network in networks.items():
            if with_unet or name != "unet":
                _fill(network, places[name], opened.get_tensor, dtype, file)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=_tokenizer(contents, open_clip, file),
        unet=unet if with_unet else None,
        scheduler=_scheduler(contents, file),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def packed(text: str) -> str:
    """A long text as base64 of zlib."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpacked(text: str) -> str:
    """The text that `packed` made short.

    Raises:
        ValueError: It is longer than any vocabulary.
    """
    opened = zlib.decompressobj()
    content = opened.decompress(base64.b64decode(text, validate=True), _MOST_TEXT)
    if opened.unconsumed_tail:
        raise ValueError("a text of more than 64 MiB")
    return content.decode()


def _check_names(file: Path, contents: Contents, places: Mapping[str, Mapping[str, names.Place]]) -> None:
    """A file that lacks a tensor, or has a layer too many, is not the model that it says it is."""
    wanted = {place.name for part in places.values() for place in part.values()}
    lacking = sorted(wanted - contents.shapes.keys())
    if lacking:
        raise InputError(f"{file} lacks {len(lacking)} of its tensors, first {lacking[0]}; copy or make it again")
    extra = sorted(name for name in contents.shapes if name.startswith(names.UNET) and name not in wanted)
    if extra:
        raise InputError(f"{file} has {len(extra)} tensors too many in its U-Net, first {extra[0]}; make it again")


def _fill(
    network: nn.Module,
    places: Mapping[str, names.Place],
    tensor: Callable[[str], Tensor],
    dtype: torch.dtype,
    file: Path,
) -> None:
    weights = {}
    for key, wanted in network.state_dict().items():
        place = places[key]
        found = tensor(place.name)
        if place.third is not None:
            found = found.chunk(3)[place.third] if len(found) == 3 * len(wanted) else found
        if found.ndim == 4 and wanted.ndim == 2:
            found = found.flatten(1)
        if found.shape != wanted.shape:
            raise InputError(
                f"{file}: {place.name} has shape {tuple(found.shape)}, and {tuple(wanted.shape)} is wanted; "
                f"make it again"
            )
        weights[key] = found.to(dtype) if found.is_floating_point() else found
        weights[key] = weights[key].clone() if place.third is not None else weights[key].contiguous()
    network.load_state_dict(weights, strict=True, assign=True)
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta:  # numbers of positions, which no file holds
            owner, _, leaf = name.rpartition(".")
            network.get_submodule(owner).register_buffer(leaf, torch.arange(buffer.shape[-1])[None], persistent=False)
    network.requires_grad_(True).eval()


def _scheduler(contents: Contents, file: Path) -> SchedulerMixin:
    if contents.scheduler is None:
        return PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        )
    name = str(contents.scheduler.get("_class_name"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise InputError(f"{file} names the scheduler {name}, which diffusers {diffusers.__version__} does not have")
    return cast(SchedulerMixin, cast(Any, kind).from_config(contents.scheduler))


def _tokenizer(contents: Contents, open_clip: bool, file: Path) -> CLIPTokenizer:
    if not contents.tokenizer:
        return _known_tokenizer(contents, open_clip, file)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in contents.tokenizer.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return cast(CLIPTokenizer, CLIPTokenizer.from_pretrained(folder, local_files_only=True))


def _known_tokenizer(contents: Contents, open_clip: bool, file: Path) -> CLIPTokenizer:
    """The tokenizer of Stable Diffusion, for a file that holds none; transformers gives an empty one where it fails."""
    name, size = _TOKENIZERS[open_clip], contents.configs["text_encoder"]["vocab_size"]
    try:
        found = cast(CLIPTokenizer, CLIPTokenizer.from_pretrained(name))
    except (OSError, ValueError):
        found = None
    if found is None or len(found) != size:
        raise InputError(
            f"{file} holds no vocabulary, and {name} is not here and not on the hub, or not of {size} tokens; "
            f"load that once while online, or give the diffusers folder"
        )
    return found
