"""The names that tensors have in an original Stable Diffusion checkpoint, and the configs that follow from those names.

One file holds the U-Net (`model.diffusion_model`), the VAE (`first_stage_model`) and the text encoder
(`cond_stage_model`). The U-Net's layers are numbered in the order in which the data passes them, samplers too, so the
numbers follow from its structure: a pruned U-Net has fewer of them and no `middle_block` where it lost that.

Source: CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py; for version 2, OpenCLIP's text encoder.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bksdm.common.errors import InputError

UNET, VAE, TEXT, OPEN_CLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.model.",
)
Shapes = Mapping[str, tuple[int, ...]]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_JOINED = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a checkpoint.

    Attributes:
        name: Of the tensor there.
        third: Which third of its rows, where query, key and value are one tensor; None for all of them.
        spatial: Whether a matrix (A, B) is a convolution (A, B, 1, 1) there.
    """

    name: str
    third: int | None = None
    spatial: bool = False


def unet_places(keys: Iterable[str]) -> dict[str, Place]:
    """Where the tensors of a U-Net with these names in diffusers lie.

    Raises:
        InputError: The layout has no name for a tensor.
    """
    known = list(keys)
    modules = dict(_unet_modules(known)) | _UNET_ENDS
    return {key: Place(UNET + _unet_name(key, modules)) for key in known}


def vae_places(keys: Iterable[str]) -> dict[str, Place]:
    """Where the tensors of a VAE with these names in diffusers lie.

    Raises:
        InputError: The layout has no name for a tensor.
    """
    known = list(keys)
    stages = 1 + max((int(key.split(".")[2]) for key in known if key.startswith("decoder.up_blocks.")), default=-1)
    return {key: _vae_place(key, stages) for key in known}


def text_places(keys: Iterable[str], open_clip: bool) -> dict[str, Place]:
    """Where the tensors of a text encoder with these names in transformers lie.

    Arguments:
        keys: With or without the prefix `text_model.`.
        open_clip: Whether in the layout of version 2, whose attention has query, key and value in one.

    Raises:
        InputError: The layout has no name for a tensor.
    """
    if not open_clip:
        return {key: Place(TEXT + key.removeprefix("text_model.")) for key in keys}
    return {key: _open_clip_place(key) for key in keys}


