"""The files that LoRAs and their kin come in, in every layout that trainers write, read exactly.

A file counts as its format says, to its last tensor, or is refused by the name of what is not understood.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from bksdm.common.errors import InputError
from bksdm.common.runs import files_digest
from bksdm.families import families_for
from bksdm.families.family import Family
from bksdm.families.originals import Joined
from bksdm.families.recipe import Recipe
from bksdm.models.adapters.kinds import (
    LORA,
    LORA_FILE,
    PEFT_CONFIG,
    adapter_file,
    kind_of,
    named,
    peft_config_beside,
    read_header,
    read_tensors,
)
from bksdm.models.adapters.layers import layout_of, rank_of, scale_of
from bksdm.models.adapters.names import PEFT_PREFIX, Names, layer_module, prefixes
from bksdm.models.adapters.peft_config import PeftConfig, read_configs
from bksdm.models.adapters.words import Words, read_words, vectors_for

WORDS_FOLDER = "embeddings"
RECIPE_KEY = "bksdm_recipe"  # of the student that it was made for, in the header
_BUNDLED = re.compile(r"bundle_emb\.(?P<word>.+)\.(string_to_param\.\*|(?P<name>\w+))")
_OF_CAPTIONS = re.compile(r"attn2[._]to_k\.(lora_down|lora_A|lora\.down)\.")
# How files call what a layer has, and how it is called here, by LyCORIS's names; longer endings first.
_ENDINGS = {
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_B.bias": "lora_up.bias",
    **{f"lora_{name}.weight": f"lora_{name}.weight" for name in ("down", "mid", "up")},
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1_a", "w1_b", "w1", "w2_a", "w2_b", "w2", "t2")},
    **{
        name: name
        for name in ("dora_scale", "diff_b", "diff", "w_norm", "b_norm", "on_input", "ia3_l", "alpha", "weight")
    },
}
# Of a layer whose outputs are those of several: what goes to each, and what is parted among them.
_OF_INPUTS = ("lora_down.weight", "alpha")
_BY_OUTPUT = ("lora_up.weight", "lora_up.bias", "dora_scale", "magnitude", "diff", "diff_b")
_UNREAD = {
    "oft_": "an OFT or BOFT",
    ".a1.weight": "a GLoRA",
    "lambda_layer": "a T-LoRA",
    "lora_embedding_": "an embedding's LoRA",
    "vera_": "a VeRA",
    "scale_weight": "a scaled 8-bit file",
}
_OLDER_ENDING = re.compile(r"(?P<module>.+\.to_(q|k|v|out)_lora)\.(?P<side>down|up)\.weight")
_ADAPTERS_NAME = re.compile(
    r"\.(lora_[AB]|lora_magnitude_vector|(hada|lokr)_\w+|ia3_l)\.(?!weight$|bias$)[^.]+(?=\.weight$|\.bias$|$)"
)

Layers = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class LoraWeights:
    """What a LoRA holds.

    Attributes:
        layers: By their paths, `unet.PATH` or `text_encoder.PATH`, their tensors as `layers.LAYOUTS` has them.
        words: Vectors of words that came with it.
        lacking: Names in the file of layers that the networks asked about do not have.
        header: What the file's header says.
        made_for: The family that it tells of; None where it does not tell.
    """

    layers: Layers
    words: Words = field(default_factory=dict)
    lacking: tuple[str, ...] = ()
    header: Mapping[str, str] = field(default_factory=dict)
    made_for: Family | None = None


def lora_fingerprint(lora: str | None) -> str | None:
    """A digest of a LoRA's files; None for none.

    Raises:
        InputError: There is no such LoRA.
    """
    return None if lora is None else files_digest(lora_files(lora))


def lora_files(lora: str | Path) -> list[Path]:
    """The files of a LoRA: its matrices first, then what counts besides.

    Raises:
        InputError: There is none, or it is no safetensors file.
    """
    path = Path(lora).expanduser()
    file = adapter_file(path)
    beside = peft_config_beside(file)
    words = file.parent / WORDS_FOLDER if path.is_dir() or file.name == LORA_FILE else None
    return [
        file,
        *([beside] if beside else []),
        *(sorted(words.glob("*.safetensors")) if words else []),
    ]


def read_lora(lora: str | Path, networks: Mapping[str, nn.Module], family: Family) -> LoraWeights:
    """A LoRA's tensors by the layers of networks that they belong to.

    Arguments:
        lora: A `.safetensors` file, or a folder with one, of peft's too.
        networks: By their names in a pipeline, on any device.
        family: Of the pipeline.

    Raises:
        InputError: There is none, it is damaged, or it holds something that is not understood; see the message.
    """
    path = Path(lora).expanduser()
    if (kind := kind_of(path)) != LORA:
        raise InputError(f"lora {lora} is {named(kind)}, and no LoRA; docs/guides/adapters.md says how it is used")
    file, *more = lora_files(path)
    tensors, header = read_tensors(file)
    bundled: dict[str, dict[str, Tensor]] = {}
    for name in list(tensors):
        if match := _BUNDLED.fullmatch(name):
            bundled.setdefault(match["word"], {})[match["name"] or ""] = tensors.pop(name)
    words = {word: vectors_for(family, word, own, file) for word, own in bundled.items()}
    for other in more:
        if other.suffix == ".safetensors":
            words |= read_words(other, family)
    made_for = _made_for(tensors, header)
    configs = read_configs(file, header)
    if not configs and any(name.startswith(PEFT_PREFIX) for name in tensors):
        raise InputError(
            f"lora {lora} is peft's and has no {PEFT_CONFIG} beside it, which says its scale; give the folder"
        )
    found, lacking = _by_layer(file, tensors, Names(networks, family), networks)
    layers = {
        layer: _in_lycoris_names(file, layer, own, configs.get(layer.partition(".")[0], configs.get(None)))
        for layer, own in found.items()
    }
    layers = {layer: _with_kernel(own, layer_module(networks, layer)) for layer, own in layers.items()}
    if not layers and not lacking and not words:
        raise InputError(f"lora {lora} changes nothing; give the file of a LoRA")
    return LoraWeights({layer: own for layer, own in layers.items() if own}, words, lacking, header, made_for)


def check_made_for(lora: str | Path, recipe: Recipe | None) -> None:
    """Refuse a LoRA that was made for a student of another recipe; of many, the file does not tell.

    Arguments:
        lora: The LoRA.
        recipe: Of the model that it is for; None for a teacher.

    Raises:
        InputError: Naming the recipe.
    """
    told = read_header(adapter_file(lora)).get(RECIPE_KEY)
    made = None if told is None else Recipe.from_dict(json.loads(told), f"of lora {lora}")
    if made is not None and made != recipe:
        this = "and this model is a teacher" if recipe is None else f"and this one is of {recipe.name!r}"
        raise InputError(f"lora {lora} was made for a student of recipe {made.name!r}, {this}; give another LoRA")


def _made_for(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Family | None:
    """The family that the names of networks, the width of captions or the header tell of, if only one."""
    families = families_for("adapt")
    telling = [[f for f in families if name.startswith(tuple(p for p, _ in prefixes(f)))] for name in tensors]
    telling += [[f for f in families if re.search(f.lora_sign, name)] for name in tensors]
    said = header.get("ss_base_model_version", "nothing")
    widths = {width for name, tensor in tensors.items() if _OF_CAPTIONS.search(name) for width in tensor.shape[1:2]}
    named = [f for f in families if all(f in found for found in telling if found)]
    wide = [f for f in named if widths & f.lora_versions.keys()]
    called = [f for f in named if any(said.startswith(version) for version, _ in f.lora_versions.values())]
    return next((found[0] for found in (named, wide, called) if len(found) == 1), None)


def _by_layer(
    file: Path, tensors: Mapping[str, Tensor], names: Names, networks: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """The tensors of the layers that are there, and the names of those that are not."""
    layers: dict[str, dict[str, Tensor]] = {}
    lacking: dict[str, None] = {}
    for name, tensor in tensors.items():
        module, ending = _parted(name)
        if not ending or (ending == "weight" and f"{module}.on_input" not in tensors):
            what = next((f" of {kind}" for mark, kind in _UNREAD.items() if mark in name), "")
            raise InputError(
                f"lora {file} has {name}{what}, which is not understood; it would be left out, so nothing is read"
            )
        if layer := names.find(module):
            parts = {layer: tensor}
        elif joined := names.joined(module):
            parts = _parts(file, name, ending, tensor, joined, networks)
        else:
            lacking[module] = None
            continue
        for layer, part in parts.items():
            if ending in layers.setdefault(layer, {}):
                raise InputError(f"lora {file} has two tensors {ending} for {layer}, the second is {name}; remove one")
            layers[layer][ending] = part
    return layers, tuple(lacking)


def _parts(
    file: Path, name: str, ending: str, tensor: Tensor, joined: Joined, networks: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """What a tensor of a layer of an original checkpoint is for each of the layers that it consists of."""
    if ending in _OF_INPUTS:
        return dict.fromkeys(joined.parts, tensor)
    sizes = [cast(Tensor, layer_module(networks, path).weight).shape[0] for path in joined.parts]
    if ending not in _BY_OUTPUT or tensor.shape[0] != sum(sizes):
        raise InputError(
            f"lora {file} has {name}, with shape {tuple(tensor.shape)}, for layers that this model has apart; it "
            f"cannot be parted, so nothing is read"
        )
    if joined.turned:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    return dict(zip(joined.parts, torch.split(tensor, sizes), strict=True))


def _parted(name: str) -> tuple[str, str]:
    """Name of a layer, and what it has, in LyCORIS's names; no name of it where it is not known."""
    if older := _OLDER_ENDING.fullmatch(name):
        return older["module"], f"lora_{older['side']}.weight"
    name = _ADAPTERS_NAME.sub(r".\1", name)
    ending = next((ending for ending in _ENDINGS if name.endswith(f".{ending}")), "")
    return name.removesuffix(f".{ending}"), _ENDINGS.get(ending, "")


