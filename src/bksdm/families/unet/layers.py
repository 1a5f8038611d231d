"""What a `UNet2DConditionModel` consists of, as its config tells.

Its convolutions have padding of 1, so that a downsampler leaves half of an even side and more than half of an odd one;
an upsampler gives the side back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bksdm.families.layers import Layer, are_sizes, convolution, embedding, linear, norm, products, said
from bksdm.families.recipe import Config
from bksdm.families.unet.depth import DOWN, UP, listed
from bksdm.families.unet.structure import ADDED, UNetShape, why_not

# What the entries that are read here are where a config does not say.
READ = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": None,
    "down_block_types": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": None,
    "only_cross_attention": False,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 1280,
    DOWN: 1,
    UP: None,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    ADDED: None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
# Those that change no count, whatever they say.
IDLE = {"sample_size": None, "upcast_attention": False}
# Those that are reckoned with as diffusers has them by default, and not otherwise.
USUAL = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}


def layers(config: Config, size: tuple[int, int], tokens: int) -> list[Layer] | None:
    """See `Family.layers_of`."""
    given = READ | said(config)
    if not all(key in READ or key in IDLE or (key in USUAL and USUAL[key] == given[key]) for key in given):
        return None
    if why_not(given) or not are_sizes(*size, tokens):
        return None
    unet = _UNet.of(given, size, tokens)
    return list(unet.layers()) if unet.runs() else None


@dataclass(frozen=True)
class _UNet:
    """A config with what it leaves out.

    Attributes:
        given: The config.
        shape: Its stages.
        places: Latents in each, outermost first.
        tokens: Of a caption.
        heads, context, only_cross: Of the attentions of each: heads, channels of the caption, and whether both of
            their attentions look at it.
    """

    given: Config
    shape: UNetShape
    places: tuple[int, ...]
    tokens: int
    heads: Sequence[Any]
    context: Sequence[Any]
    only_cross: Sequence[Any]

    @classmethod
    def of(cls, given: Config, size: tuple[int, int], tokens: int) -> "_UNet":
        shape = UNetShape.of(given)
        names = ("attention_head_dim", "cross_attention_dim", "only_cross_attention")
        heads, context, only_cross = (listed(given[name], shape.stages) for name in names)
        return cls(given, shape, tuple(_places(size, shape.stages)), tokens, heads, context, only_cross)

    def runs(self) -> bool:
        """Whether its entries make a network that runs, as far as is known here."""
        shape, groups = self.shape, self.given["norm_num_groups"]
        each = (self.heads, self.context, self.only_cross)
        return (
            all(len(values) == shape.stages for values in each)
            and are_sizes(self.given["in_channels"], self.given["out_channels"], groups, *shape.widths)
            and are_sizes(*self.heads, *self.context)
            and len(set(self.context)) == 1
            and all(isinstance(value, bool) for value in self.only_cross)
            and (not self.given[ADDED] or are_sizes(self.given["addition_time_embed_dim"]))
            and all(heads <= width for heads, width in zip(self.heads, shape.widths, strict=True))
            and all(width % groups == 0 for width in shape.widths)
        )

    def layers(self) -> Iterator[Layer]:
        """All of them, in the order of the data."""
        widths, first = self.shape.widths, self.shape.widths[0]
        yield convolution("conv_in", self.given["in_channels"], first, self.places[0])
        yield from embedding("time_embedding", first, self._time)
        if self.given[ADDED]:
            yield from embedding("add_embedding", self.given["projection_class_embeddings_input_dim"], self._time)
        inner = self.shape.stages - 1
        for i, width in enumerate(widths):
            path, depths = f"down_blocks.{i}", self.shape.depths.down[i]
            for layer in range(self.shape.layers[i]):
                yield from self._resnet(f"{path}.resnets.{layer}", i, *self.shape.down_channels(i, layer))
                if depths:
                    yield from self._attention(f"{path}.attentions.{layer}", i, depths[layer], self.only_cross[i])
            if i < inner:
                yield convolution(f"{path}.downsamplers.0.conv", width, width, self.places[i + 1])
        if self.shape.has_mid:
            yield from self._resnet("mid_block.resnets.0", inner, widths[-1], widths[-1])
        if self.shape.depths.mid:
            yield from self._attention("mid_block.attentions.0", inner, self.shape.depths.mid, only_cross=False)
            yield from self._resnet("mid_block.resnets.1", inner, widths[-1], widths[-1])
        for i, width in reversed(list(enumerate(widths))):
            path, depths = self.shape.up_path(i), self.shape.depths.up[i]
            for layer in range(self.shape.layers[i] + 1):
                yield from self._resnet(f"{path}.resnets.{layer}", i, *self.shape.up_channels(i, layer))
                if depths:
                    yield from self._attention(f"{path}.attentions.{layer}", i, depths[layer], self.only_cross[i])
            if i > 0:
                yield convolution(f"{path}.upsamplers.0.conv", width, width, self.places[i - 1])
        yield norm("conv_norm_out", first)
        yield convolution("conv_out", first, self.given["out_channels"], self.places[0])

    @property
    def _time(self) -> int:
        """Channels of the embedding of noise levels."""
        return 4 * self.shape.widths[0]

    def _resnet(self, path: str, stage: int, takes: int, gives: int) -> Iterator[Layer]:
        places = self.places[stage]
        yield norm(f"{path}.norm1", takes)
        yield convolution(f"{path}.conv1", takes, gives, places)
        yield linear(f"{path}.time_emb_proj", self._time, gives)
        yield norm(f"{path}.norm2", gives)
        yield convolution(f"{path}.conv2", gives, gives, places)
        if takes != gives:
            yield convolution(f"{path}.conv_shortcut", takes, gives, places, side=1)

    def _attention(self, path: str, stage: int, depth: int, only_cross: bool) -> Iterator[Layer]:
        """An attention of `depth` transformer layers."""
        places, width = self.places[stage], self.shape.widths[stage]
        inner = self.heads[stage] * (width // self.heads[stage])
        yield norm(f"{path}.norm", width)
        yield self._projection(f"{path}.proj_in", width, inner, places)
        for number in range(depth):
            block = f"{path}.transformer_blocks.{number}"
            for name, cross in (("1", only_cross), ("2", True)):
                keys, channels = (self.tokens, self.context[stage]) if cross else (places, inner)
                attention = f"{block}.attn{name}"
                yield norm(f"{block}.norm{name}", inner)
                yield linear(f"{attention}.to_q", inner, inner, places, bias=False)
                yield linear(f"{attention}.to_k", channels, inner, keys, bias=False)
                yield linear(f"{attention}.to_v", channels, inner, keys, bias=False)
                yield products(attention, places, keys, inner)
                yield linear(f"{attention}.to_out.0", inner, inner, places)
            yield norm(f"{block}.norm3", inner)
            yield linear(f"{block}.ff.net.0.proj", inner, 8 * inner, places)  # halves: one gates the other
            yield linear(f"{block}.ff.net.2", 4 * inner, inner, places)
        yield self._projection(f"{path}.proj_out", inner, width, places)

    def _projection(self, path: str, takes: int, gives: int, places: int) -> Layer:
        if self.given["use_linear_projection"]:
            return linear(path, takes, gives, places)
        return convolution(path, takes, gives, places, side=1)


def _places(size: tuple[int, int], stages: int) -> Iterator[int]:
    height, width = size
    for _ in range(stages):
        yield height * width
        height, width = (height + 1) // 2, (width + 1) // 2