def _unet_modules(keys: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs (module in diffusers, its place) of stages and middle, in the order of the data."""
    number = 1  # 0 is the first convolution
    for stage in range(_count(keys, "down_blocks.")):
        path = f"down_blocks.{stage}"
        for layer in range(_count(keys, f"{path}.resnets.")):
            yield f"{path}.resnets.{layer}", f"input_blocks.{number}.0"
            yield f"{path}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if _count(keys, f"{path}.downsamplers."):
            yield f"{path}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    for index in range(_count(keys, "mid_block.resnets.")):
        yield f"mid_block.resnets.{index}", f"middle_block.{2 * index}"
        yield f"mid_block.attentions.{index}", f"middle_block.{2 * index + 1}"
    number = 0
    for stage in range(_count(keys, "up_blocks.")):
        path = f"up_blocks.{stage}"
        for layer in range(_count(keys, f"{path}.resnets.")):
            yield f"{path}.resnets.{layer}", f"output_blocks.{number}.0"
            yield f"{path}.attentions.{layer}", f"output_blocks.{number}.1"
            number += 1
        after = 2 if _count(keys, f"{path}.attentions.") else 1
        yield f"{path}.upsamplers.0.conv", f"output_blocks.{number - 1}.{after}.conv"


def _unet_name(key: str, modules: Mapping[str, str]) -> str:
    parts = key.split(".")
    module = next((path for n in range(len(parts), 0, -1) if (path := ".".join(parts[:n])) in modules), None)
    if module is None:
        raise _nameless(f"unet.{key}")
    inner = key[len(module) + 1 :]
    return f"{modules[module]}.{_renamed(inner, _RESNET, key) if '.resnets.' in key else inner}"


def _vae_place(key: str, stages: int) -> Place:
    parts = key.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv"):
        return Place(VAE + key)
    side, rest = parts[0], ".".join(parts[1:])
    if side not in ("encoder", "decoder"):
        raise _nameless(f"vae.{key}")
    place = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", rest)
    if place:
        which, stage, kind, number, inner = place.groups()
        stage = int(stage) if which == "down" else stages - 1 - int(stage)
        inner = inner.replace("conv_shortcut", "nin_shortcut")
        name = f"block.{number}" if kind == "resnets" else kind.removesuffix("rs")
        return Place(f"{VAE}{side}.{which}.{stage}.{name}.{inner}")
    place = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", rest)
    if place and place[1] == "resnets":
        inner = place[3].replace("conv_shortcut", "nin_shortcut")
        return Place(f"{VAE}{side}.mid.block_{int(place[2]) + 1}.{inner}")
    if place:
        matrix = place[3].endswith("weight") and not place[3].startswith("group_norm")
        inner = _renamed(place[3], _VAE_ATTENTION, key)
        return Place(f"{VAE}{side}.mid.attn_{int(place[2]) + 1}.{inner}", spatial=matrix)
    if parts[1] not in ("conv_in", "conv_out", "conv_norm_out"):
        raise _nameless(f"vae.{key}")
    return Place(f"{VAE}{side}.{rest.replace('conv_norm_out', 'norm_out')}")


def _open_clip_place(key: str) -> Place:
    name = key.removeprefix("text_model.")
    if name in _OPEN_CLIP_ENDS:
        return Place(OPEN_CLIP + _OPEN_CLIP_ENDS[name])
    place = re.match(r"encoder\.layers\.(\d+)\.(.+)", name)
    if not place:
        raise _nameless(f"text_encoder.{key}")
    layer, inner = f"{OPEN_CLIP}transformer.resblocks.{place[1]}", place[2]
    for projection, third in _JOINED.items():
        if inner.startswith(f"self_attn.{projection}."):
            return Place(f"{layer}.attn.in_proj_{inner.rpartition('.')[2]}", third)
    return Place(f"{layer}.{_renamed(inner, _OPEN_CLIP_LAYER, key)}")


def _renamed(inner: str, names: Mapping[str, str], key: str) -> str:
    for old, new in names.items():
        if inner.startswith(f"{old}."):
            return new + inner[len(old) :]
    raise _nameless(key)


def _nameless(key: str) -> InputError:
    return InputError(
        f"the original Stable Diffusion layout has no place for {key}; only models shaped like 1.x and 2.x fit, "
        f"so keep the diffusers folder"
    )


def _count(keys: Iterable[str], prefix: str) -> int:
    """How many numbers follow a prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)})


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """A diffusers config of the U-Net in a checkpoint, from names and shapes alone.

    What leaves no trace there is taken as in versions 1 and 2: 8 heads, or heads of 64 channels where projections are
    linear; 32 groups, or as many as divide all widths; latents of 64x64.

    Raises:
        InputError: There is none.
    """
    unet = {key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)}
    if not {"input_blocks.0.0.weight", "out.2.weight", "time_embed.0.weight"} <= unet.keys():
        raise InputError("it holds no Stable Diffusion U-Net (no model.diffusion_model.input_blocks.0.0.weight)")
    widths, layers, attends, depths = _down_stages(unet)
    linear = any(key.endswith("proj_in.weight") and len(shape) == 2 for key, shape in unet.items())
    context = [shape[1] for key, shape in unet.items() if key.endswith("attn2.to_k.weight")]
    attends_up = _up_stages(unet, layers)
    return {
        "sample_size": 64,
        "in_channels": unet["input_blocks.0.0.weight"][1],
        "out_channels": unet["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in attends_up],
        "mid_block_type": _mid_block_type(unet),
        "cross_attention_dim": context[0] if context else 768,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "attention_head_dim": [max(1, width // 64) for width in widths] if linear else 8,
        "use_linear_projection": linear,
        "norm_num_groups": math.gcd(32, *widths),
    }


def _mid_block_type(unet: Shapes) -> str | None:
    if "middle_block.0.in_layers.0.weight" not in unet:
        return None
    return "UNetMidBlock2DCrossAttn" if "middle_block.1.proj_in.weight" in unet else "UNetMidBlock2D"


def _down_stages(unet: Shapes) -> tuple[list[int], list[int], list[bool], list[int]]:
    """Of every stage, outermost first: width, number of layers, whether it attends, transformer blocks."""
    widths, layers, attends, depths = [], [], [], []
    number, layer = 1, 0
    while True:
        resnet = unet.get(f"input_blocks.{number}.0.out_layers.3.weight")
        if resnet is not None:
            if layer == 0:
                widths.append(resnet[0])
                attends.append(f"input_blocks.{number}.1.proj_in.weight" in unet)
                depths.append(max(1, _count(unet, f"input_blocks.{number}.1.transformer_blocks.")))
            layer += 1
        elif layer:  # a downsampler or the end closes a stage
            layers.append(layer)
            layer = 0
        if resnet is None and f"input_blocks.{number}.0.op.weight" not in unet:
            break
        number += 1
    if not widths or len(widths) != len(layers):
        raise InputError("its U-Net has no stages (model.diffusion_model.input_blocks); it is cut short")
    return widths, layers, attends, depths


def _up_stages(unet: Shapes, layers: list[int]) -> list[bool]:
    """Whether the up stages attend, innermost first."""
    first, attends = 0, []
    for count in reversed(layers):
        attends.append(f"output_blocks.{first}.1.proj_in.weight" in unet)
        first += count + 1
    return attends


def is_pruned(config: Mapping[str, Any]) -> bool:
    """Whether a U-Net with this config, from names and shapes, is none of Stable Diffusion's own."""
    whole = len(config["block_out_channels"]) == 4 and config["layers_per_block"] == 2
    return not whole or config["mid_block_type"] != "UNetMidBlock2DCrossAttn"


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """A diffusers config of the VAE in a checkpoint, from names and shapes, and Stable Diffusion's scale of latents.

    Raises:
        InputError: There is none.
    """
    vae = {key.removeprefix(VAE): shape for key, shape in shapes.items() if key.startswith(VAE)}
    stages = _count(vae, "encoder.down.")
    try:
        widths = [vae[f"encoder.down.{stage}.block.0.conv1.weight"][0] for stage in range(stages)]
        channels, latents = vae["encoder.conv_in.weight"][1], vae["decoder.conv_in.weight"][1]
    except KeyError as error:
        raise InputError(f"it holds no whole VAE (no {VAE}{error.args[0]})") from error
    if not widths:
        raise InputError(f"it holds no whole VAE (no {VAE}encoder.down)")
    return {
        "in_channels": channels,
        "out_channels": channels,
        "latent_channels": latents,
        "block_out_channels": widths,
        "layers_per_block": _count(vae, "encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in vae,
        "use_quant_conv": "quant_conv.weight" in vae,
        "use_post_quant_conv": "post_quant_conv.weight" in vae,
        "sample_size": 512,
        "scaling_factor": 0.18215,
        "norm_num_groups": math.gcd(32, *widths),
    }


def text_config(shapes: Shapes) -> dict[str, Any]:
    """A transformers config of the text encoder in a checkpoint, from names and shapes; heads have 64 channels.

    Raises:
        InputError: There is none.
    """
    open_clip = has_open_clip(shapes)
    names = (
        ("token_embedding.weight", "positional_embedding", "transformer.resblocks.", "mlp.c_fc.weight")
        if open_clip
        else (
            "embeddings.token_embedding.weight",
            "embeddings.position_embedding.weight",
            "encoder.layers.",
            "mlp.fc1.weight",
        )
    )
    prefix = OPEN_CLIP if open_clip else TEXT
    try:
        vocabulary, width = shapes[prefix + names[0]]
        positions = shapes[prefix + names[1]][0]
        inner = shapes[f"{prefix}{names[2]}0.{names[3]}"][0]
    except KeyError as error:
        raise InputError(f"it holds no whole text encoder (no {error.args[0]})") from error
    layers = _count(shapes, prefix + names[2])
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers - 1 if open_clip and layers == 24 else layers,  # version 2 leaves out the last
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": positions,
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def has_open_clip(names: Iterable[str]) -> bool:
    """Whether a checkpoint with these names has the text encoder of version 2."""
    return OPEN_CLIP + "token_embedding.weight" in names
