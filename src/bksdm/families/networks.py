"""What VAEs and text encoders consist of, as their configs tell: the shapes of their tensors by name.

Text encoders have no prefix here, whatever their files call them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bksdm.families.layers import Layer, Shapes, are_sizes, convolution, linear, norm, said, tensor_shapes
from bksdm.families.recipe import Config

# What the entries that are read here are where a config does not say.
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": None,
    "up_block_types": None,
    "block_out_channels": None,
    "layers_per_block": None,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Those that change no tensor.
_VAE_IDLE = ("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
_CLIP_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_ACTIVATIONS = ("quick_gelu", "gelu")


def shapes(kind: str, config: Config) -> Shapes | None:
    """Of a network of this class with this config; None where it is not known."""
    found = _KINDS[kind](config) if kind in _KINDS else None
    return None if found is None else tensor_shapes(found)


def _vae(config: Config) -> Iterator[Layer] | None:
    """Of an `AutoencoderKL`."""
    given = _VAE | said(config)
    widths, count = given["block_out_channels"], given["layers_per_block"]
    usual = (
        all(key in _VAE or key in _VAE_IDLE for key in given)
        and isinstance(widths, list)
        and widths
        and given["down_block_types"] == ["DownEncoderBlock2D"] * len(widths)
        and given["up_block_types"] == ["UpDecoderBlock2D"] * len(widths)
        and given["act_fn"] == "silu"
        and are_sizes(*widths, count, *(given[key] for key in ("in_channels", "out_channels", "latent_channels")))
        and are_sizes(given["norm_num_groups"])
        and all(width % given["norm_num_groups"] == 0 for width in widths)
    )
    return _vae_layers(given, widths, count) if usual else None


def _vae_layers(given: Mapping[str, Any], widths: list[int], count: int) -> Iterator[Layer]:
    inner, latents = widths[-1], given["latent_channels"]
    yield convolution("encoder.conv_in", given["in_channels"], widths[0], 1)
    for stage, width in enumerate(widths):
        for layer in range(count):
            takes = width if layer else widths[max(0, stage - 1)]
            yield from _resnet(f"encoder.down_blocks.{stage}.resnets.{layer}", takes, width)
        if stage < len(widths) - 1:
            yield convolution(f"encoder.down_blocks.{stage}.downsamplers.0.conv", width, width, 1)
    yield from _middle("encoder", inner, attends=given["mid_block_add_attention"])
    yield from _end("encoder", inner, 2 * latents)
    yield convolution("decoder.conv_in", latents, inner, 1)
    yield from _middle("decoder", inner, attends=given["mid_block_add_attention"])
    outward = widths[::-1]
    for stage, width in enumerate(outward):
        for layer in range(count + 1):
            takes = width if layer else outward[max(0, stage - 1)]
            yield from _resnet(f"decoder.up_blocks.{stage}.resnets.{layer}", takes, width)
        if stage < len(widths) - 1:
            yield convolution(f"decoder.up_blocks.{stage}.upsamplers.0.conv", width, width, 1)
    yield from _end("decoder", widths[0], given["out_channels"])
    if given["use_quant_conv"]:
        yield convolution("quant_conv", 2 * latents, 2 * latents, 1, side=1)
    if given["use_post_quant_conv"]:
        yield convolution("post_quant_conv", latents, latents, 1, side=1)


def _resnet(path: str, takes: int, gives: int) -> Iterator[Layer]:
    yield norm(f"{path}.norm1", takes)
    yield convolution(f"{path}.conv1", takes, gives, 1)
    yield norm(f"{path}.norm2", gives)
    yield convolution(f"{path}.conv2", gives, gives, 1)
    if takes != gives:
        yield convolution(f"{path}.conv_shortcut", takes, gives, 1, side=1)


def _middle(half: str, width: int, *, attends: bool) -> Iterator[Layer]:
    for number in range(2):
        yield from _resnet(f"{half}.mid_block.resnets.{number}", width, width)
    if attends:
        attention = f"{half}.mid_block.attentions.0"
        yield norm(f"{attention}.group_norm", width)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            yield linear(f"{attention}.{name}", width, width)


def _end(half: str, width: int, gives: int) -> Iterator[Layer]:
    yield norm(f"{half}.conv_norm_out", width)
    yield convolution(f"{half}.conv_out", width, gives, 1)


def _clip(config: Config) -> Iterator[Layer] | None:
    """Of a `CLIPTextModel`."""
    sizes = [config.get(key) for key in _CLIP_SIZES]
    usual = are_sizes(*sizes) and config.get("hidden_act") in _ACTIVATIONS
    if not usual or config["hidden_size"] % config["num_attention_heads"]:
        return None
    return _clip_layers(config)


def _clip_projecting(config: Config) -> Iterator[Layer] | None:
    """Of a `CLIPTextModelWithProjection`."""
    found = _clip(config)
    if found is None or not are_sizes(config.get("projection_dim")):
        return None
    return iter([*found, linear("text_projection", config["hidden_size"], config["projection_dim"], bias=False)])


def _clip_layers(config: Config) -> Iterator[Layer]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    yield linear("embeddings.token_embedding", width, config["vocab_size"], bias=False)
    yield linear("embeddings.position_embedding", width, config["max_position_embeddings"], bias=False)
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{number}"
        yield norm(f"{layer}.layer_norm1", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield linear(f"{layer}.self_attn.{name}", width, width)
        yield norm(f"{layer}.layer_norm2", width)
        yield linear(f"{layer}.mlp.fc1", width, inner)
        yield linear(f"{layer}.mlp.fc2", inner, width)
    yield norm("final_layer_norm", width)


_KINDS: Mapping[str, Callable[[Config], Iterator[Layer] | None]] = {
    "AutoencoderKL": _vae,
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip_projecting,
}
