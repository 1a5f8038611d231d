"""LoRAs and their kin (arXiv 2106.09685), merged into a model or carried to a student."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from bksdm.common.errors import InputError
from bksdm.families import family_of_pipeline
from bksdm.families.family import Family
from bksdm.families.recipe import Pruning
from bksdm.models.adapters.layers import change
from bksdm.models.adapters.lora_files import LoraWeights, read_lora
from bksdm.models.adapters.names import layer_module
from bksdm.models.adapters.words import load_words

_CARRY = "if it was made for the teacher of this student, carry it over with bksdm adapt"


@dataclass(frozen=True)
class Lora:
    """A LoRA and how strongly it counts.

    Attributes:
        source: A `.safetensors` file, or a folder with one.
        scale: 1 as it was made, 0 not at all.
    """

    source: str
    scale: float = 1.0


def merge_lora(pipeline: DiffusionPipeline, lora: str | Path, scale: float = 1.0) -> DiffusionPipeline:
    """Add a LoRA to a pipeline's weights, so that nothing is slower for it.

    Arguments:
        pipeline: Changed in place.
        lora: A `.safetensors` file, or a folder with one; of any layout in docs/guides/adapters.md.
        scale: How strongly it counts: 1 as it was made, 0 not at all.

    Raises:
        InputError: There is no such LoRA, or it was not made for this model; stock loading would leave out the layers
            that it does not find, and put others in the wrong places, without a word.
    """
    family = family_of_pipeline(pipeline)
    networks = {name: getattr(pipeline, name) for name in (family.denoiser, *family.encoders)}
    weights = read_lora(lora, networks, family)
    check_fits(weights, networks, family, lora)
    for layer, own in weights.layers.items():
        _add(layer_module(networks, layer), own, scale)
        _check_finite(layer_module(networks, layer), layer, lora, scale)
    for word, vectors in weights.words.items():
        load_words(pipeline, word, vectors)
    return pipeline


def check_fits(
    weights: LoraWeights, networks: Mapping[str, nn.Module], family: Family, lora: str | Path, mend: str = _CARRY
) -> None:
    """Refuse a LoRA that changes layers which a model does not have, or has with other widths.

    Arguments:
        weights: As `read_lora` gives them for the same networks.
        networks: By their names; on any device.
        family: What they are of.
        lora: What to call it.
        mend: What to do about it.

    Raises:
        InputError: Naming the first such layer, or the family that it was made for.
    """
    reason = _misfit(weights, networks, mend)
    if reason and weights.made_for and weights.made_for is not family:
        reason = f"is of {weights.made_for.name}, and this model of {family.name}; give one of {family.name}"
    if reason:
        raise InputError(f"lora {lora} {reason}")


def _misfit(weights: LoraWeights, networks: Mapping[str, nn.Module], mend: str) -> str | None:
    if weights.lacking:
        return (
            f"changes {len(weights.lacking)} of {len(weights.lacking) + len(weights.layers)} layers that this model "
            f"does not have, first {weights.lacking[0]}; {mend}"
        )
    for layer, own in weights.layers.items():
        weight, bias = _held(layer_module(networks, layer))
        shapes = {name: tensor if tensor.numel() == 1 else _shape(tensor) for name, tensor in own.items()}
        try:
            change(shapes, _shape(weight), None if bias is None else _shape(bias))
        except ValueError as error:
            return f"does not fit this model: its {layer} {error}"
    return None


def carried(weights: LoraWeights, pruning: Pruning, denoiser: str) -> tuple[LoraWeights, list[str]]:
    """A LoRA of a teacher as one of its student, and the layers that it changed and the student has not.

    Arguments:
        weights: As `read_lora` gives them for the teacher.
        pruning: Which layer of the student is which of the teacher.
        denoiser: The name of the network that was pruned.
    """
    kept: dict[str, Mapping[str, Tensor]] = {}
    gone: list[str] = []
    for layer, own in weights.layers.items():
        part, _, path = layer.partition(".")
        here = pruning.student_key(path) if part == denoiser else path
        if here is None:
            gone.append(layer)
        else:
            kept[f"{part}.{here}"] = own
    return LoraWeights(kept, weights.words, (), weights.header), gone


@torch.no_grad()
def _add(module: nn.Module, own: Mapping[str, Tensor], scale: float) -> None:
    """Change a layer's weights; in double precision, so that a small change is not lost in large weights."""
    held = _held(module)
    weight, bias = (None if tensor is None else tensor.double() for tensor in held)
    assert weight is not None
    on = {name: tensor.to(weight.device, torch.float64) for name, tensor in own.items()}
    for tensor, was, change_of in zip(held, (weight, bias), change(on, weight, bias), strict=True):
        if tensor is not None and was is not None and change_of is not None:
            tensor.copy_(was + scale * change_of)


def _check_finite(module: nn.Module, layer: str, lora: str | Path, scale: float) -> None:
    if not _held(module)[0].isfinite().all():
        raise InputError(f"lora {lora} makes {layer} infinite with a scale of {scale:g}; give a smaller --lora_scale")


def _shape(tensor: Tensor) -> Tensor:
    """A tensor without numbers, whose products have shapes all the same."""
    return tensor.to("meta", torch.float32)


def _held(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return weight, bias if isinstance(bias, Tensor) else None
