"""The names of CLIP's text encoders in an original checkpoint, and the configs that follow from names and shapes.

Stable Diffusion 1.x holds OpenAI's under the names of transformers, version 2.x one of OpenCLIP under its own, in which
an attention has query, key and value in one; SDXL holds one of each.

Source: mlfoundations/open_clip, src/open_clip/transformer.py.
"""

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from bksdm.common.errors import InputError
from bksdm.families.single_file import FileShapes, Part, Place
from bksdm.families.unet.names import count_of, nameless, renamed

PROJECTION = "text_projection"
_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_JOINED = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def clip(prefix: str) -> Part:
    """OpenAI's text encoder, whose names in transformers follow the prefix."""
    return Part(prefix, partial(_clip_places, prefix), partial(_clip_config, prefix))


def open_clip(prefix: str) -> Part:
    """OpenCLIP's text encoder, whose own names follow the prefix."""
    return Part(prefix, partial(_open_clip_places, prefix), partial(_open_clip_config, prefix))


def _clip_places(prefix: str, keys: Iterable[str]) -> dict[str, Place]:
    return {key: Place(prefix + key.removeprefix("text_model.")) for key in keys}


def _open_clip_places(prefix: str, keys: Iterable[str]) -> dict[str, Place]:
    return {key: _open_clip_place(prefix, key) for key in keys}


def _open_clip_place(prefix: str, key: str) -> Place:
    name = key.removeprefix("text_model.")
    if name in _ENDS:
        return Place(prefix + _ENDS[name])
    if name == f"{PROJECTION}.weight":
        return Place(prefix + PROJECTION, turned=True)
    place = re.match(r"encoder\.layers\.(\d+)\.(.+)", name)
    if not place:
        raise nameless(f"text_encoder.{key}")
    layer, inner = f"{prefix}transformer.resblocks.{place[1]}", place[2]
    for projection, third in _JOINED.items():
        if inner.startswith(f"self_attn.{projection}."):
            return Place(f"{layer}.attn.in_proj_{inner.rpartition('.')[2]}", third)
    return Place(f"{layer}.{renamed(inner, _LAYER, key)}")


def _clip_config(prefix: str, shapes: FileShapes) -> dict[str, Any]:
    names = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers.", "mlp.fc1")
    return _config(shapes, [prefix + name for name in names[:3]], names[3]) | {"hidden_act": "quick_gelu"}


def _open_clip_config(prefix: str, shapes: FileShapes) -> dict[str, Any]:
    names = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.", "mlp.c_fc")
    found = _config(shapes, [prefix + name for name in names[:3]], names[3]) | {"hidden_act": "gelu"}
    return found | {"projection_dim": shapes.get(prefix + PROJECTION, (0, found["hidden_size"]))[1]}


def _config(shapes: FileShapes, names: list[str], inside: str) -> dict[str, Any]:
    """A transformers config; heads have 64 channels.

    Arguments:
        shapes: Of the tensors of the file.
        names: Of the embeddings of tokens and of positions, and what numbers of layers follow.
        inside: The first matrix of a layer's MLP.
    """
    try:
        vocabulary, width = shapes[names[0]]
        positions = shapes[names[1]][0]
        inner = shapes[f"{names[2]}0.{inside}.weight"][0]
    except KeyError as error:
        raise InputError(f"it holds no whole text encoder (no {error.args[0]})") from error
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": inner,
        "num_hidden_layers": count_of(shapes, names[2]),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": positions,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
