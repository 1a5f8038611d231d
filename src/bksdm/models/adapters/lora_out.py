"""LoRAs as files for the programs of others.

Kohya's names with an alpha beside them are what diffusers, ComfyUI, InvokeAI and openvino-genai all read.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bksdm.families.family import Family
from bksdm.families.recipe import Recipe
from bksdm.models.adapters.kinds import write_tensors
from bksdm.models.adapters.layers import rank_of, scale_of
from bksdm.models.adapters.lora_files import RECIPE_KEY, WORDS_FOLDER, Layers, LoraWeights
from bksdm.models.adapters.names import diffusers_name, kohyas_name
from bksdm.models.adapters.words import write_words

KOHYA_FILE = "lora_kohya.safetensors"
_LOST = ".add_embedding."  # a layer whose name diffusers loses on its way from kohya's
_ATTENDING = re.compile(r"(?P<part>\w+)\..+self_attn\.[qkv]_proj")


def write_lora(weights: LoraWeights, file: Path, family: Family, recipe: Recipe | None = None) -> None:
    """Write a LoRA in kohya's names, which diffusers, ComfyUI, InvokeAI and openvino-genai read.

    What diffusers would leave out under these names (magnitudes of DoRA, biases, a text encoder's queries without its
    outputs, the embedding of pooled captions) has the names of diffusers in `file`, and kohya's, for the others, in
    `lora_kohya.safetensors` beside it.
    Words that came with it go to files of their own.

    Arguments:
        weights: The LoRA.
        file: Where its matrices go.
        family: Of the model that it is for.
        recipe: Of the student that it is for, which the header names; None for a teacher.
    """
    layers = weights.layers
    made_for = {} if recipe is None else {RECIPE_KEY: json.dumps(recipe.to_dict())}
    alone = family.lora_names == "diffusers" and all(_is_plain(own) for own in layers.values())
    if layers and (alone or _needs_own_names(layers)):
        write_tensors(dict(_in_diffusers_names(layers, family)), file, {"format": "pt"} | made_for)
        file = file.with_name(KOHYA_FILE)
    if layers and not alone:
        alike = _alike(layers)
        named = {f"{kohyas_name(layer, family)}.{name}": t for layer in layers for name, t in alike[layer].items()}
        write_tensors(named, file, _header(alike, family) | _said(weights.header) | made_for)
    if weights.words:
        write_words(weights.words, file.parent / WORDS_FOLDER, family)


def diffusers_leaves_out(layers: Layers) -> bool:
    """Whether diffusers reads the file of these layers without their magnitudes of DoRA, with a warning at most."""
    plain = all(_is_plain(own) for own in layers.values())
    return plain and any("dora_scale" in own for own in layers.values()) and not _needs_own_names(layers)


def _alike(layers: Layers) -> Layers:
    """The same LoRA in tensors that all programs read alike.

    openvino-genai takes no notice of alphas, and of alphas that differ diffusers loses those of attentions: so matrices
    are scaled, and where there is one rank, it is the alpha too, for those that want one.
    """
    if not all(_is_plain(own) for own in layers.values()):
        return {layer: _flattened(own) for layer, own in layers.items()}
    ranks = {rank_of(own) for own in layers.values()}
    if len(ranks) > 1:
        return {layer: _scaled(own) for layer, own in layers.items()}
    return {layer: {**_scaled(own), "alpha": torch.tensor(float(*ranks))} for layer, own in layers.items()}


def _flattened(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last factor of a LoKr as a matrix: LyCORIS reads it with a kernel too, and others do not."""
    matrix = "lokr_w2_b" in own and "lokr_t2" not in own
    return {name: t.flatten(1) if matrix and name == "lokr_w2_b" else t for name, t in own.items()}


def _scaled(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices whose product is the change, without an alpha; in their own type where it holds the numbers."""
    rest = {name: tensor for name, tensor in own.items() if name not in ("alpha", "lora_up.weight")}
    up = own["lora_up.weight"]
    wide = up.float() * scale_of(own)
    same = wide.to(up.dtype)
    return rest | {"lora_up.weight": same if torch.equal(same.float(), wide) else wide}


def _is_plain(own: Mapping[str, Tensor]) -> bool:
    return "lora_down.weight" in own and "lora_mid.weight" not in own


def _needs_own_names(layers: Layers) -> bool:
    """Whether diffusers reads these matrices under its own names, and not under kohya's."""
    if not all(_is_plain(own) for own in layers.values()):
        return False
    dora = ["dora_scale" in own and own["dora_scale"].shape[0] != 1 for own in layers.values()]
    biased = any("diff_b" in own for own in layers.values())
    queries = {match["part"] for layer in layers if (match := _ATTENDING.fullmatch(layer))}
    outputs = {layer.partition(".")[0] for layer in layers if layer.endswith("self_attn.out_proj")}
    lost = any(_LOST in layer for layer in layers)
    return all(dora) or (not any(dora) and (biased or lost or bool(queries - outputs)))


def _in_diffusers_names(layers: Layers, family: Family) -> Iterable[tuple[str, Tensor]]:
    """Matrices in the names of diffusers, whose product is the change."""
    for layer, own in layers.items():
        name, matrices = diffusers_name(layer, family), _scaled(own)
        yield f"{name}.lora_A.weight", matrices["lora_down.weight"]
        yield f"{name}.lora_B.weight", matrices["lora_up.weight"]
        if "diff_b" in own:
            yield f"{name}.lora_B.bias", own["diff_b"]
        if "dora_scale" in own:
            yield f"{name}.lora_magnitude_vector.weight", _as_pefts(own["dora_scale"])


def _as_pefts(magnitude: Tensor) -> Tensor:
    """Magnitudes by output as peft has them: (N,) for a matrix, (1, N, 1, 1) for a convolution."""
    return magnitude.flatten() if magnitude.ndim == 2 else magnitude.reshape(1, -1, 1, 1)


def _header(layers: Layers, family: Family) -> dict[str, str]:
    """What kohya's scripts write into a header, as far as it is known."""
    ranks = {rank_of(own) for own in layers.values()}
    alphas = {float(own["alpha"]) if "alpha" in own else 0.0 for own in layers.values()}
    return {
        "format": "pt",
        "ss_network_module": "networks.lora" if all(_is_plain(own) for own in layers.values()) else "lycoris.kohya",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 and 0 not in alphas else "Dynamic",
        **_version(layers, family),
    }


def _said(header: Mapping[str, str]) -> dict[str, str]:
    """What the header of a source says of its making, and still holds."""
    ours = ("ss_network_module", "ss_network_dim", "ss_network_alpha")
    return {key: value for key, value in header.items() if key.startswith(("ss_", "modelspec.")) and key not in ours}


def _version(layers: Layers, family: Family) -> dict[str, str]:
    """Which model the layers are of, by the width of the captions that they take."""
    keys = (own for layer, own in layers.items() if layer.endswith("attn2.to_k") and "lora_down.weight" in own)
    width = next((own["lora_down.weight"].shape[1] for own in keys), 0)
    if width not in family.lora_versions:
        return {}
    version, architecture = family.lora_versions[width]
    return {
        "ss_base_model_version": version,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
    }
