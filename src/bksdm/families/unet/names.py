"""The names of U-Net and VAE in an original checkpoint of Stable Diffusion or SDXL, and the configs that follow.

The U-Net's layers are numbered in the order in which the data passes them, samplers too, so the numbers follow from its
structure: a pruned U-Net has fewer of them and no `middle_block` where it lost that.

Source: CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bksdm.common.errors import InputError
from bksdm.families.single_file import FileShapes, Place
from bksdm.families.unet.depth import DOWN, Counts, Depths

UNET, VAE = "model.diffusion_model.", "first_stage_model."

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


def _unet_modules(keys: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs (module in diffusers, its place) of stages and middle, in the order of the data."""
    number = 1  # 0 is the first convolution
    for stage in range(count_of(keys, "down_blocks.")):
        path = f"down_blocks.{stage}"
        for layer in range(count_of(keys, f"{path}.resnets.")):
            yield f"{path}.resnets.{layer}", f"input_blocks.{number}.0"
            yield f"{path}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if count_of(keys, f"{path}.downsamplers."):
            yield f"{path}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    for index in range(count_of(keys, "mid_block.resnets.")):
        yield f"mid_block.resnets.{index}", f"middle_block.{2 * index}"
        yield f"mid_block.attentions.{index}", f"middle_block.{2 * index + 1}"
    number = 0
    for stage in range(count_of(keys, "up_blocks.")):
        path = f"up_blocks.{stage}"
        for layer in range(count_of(keys, f"{path}.resnets.")):
            yield f"{path}.resnets.{layer}", f"output_blocks.{number}.0"
            yield f"{path}.attentions.{layer}", f"output_blocks.{number}.1"
            number += 1
        after = 2 if count_of(keys, f"{path}.attentions.") else 1
        yield f"{path}.upsamplers.0.conv", f"output_blocks.{number - 1}.{after}.conv"


def _unet_name(key: str, modules: Mapping[str, str]) -> str:
    parts = key.split(".")
    module = next((path for n in range(len(parts), 0, -1) if (path := ".".join(parts[:n])) in modules), None)
    if module is None:
        raise nameless(f"unet.{key}")
    inner = key[len(module) + 1 :]
    return f"{modules[module]}.{renamed(inner, _RESNET, key) if '.resnets.' in key else inner}"


def _vae_place(key: str, stages: int) -> Place:
    parts = key.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv"):
        return Place(VAE + key)
    side, rest = parts[0], ".".join(parts[1:])
    if side not in ("encoder", "decoder"):
        raise nameless(f"vae.{key}")
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
        inner = renamed(place[3], _VAE_ATTENTION, key)
        return Place(f"{VAE}{side}.mid.attn_{int(place[2]) + 1}.{inner}", spatial=matrix)
    if parts[1] not in ("conv_in", "conv_out", "conv_norm_out"):
        raise nameless(f"vae.{key}")
    return Place(f"{VAE}{side}.{rest.replace('conv_norm_out', 'norm_out')}")


def renamed(inner: str, names: Mapping[str, str], key: str) -> str:
    """A path with the first of these names at its beginning in the file's words.

    Raises:
        InputError: None of them is.
    """
    for old, new in names.items():
        if inner.startswith(f"{old}."):
            return new + inner[len(old) :]
    raise nameless(key)


def nameless(key: str) -> InputError:
    """What to say of a tensor that the layout has no name for."""
    return InputError(
        f"the original Stable Diffusion layout has no place for {key}; only models shaped like 1.x, 2.x and XL fit, "
        f"so keep the diffusers folder"
    )