def _in_lycoris_names(
    file: Path, layer: str, found: Mapping[str, Tensor], config: PeftConfig | None
) -> dict[str, Tensor]:
    """A layer's tensors as LyCORIS would write them: peft has its own names, and scales in its config."""
    own = dict(found)
    if set(own) <= {"alpha"}:
        return {}
    path = layer.partition(".")[2]
    if "magnitude" in own and "lora_down.weight" in own:  # peft's are by output
        ones = [1] * (own["lora_down.weight"].ndim - 1)
        own["dora_scale"] = own.pop("magnitude").reshape(-1, *ones)
    if "ia3_l" in own and config:
        own["on_input"] = torch.tensor(int(config.on_input(path)))
    rank = rank_of(own)
    if any(0 in tensor.shape for tensor in own.values()):
        raise InputError(f"lora {file} has matrices of rank 0 for {layer}; remove them")
    if config and "alpha" not in own and rank:
        own["alpha"] = torch.tensor(config.scale(path, rank) * rank)
    elif config and "lokr_w1" in own and not rank:  # peft scales two whole factors too, and LyCORIS does not
        own["lokr_w1"] = own["lokr_w1"].float() * config.whole_scale(path)
    if "lora_up.bias" in own:
        own["diff_b"] = own.pop("lora_up.bias").float() * scale_of(own)
    try:
        layout_of(own)
    except ValueError as error:
        raise InputError(f"lora {file} is not whole or not understood: its {layer} {error}") from error
    return own


def _with_kernel(own: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Matrices of a convolution of one point with its kernel, which some trainers leave out, and some programs want."""
    sides = ("lora_down.weight", "lora_up.weight")
    points = isinstance(module, nn.Conv2d) and all(side in own and own[side].ndim == 2 for side in sides)
    return own | {side: own[side][:, :, None, None] for side in sides} if points else own
