"""Flux.1: double-stream blocks for picture and caption apart, then single-stream blocks for both together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bksdm.common.errors import InputError
from bksdm.families.family import Denoiser, Told, few_steps
from bksdm.families.layers import Layer, Shapes, embedding, linear, norm, products
from bksdm.families.recipe import Config
from bksdm.families.stack.flux import TwoStacks, original_names
from bksdm.families.stack.layers import joint_attention, of_two_stacks
from bksdm.families.stack.packing import as_tokens, from_tokens, patchified, positions, unpatchified
from bksdm.runtime.defaults import Defaults

if TYPE_CHECKING:
    from tokenizers import Encoding
    from torch import Tensor, nn

    from bksdm.families.graph import Graph

_CLIP_TOKENS = 77
_TIME_CHANNELS = 256  # by which noise level and guidance are told


class Flux(TwoStacks):
    """Flux.1, as `FluxTransformer2DModel`."""

    name = "Flux.1"
    tag = "flux"
    pipeline = "FluxPipeline"
    from_image = "FluxImg2ImgPipeline"
    under_mask = "FluxInpaintPipeline"
    networks = {  # noqa: RUF012
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    }
    defaults = {  # noqa: RUF012
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    }
    usual = Defaults(28, 3.5)
    signs = ("pooled_projection_dim", "num_single_layers")
    inputs = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    text_outputs = (("last_hidden_state", "pooler_output"), ("last_hidden_state",))
    of_caption = ("context", "text_embeds")
    lora_prefixes = {  # noqa: RUF012
        **TwoStacks.lora_prefixes,
        "text_encoder": ("lora_te1_", "lora_te_"),
        "text_encoder_2": ("lora_te2_", "lora_te3_"),
    }
    unsaid = ("time_shift_type",)  # where openvino-genai is told of the usual one, it shifts as for FLUX.2
    adapters = ("LoRA", "ControlNet")
    controlnet = "FluxControlNetModel"
    originals = original_names(
        double={
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
        },
        single={
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
        },
        ends={
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
        },
    )

    def runs(self, whole: Config, size: tuple[int, int]) -> bool:
        squares = whole["in_channels"] % 4 == 0 and all(side % 2 == 0 for side in size)
        return of_two_stacks(whole, "pooled_projection_dim", axes=3) and squares

    def consists_of(self, whole: Config, size: tuple[int, int], tokens: int) -> Iterator[Layer]:
        width, head, picture = self.width(whole), whole["attention_head_dim"], size[0] * size[1] // 4
        both = picture + tokens
        yield linear("x_embedder", whole["in_channels"], width, picture)
        yield linear("context_embedder", whole["joint_attention_dim"], width, tokens)
        for name, takes in {
            "timestep": _TIME_CHANNELS,
            **({"guidance": _TIME_CHANNELS} if whole["guidance_embeds"] else {}),
            "text": whole["pooled_projection_dim"],
        }.items():
            yield from embedding(f"time_text_embed.{name}_embedder", takes, width)
        for number in range(whole["num_layers"]):
            block = f"transformer_blocks.{number}"
            yield from joint_attention(f"{block}.attn", width, head, picture, tokens)
            for end, places in (("", picture), ("_context", tokens)):
                yield linear(f"{block}.norm1{end}.linear", width, 6 * width)
                yield linear(f"{block}.ff{end}.net.0.proj", width, 4 * width, places)
                yield linear(f"{block}.ff{end}.net.2", 4 * width, width, places)
        for number in range(whole["num_single_layers"]):
            block = f"single_transformer_blocks.{number}"
            yield linear(f"{block}.norm.linear", width, 3 * width)
            for name in "qkv":
                yield linear(f"{block}.attn.to_{name}", width, width, both)
            for name in "qk":
                yield norm(f"{block}.attn.norm_{name}", head, bias=False)
            yield products(f"{block}.attn", both, both, width)
            yield linear(f"{block}.proj_mlp", width, 4 * width, both)
            yield linear(f"{block}.proj_out", 5 * width, width, both)
        yield linear("norm_out.linear", width, 2 * width)
        yield linear("proj_out", width, whole["in_channels"], picture)

    def latent_channels(self, config: Config) -> int:
        return super().latent_channels(config) // 4  # four latents are a token

    def misfit(self, configs: Mapping[str, Config]) -> str | None:
        denoiser = self._structure.whole(configs["transformer"])
        first, second = configs["text_encoder"]["hidden_size"], configs["text_encoder_2"]["d_model"]
        if first != denoiser["pooled_projection_dim"]:
            return (
                f"its first text encoder gives embeddings of width {first}, and its transformer takes pooled ones of "
                f"{denoiser['pooled_projection_dim']}"
            )
        if second != denoiser["joint_attention_dim"]:
            return (
                f"its second text encoder gives embeddings of width {second}, and its transformer takes "
                f"{denoiser['joint_attention_dim']}"
            )
        return None

    def remark(self, pipeline: Config, config: Config, scheduler: Config) -> str | None:  # noqa: ARG002
        if config.get("guidance_embeds"):
            return None
        return few_steps(
            "the teacher is told of no guidance, as few-step models are not (schnell)",
            "pictures of this one want --guidance 0 and --steps 1 to 4",
        )

    def guides(self, pipeline: Config, config: Config) -> bool:  # noqa: ARG002
        """Its pipeline never does, whatever it was taught."""
        return False

    def condition_shapes(self, config: Config, tokens: int) -> Shapes:
        whole = self._structure.whole(config)
        return {"context": (tokens, whole["joint_attention_dim"]), "text_embeds": (whole["pooled_projection_dim"],)}

    def token_lengths(self, tokenizers: Sequence[Any]) -> list[int]:
        return [tokenizers[0].model_max_length, self.usual_tokens]

    def token_shape(self, length: int) -> tuple[int, ...]:
        return (_CLIP_TOKENS + length,)

    def tokens(self, encodings: Sequence[Encoding]) -> Tensor:
        import torch

        return torch.tensor([token for one in encodings for token in one.ids])

    def embedded(self, encoders: Sequence[nn.Module], input_ids: Tensor) -> Told:
        """CLIP's pooled embedding of the first tokens, and T5's hidden states of the others, without a mask."""
        first, second = encoders
        length = first.config.max_position_embeddings  # type: ignore[union-attr]
        return {
            "context": second(input_ids[:, length:]).last_hidden_state,
            "text_embeds": first(input_ids[:, :length]).pooler_output,
        }

    def for_vae(self, vae: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        factor = 2 ** len(vae.config.block_out_channels)  # of a token
        height, width = (side // factor for side in size)
        return super().for_vae(vae, unpatchified(from_tokens(latents, height, width)), size)

    def call(self, guidance: float, negative: Sequence[str] | None) -> dict[str, Any]:
        if negative:
            raise InputError("Flux.1 was taught guidance and takes no negative prompt; leave it out")
        return {"guidance_scale": guidance}

    def asked(self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, told: Told) -> dict[str, Tensor]:
        import torch

        packed, context = patchified(latents), told["context"]
        return {
            "hidden_states": as_tokens(packed),
            "timestep": (timesteps / 1000).expand(len(latents)).to(latents.dtype),
            "encoder_hidden_states": context,
            "pooled_projections": told["text_embeds"],
            "txt_ids": torch.zeros(context.shape[1], 3, device=latents.device, dtype=latents.dtype),
            "img_ids": positions(packed, 3),
            **self.guidance(denoiser, latents),
        }

    def answered(self, output: Tensor, latents: Tensor) -> Tensor:
        height, width = (side // 2 for side in latents.shape[2:])
        return unpatchified(from_tokens(output, height, width))

    def text_graphs(self, encoders: Sequence[Any], batch_size: int) -> list[Graph]:
        (clip, t5), (pooled, hidden) = encoders, self.text_outputs
        from bksdm.families.graph import text_graph
        from bksdm.families.stack.graph import TOKENS

        return [text_graph(clip, pooled, batch_size), text_graph(t5, hidden, batch_size, TOKENS)]