def count_of(keys: Iterable[str], prefix: str) -> int:
    """How many different numbers follow a prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)})


def unet_config(shapes: FileShapes) -> dict[str, Any]:
    """A diffusers config of the U-Net in a checkpoint, from names and shapes alone.

    What leaves no trace there is taken as in versions 1 and 2: 8 heads, or heads of 64 channels where projections are
    linear; 32 groups, or as many as divide all widths; latents of 64x64.

    Raises:
        InputError: There is none.
    """
    unet = {key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)}
    if not {"input_blocks.0.0.weight", "out.2.weight", "time_embed.0.weight"} <= unet.keys():
        raise InputError("it holds no Stable Diffusion U-Net (no model.diffusion_model.input_blocks.0.0.weight)")
    widths, down = _down_stages(unet)
    layers = [len(stage) for stage in down]
    up = _up_stages(unet, layers)
    linear = any(key.endswith("proj_in.weight") and len(shape) == 2 for key, shape in unet.items())
    context = [shape[1] for key, shape in unet.items() if key.endswith("attn2.to_k.weight")]
    return {
        "sample_size": 64,
        "in_channels": unet["input_blocks.0.0.weight"][1],
        "out_channels": unet["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": ["CrossAttnDownBlock2D" if stage[0] else "DownBlock2D" for stage in down],
        "up_block_types": ["CrossAttnUpBlock2D" if stage[0] else "UpBlock2D" for stage in up],
        "mid_block_type": _mid_block_type(unet),
        "cross_attention_dim": context[0] if context else 768,
        **_depth_entries(down, up, _depth_at(unet, "middle_block")),
        "attention_head_dim": [max(1, width // 64) for width in widths] if linear else 8,
        "use_linear_projection": linear,
        "norm_num_groups": math.gcd(32, *widths),
    }


def _mid_block_type(unet: FileShapes) -> str | None:
    if "middle_block.0.in_layers.0.weight" not in unet:
        return None
    return "UNetMidBlock2DCrossAttn" if _depth_at(unet, "middle_block") else "UNetMidBlock2D"


def _down_stages(unet: FileShapes) -> tuple[list[int], list[Counts]]:
    """Of every stage, outermost first: width, and the transformer layers of each of its layers; 0 for no attention."""
    widths: list[int] = []
    stages: list[list[int]] = [[]]
    for number in itertools.count(1):
        resnet = unet.get(f"input_blocks.{number}.0.out_layers.3.weight")
        if resnet is not None:
            widths += [] if stages[-1] else [resnet[0]]
            stages[-1].append(_depth_at(unet, f"input_blocks.{number}"))
        elif f"input_blocks.{number}.0.op.weight" in unet:
            stages.append([])
        else:
            break
    if not all(stages):
        raise InputError("its U-Net has no stages (model.diffusion_model.input_blocks); it is cut short")
    return widths, [tuple(stage) for stage in stages]


def _up_stages(unet: FileShapes, layers: list[int]) -> list[Counts]:
    """Transformer layers of each layer of the up stages, innermost first."""
    first, stages = 0, []
    for count in reversed(layers):
        stages.append(tuple(_depth_at(unet, f"output_blocks.{first + n}") for n in range(count + 1)))
        first += count + 1
    return stages


def _depth_at(unet: FileShapes, block: str) -> int:
    return count_of(unet, f"{block}.1.transformer_blocks.")


def _depth_entries(down: list[Counts], up: list[Counts], mid: int) -> dict[str, Any]:
    """Entries of a config that say how deep attentions are; one number where all are alike."""
    inward, outward = (tuple(stage if stage[0] else () for stage in side) for side in (down, up[::-1]))
    entries = Depths(inward, outward, mid).entries({})
    alike = len(entries) == 1 and len(set(entries[DOWN])) == 1
    return {DOWN: entries[DOWN][0]} if alike else entries


def vae_config(shapes: FileShapes) -> dict[str, Any]:
    """A diffusers config of the VAE in a checkpoint, from names and shapes, and Stable Diffusion's scale of latents.

    Raises:
        InputError: There is none.
    """
    vae = {key.removeprefix(VAE): shape for key, shape in shapes.items() if key.startswith(VAE)}
    stages = count_of(vae, "encoder.down.")
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
        "layers_per_block": count_of(vae, "encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in vae,
        "use_quant_conv": "quant_conv.weight" in vae,
        "use_post_quant_conv": "post_quant_conv.weight" in vae,
        "sample_size": 512,
        "scaling_factor": 0.18215,
        "norm_num_groups": math.gcd(32, *widths),
    }
