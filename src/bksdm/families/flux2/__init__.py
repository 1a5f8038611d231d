"""FLUX.2: as Flux.1, with one modulation for all blocks of a kind; `dev` is told how to guide, `klein` is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from bksdm.common.errors import InputError
from bksdm.families.family import Denoiser, Told, few_steps
from bksdm.families.layers import Layer, Shapes, embedding, linear, norm, products
from bksdm.families.recipe import Config
from bksdm.families.stack.family import StackFamily
from bksdm.families.stack.flux import TwoStacks, original_names
from bksdm.families.stack.layers import are_numbers, joint_attention, of_two_stacks
from bksdm.families.stack.packing import as_tokens, from_tokens, patchified, positions, unpatchified
from bksdm.families.stack.structure import Stack
from bksdm.families.stack.texts import chat, hidden_states, marked
from bksdm.runtime.defaults import Defaults

if TYPE_CHECKING:
    from tokenizers import Encoding
    from torch import Tensor, nn

    from bksdm.families.graph import Graph

_USUAL_STEPS = 50


class Flux2(TwoStacks):
    """FLUX.2, as `Flux2Transformer2DModel`; its latents are squares of 2 by 2 of what its VAE gives."""

    name = "FLUX.2"
    tag = "flux2"
    pipeline = "Flux2Pipeline"
    from_image = "Flux2Pipeline"
    under_mask = "Flux2Pipeline"
    networks = {  # noqa: RUF012
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "text_encoder": "Mistral3ForConditionalGeneration",
    }
    defaults = {  # noqa: RUF012
        "patch_size": 1,
        "in_channels": 128,
        "out_channels": None,
        "num_layers": 8,
        "num_single_layers": 48,
        "attention_head_dim": 128,
        "num_attention_heads": 48,
        "joint_attention_dim": 15360,
        "timestep_guidance_channels": 256,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32),
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": True,
    }
    usual = Defaults(_USUAL_STEPS, 4.0)
    signs = ("timestep_guidance_channels",)
    inputs = ("in_channels", "out_channels", "joint_attention_dim", "guidance_embeds")
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    text_outputs = (("last_hidden_state", "hidden_states"),)
    of_caption = ("context",)
    originals = original_names(
        double={
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
        single={"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
        ends={
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
            "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
            "final_layer.linear": "proj_out",
        },
    )
    stacks = (
        Stack("transformer_blocks", "num_layers", (("ff.linear_out",), ("ff_context.linear_out",))),
        Stack("single_transformer_blocks", "num_single_layers", (("attn.to_out",),)),
    )
    usual_sides = (64, 64)
    exports: ClassVar[tuple[str, ...]] = ("transformer",)
    unready = StackFamily.unready | {"prepare", "distill", "generate", "evaluate", "sensitivity", "--repair"}
    patch = 2
    latents_of_a_token = 1
    guided = True
    layers = (10, 20, 30)

    def claims(self, config: Config) -> bool:
        """Models are told apart by whether they are told how to guide."""
        return super().claims(config) and self._structure.whole(config)["guidance_embeds"] == self.guided

    def runs(self, whole: Config, size: tuple[int, int]) -> bool:  # noqa: ARG002
        numbers = are_numbers(whole["mlp_ratio"], whole["rope_theta"], whole["eps"])
        return of_two_stacks(whole, "timestep_guidance_channels", axes=4) and numbers

    def consists_of(self, whole: Config, size: tuple[int, int], tokens: int) -> Iterator[Layer]:
        """None of them has a bias."""
        width, head, picture = self.width(whole), whole["attention_head_dim"], size[0] * size[1]
        both, inner = picture + tokens, int(width * whole["mlp_ratio"])
        layer = partial(linear, bias=False)
        yield layer("x_embedder", whole["in_channels"], width, picture)
        yield layer("context_embedder", whole["joint_attention_dim"], width, tokens)
        for name in ("timestep", "guidance") if whole["guidance_embeds"] else ("timestep",):
            path = f"time_guidance_embed.{name}_embedder"
            yield from embedding(path, whole["timestep_guidance_channels"], width, bias=False)
        for stream in ("img", "txt"):
            yield layer(f"double_stream_modulation_{stream}.linear", width, 6 * width)
        yield layer("single_stream_modulation.linear", width, 3 * width)
        for number in range(whole["num_layers"]):
            block = f"transformer_blocks.{number}"
            yield from joint_attention(f"{block}.attn", width, head, picture, tokens, bias=False)
            for end, places in (("", picture), ("_context", tokens)):
                yield layer(f"{block}.ff{end}.linear_in", width, 2 * inner, places)
                yield layer(f"{block}.ff{end}.linear_out", inner, width, places)
        for number in range(whole["num_single_layers"]):
            attention = f"single_transformer_blocks.{number}.attn"
            yield layer(f"{attention}.to_qkv_mlp_proj", width, 3 * width + 2 * inner, both)
            for name in "qk":
                yield norm(f"{attention}.norm_{name}", head, bias=False)
            yield products(attention, both, both, width)
            yield layer(f"{attention}.to_out", width + inner, width, both)
        yield layer("norm_out.linear", width, 2 * width)
        yield layer("proj_out", width, whole["in_channels"], picture)

    def channels_of(self, vae: Config) -> int:
        return 4 * super().channels_of(vae)

    def mu(self, scheduler: Mapping[str, Any], tokens: int, steps: int | None = None) -> float:  # noqa: ARG002
        """As its pipelines have it, if nothing is said for their usual number of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(tokens, steps or _USUAL_STEPS))

    def condition_shapes(self, config: Config, tokens: int) -> Shapes:
        return {"context": (tokens, self._structure.whole(config)["joint_attention_dim"])}

    def scaled(self, vae: Any, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """By the running mean and variance of its channels."""
        center, spread = _statistics(vae, mean)
        return (patchified(mean) - center) / spread, patchified(std) / spread

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        center, spread = _statistics(vae, latents)
        return unpatchified(latents * spread + center)

    def for_vae(self, vae: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:  # noqa: ARG002
        """Its pipelines have undone it."""
        return latents

    def call(self, guidance: float, negative: Sequence[str] | None) -> dict[str, Any]:
        if negative:
            raise InputError(f"{self.name} takes no negative prompt; leave it out")
        return {"guidance_scale": guidance}

    def tokens(self, encodings: Sequence[Encoding]) -> Tensor:
        return marked(encodings[0])

    def embedded(self, encoders: Sequence[nn.Module], input_ids: Tensor) -> Told:
        """Three layers' hidden states side by side."""
        import torch

        found, _ = hidden_states(encoders[0], input_ids)
        return {"context": torch.cat([found[layer] for layer in self.layers], dim=-1)}

    def asked(self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, told: Told) -> dict[str, Tensor]:
        import torch

        count, context = len(latents), told["context"]
        texts = torch.zeros(context.shape[1], 4, device=latents.device, dtype=latents.dtype)
        texts[:, 3] = torch.arange(len(texts), device=latents.device)
        return {
            "hidden_states": as_tokens(latents),
            "timestep": (timesteps / 1000).expand(count).to(latents.dtype),
            "encoder_hidden_states": context,
            "txt_ids": texts.expand(count, -1, -1),
            "img_ids": positions(latents, 4).expand(count, -1, -1),
            **self.guidance(denoiser, latents),
        }

    def answered(self, output: Tensor, latents: Tensor) -> Tensor:
        return from_tokens(output, *latents.shape[2:])

    def text_graphs(self, encoders: Sequence[Any], batch_size: int) -> list[Graph]:
        """Every layer's hidden states, of which readers take three; the last are called so too."""
        from bksdm.families.stack.graph import reader_graph

        (reader,) = encoders
        count = reader.config.num_hidden_layers + 1
        layers = {"last_hidden_state": count - 1, **{f"hidden_states.{layer}": layer for layer in range(count)}}
        return [reader_graph(reader, layers, batch_size)]

    def told_to_decode(self, vae: Any) -> dict[str, Any]:
        """The statistics of its channels, which optimum keeps where no weights are."""
        return {
            "bn_running_mean_data": vae.bn.running_mean.tolist(),
            "bn_running_var_data": vae.bn.running_var.tolist(),
            "bn_eps": vae.config.batch_norm_eps,
        }


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, with shape (1, C, 1, 1)."""
    mean, variance = (value.view(1, -1, 1, 1).to(like) for value in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


class Flux2Klein(Flux2):
    """FLUX.2 klein, whose text encoder is Qwen 3; the one that was distilled draws in four steps, without guidance."""

    name = "FLUX.2 klein"
    pipeline = "Flux2KleinPipeline"
    from_image = "Flux2KleinPipeline"
    under_mask = "Flux2KleinInpaintPipeline"
    networks = Flux2.networks | {"text_encoder": "Qwen3ForCausalLM"}
    exports = StackFamily.exports
    unready = StackFamily.unready
    guided = False
    layers = (9, 18, 27)

    def prompted(self, tokenizer: Any, caption: str) -> str:
        return chat(tokenizer, caption, thinks=False)

    def guides(self, pipeline: Config, config: Config) -> bool:
        return super().guides(pipeline, config) and not pipeline.get("is_distilled")

    def remark(self, pipeline: Config, config: Config, scheduler: Config) -> str | None:  # noqa: ARG002
        if not pipeline.get("is_distilled"):
            return None
        return few_steps("the teacher says that it is distilled", "pictures of this one want --steps 4")
