"""Whole pipelines in one `.safetensors` file with the names of original Stable Diffusion checkpoints, read back.

Names and shapes tell the structure of the networks. What they do not tell (heads, scheduler, vocabulary, recipe) lies,
in files written by this package, in the header as JSON text; nothing is unpickled and the hub is not asked.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from bksdm.common.errors import InputError
from bksdm.families.single_file import Place, Vocabulary
from bksdm.models.contents import Contents


def read_pipeline(file: Path, contents: Contents, dtype: torch.dtype, with_denoiser: bool = True) -> DiffusionPipeline:
    """The pipeline in a checkpoint, on the CPU, in eval mode, its networks in `dtype`.

    Arguments:
        file: The checkpoint.
        contents: What it says about itself.
        dtype: Number format of the weights.
        with_denoiser: Whether its denoiser has weights; without them it is on the meta device, see `unread`.

    Raises:
        InputError: A tensor is missing, has another shape or has no place; or there is no tokenizer.
    """
    family = contents.family
    networks = {name: family.outline(contents.configs[name], name) for name in contents.layout.parts}
    places = {name: part.places(networks[name].state_dict()) for name, part in contents.layout.parts.items()}
    _check_names(file, contents, places)
    with safe_open(file, framework="pt") as opened:
        for name, network in networks.items():
            if with_denoiser or name != family.denoiser:
                _fill(network, Stored(file, places[name], network, opened.get_tensor), dtype)
    scheduler = contents.layout.scheduler if contents.scheduler is None else contents.scheduler
    parts = networks | _tokenizers(contents, file) | {"scheduler": build_scheduler(scheduler, file)}
    return family.assembled(parts, contents.settings, family.pipeline)


class Stored(Mapping[str, Tensor]):
    """The tensors of a network in a checkpoint by the names that the network has for them, each read when asked for.

    Arguments:
        file: The checkpoint.
        places: Where they lie.
        network: On any device; its shapes are wanted.
        read: A tensor of the file, by its name there.
    """

    def __init__(
        self, file: Path, places: Mapping[str, Place], network: nn.Module, read: Callable[[str], Tensor] | None = None
    ) -> None:
        self._file, self._places, self._read = file, places, read or self._from_file
        self._shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}

    def __getitem__(self, key: str) -> Tensor:
        place, wanted = self._places[key], self._shapes[key]
        found = self._read(place.name)
        if place.third is not None:
            found = found.chunk(3)[place.third] if len(found) == 3 * wanted[0] else found
        if found.ndim == 4 and len(wanted) == 2:
            found = found.flatten(1)
        found = found.T if place.turned else found
        if found.shape != wanted:
            raise InputError(
                f"{self._file}: {place.name} has shape {tuple(found.shape)}, and {tuple(wanted)} is wanted; "
                f"make it again"
            )
        return found.clone() if place.third is not None else found.contiguous()

    def _from_file(self, name: str) -> Tensor:
        with safe_open(self._file, framework="pt") as opened:
            return cast(Tensor, opened.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def unread(file: Path, contents: Contents, denoiser: nn.Module) -> Stored:
    """The tensors of the denoiser of a checkpoint."""
    part = contents.layout.parts[contents.family.denoiser]
    return Stored(file, part.places(denoiser.state_dict()), denoiser)


def _check_names(file: Path, contents: Contents, places: Mapping[str, Mapping[str, Place]]) -> None:
    """A file that lacks a tensor, or has a layer too many, is not the model that it says it is."""
    wanted = {place.name for part in places.values() for place in part.values()}
    lacking = sorted(wanted - contents.shapes.keys())
    if lacking:
        raise InputError(f"{file} lacks {len(lacking)} of its tensors, first {lacking[0]}; copy or make it again")
    prefix = contents.layout.parts[contents.family.denoiser].prefix
    extra = sorted(name for name in contents.shapes if name.startswith(prefix) and name not in wanted)
    if extra:
        raise InputError(f"{file} has {len(extra)} tensors too many in its U-Net, first {extra[0]}; make it again")


def _fill(network: nn.Module, stored: Stored, dtype: torch.dtype) -> None:
    weights = {name: found.to(dtype) if found.is_floating_point() else found for name, found in stored.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta:  # numbers of positions, which no file holds
            owner, _, leaf = name.rpartition(".")
            network.get_submodule(owner).register_buffer(leaf, torch.arange(buffer.shape[-1])[None], persistent=False)
    network.requires_grad_(True).eval()


def build_scheduler(config: Mapping[str, Any], source: str | Path) -> SchedulerMixin:
    """A scheduler from a configuration with `_class_name`.

    Arguments:
        config: The configuration.
        source: Where it is from.

    Raises:
        InputError: It names none of diffusers.
    """
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise InputError(f"{source} names the scheduler {name}, which diffusers {diffusers.__version__} does not have")
    return cast(SchedulerMixin, cast(Any, kind).from_config(config))


def _tokenizers(contents: Contents, file: Path) -> dict[str, CLIPTokenizer]:
    family = contents.family
    if contents.tokenizers:
        return {name: _tokenizer(files) for name, files in contents.tokenizers.items()}
    sizes = [contents.configs[name]["vocab_size"] for name in family.encoders]
    known = zip(contents.layout.vocabularies, sizes, strict=True)
    return dict(zip(family.tokenizers, (_known_tokenizer(*one, file) for one in known), strict=True))


def _tokenizer(files: Mapping[str, str]) -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return cast(CLIPTokenizer, CLIPTokenizer.from_pretrained(folder, local_files_only=True))


def _known_tokenizer(vocabulary: Vocabulary, size: int, file: Path) -> CLIPTokenizer:
    """The tokenizer of a file that holds none; transformers gives an empty one where it fails."""
    name = vocabulary.hub_id
    try:
        found = cast(CLIPTokenizer, CLIPTokenizer.from_pretrained(name, **vocabulary.settings))
    except (OSError, ValueError):
        found = None
    if found is None or len(found) != size:
        raise InputError(
            f"{file} holds no vocabulary, and {name} is not here and not on the hub, or not of {size} tokens; "
            f"load that once while online, or give the diffusers folder"
        )
    return found
