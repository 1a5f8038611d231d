"""Small random pipelines in the shape of Flux, of Flux 2 and of Z-Image, made in a blink.

Pictures of 32x32 become latents of 8x8x4, which the transformers take as 4x4 tokens of 16 channels.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from bksdm.distill.conditions import Conditions
from bksdm.families import family_of_pipeline
from bksdm.models.pipelines import denoiser, tokenizing
from tiny_models import CAPTIONS, CONTEXT, PICTURE, build_text_encoder, build_tokenizer

FLOW_TOKENS = 64  # of a caption: as many as the longest chat needs, and fewer than the 512 that pipelines ask for
LATENT_CHANNELS = 4
PACKED_CHANNELS = 4 * LATENT_CHANNELS  # of 2x2 latents
HEADS = 2
HEAD_DIM = 16
WIDTH = HEADS * HEAD_DIM
T5_WIDTH = 24
CHAT_WIDTH = 16  # of the language models that read captions
AXES = (4, 6, 6)  # of a head: which caption token or picture, row, column
# The least that pipelines of Flux 2 look into: hidden states 9, 18 and 27 of Qwen, 10, 20 and 30 of Mistral.
QWEN_LAYERS = 28
MISTRAL_LAYERS = 31
IMAGE_TOKEN = "[IMG]"
FLUX_TRANSFORMER = {
    "in_channels": PACKED_CHANNELS,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": T5_WIDTH,
    "pooled_projection_dim": CONTEXT,
    "axes_dims_rope": AXES,
}
FLUX2_TRANSFORMER = {
    "in_channels": PACKED_CHANNELS,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 3 * CHAT_WIDTH,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}
Z_TRANSFORMER = {
    "in_channels": LATENT_CHANNELS,
    "dim": WIDTH,
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "cap_feat_dim": CHAT_WIDTH,
    "axes_dims": AXES,
}
STAGES = {
    "block_out_channels": (16, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 16,
    "sample_size": PICTURE,
}
DYNAMIC_SHIFT = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
# As Qwen3 has it, of which only the turns of a chat without tools are left.
QWEN_CHAT = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}
{%- endif %}"""
MISTRAL_CHAT = """\
<s>{%- for message in messages %}
{%- if message.role == "system" %}[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]
{%- else %}[INST]{{ message.content[0].text }}[/INST]
{%- endif %}
{%- endfor %}"""


def _depths(layers: int, single_layers: int, guidance_embeds: bool) -> dict[str, Any]:
    return {"num_layers": layers, "num_single_layers": single_layers, "guidance_embeds": guidance_embeds}


def build_flux_pipeline(
    layers: int = 4, single_layers: int = 6, guidance_embeds: bool = True, seed: int = 0, **transformer: Any
) -> FluxPipeline:
    """A whole pipeline as FLUX.1 has it; what else is named goes into the transformer's config."""
    torch.manual_seed(seed)
    tokenizer, second = build_tokenizer(), build_t5_tokenizer()
    config = FLUX_TRANSFORMER | _depths(layers, single_layers, guidance_embeds) | transformer
    return _settled(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **DYNAMIC_SHIFT),
            vae=build_shifted_vae(),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(
                T5Config(
                    vocab_size=len(second),
                    d_model=config["joint_attention_dim"],
                    d_kv=8,
                    d_ff=32,
                    num_layers=2,
                    num_heads=2,
                    feed_forward_proj="gated-gelu",
                )
            ),
            tokenizer_2=second,
            transformer=FluxTransformer2DModel(**config),
        )
    )


def build_flux2_pipeline(
    layers: int = 3, single_layers: int = 5, is_distilled: bool = False, seed: int = 0, **transformer: Any
) -> Flux2KleinPipeline:
    """The same as FLUX.2 klein has it; a distilled one is drawn without a second, unconditional pass."""
    torch.manual_seed(seed)
    tokenizer = build_qwen_tokenizer()
    config = FLUX2_TRANSFORMER | _depths(layers, single_layers, False) | transformer
    return _settled(
        Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **DYNAMIC_SHIFT),
            vae=build_flux2_vae(),
            text_encoder=Qwen3ForCausalLM(qwen_config(tokenizer, QWEN_LAYERS, tie_word_embeddings=True)),
            tokenizer=tokenizer,
            transformer=Flux2Transformer2DModel(**config),
            is_distilled=is_distilled,
        )
    )


def build_flux2_dev_pipeline(
    layers: int = 3, single_layers: int = 5, seed: int = 0, **transformer: Any
) -> Flux2Pipeline:
    """The same as FLUX.2 dev has it: guidance is a number that the transformer is told, and Mistral reads captions."""
    torch.manual_seed(seed)
    tokenizer = build_mistral_tokenizer()
    config = FLUX2_TRANSFORMER | _depths(layers, single_layers, True) | transformer
    tower = {"hidden_size": CHAT_WIDTH, "intermediate_size": CHAT_WIDTH, "num_attention_heads": 2, "head_dim": 8}
    reader = {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    return _settled(
        Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **DYNAMIC_SHIFT),
            vae=build_flux2_vae(),
            text_encoder=Mistral3ForConditionalGeneration(
                Mistral3Config(
                    text_config=tower | reader | {"model_type": "mistral", "num_hidden_layers": MISTRAL_LAYERS},
                    vision_config=tower | {"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28},
                    image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
                )
            ),
            tokenizer=tokenizer,
            transformer=Flux2Transformer2DModel(**config),
        )
    )


def build_z_pipeline(layers: int = 6, refiners: int = 2, seed: int = 0, **transformer: Any) -> ZImagePipeline:
    """The same as Z-Image has it: one stack for pictures and captions, behind refiners of either."""
    torch.manual_seed(seed)
    tokenizer = build_qwen_tokenizer()
    config = Z_TRANSFORMER | {"n_layers": layers, "n_refiner_layers": refiners, **transformer}
    return _settled(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
            vae=build_shifted_vae(),
            text_encoder=Qwen3Model(qwen_config(tokenizer, layers=3)),
            tokenizer=tokenizer,
            transformer=ZImageTransformer2DModel(**config),
        )
    )


def build_shifted_vae() -> AutoencoderKL:
    """As FLUX.1 has it: without the convolutions around the latents, whose mean is not zero."""
    return AutoencoderKL(
        **STAGES, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )


def build_flux2_vae() -> AutoencoderKLFlux2:
    """Its statistics of latents are a batch norm's, for each of the packed channels."""
    vae = AutoencoderKLFlux2(**STAGES)
    vae.bn.running_mean.normal_(std=0.5)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def qwen_config(tokenizer: Qwen2Tokenizer, layers: int, **more: Any) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=CHAT_WIDTH,
        intermediate_size=CHAT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.2,
        **more,
    )


def build_t5_tokenizer() -> T5TokenizerFast:
    """Pieces in T5's form: letters, and the words of the captions."""
    words = sorted({f"▁{word}" for caption in CAPTIONS for word in caption.split()})
    letters = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [*((word, -2.0) for word in words if word not in letters), *((letter, -5.0) for letter in letters)]
    return T5TokenizerFast(vocab=special + pieces, extra_ids=0, model_max_length=FLOW_TOKENS)


def build_qwen_tokenizer() -> Qwen2Tokenizer:
    """A byte-pair vocabulary in Qwen's form that takes chats and knows a few whole words."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = Qwen2Tokenizer(
        **_byte_pairs(special, ["user", "assistant", *_caption_words()]),
        eos_token="<|im_end|>",
        chat_template=QWEN_CHAT,
    )
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def build_mistral_tokenizer() -> Qwen2Tokenizer:
    """The same with the special tokens of Mistral; it knows the words that the pipeline puts before captions.

    The folders of FLUX.2 dev have it inside a processor of pictures, which wants a package that tests do without;
    the pipeline asks for no more than the chat's tokens as long as it draws from captions alone.
    """
    special = ["<s>", "</s>", "<unk>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", IMAGE_TOKEN]
    tokenizer = Qwen2Tokenizer(
        **_byte_pairs(special, [*(f"Ġ{word}" for word in SYSTEM_MESSAGE.split()), *_caption_words()]),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=MISTRAL_CHAT,
    )
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


BUILDS = {"flux": build_flux_pipeline, "klein": build_flux2_pipeline, "z": build_z_pipeline}  # what goes through all
SIDE = 32  # of pictures


def draw(pipeline: DiffusionPipeline, prompt: str = "red apple", seed: int = 0, **more: Any) -> np.ndarray:
    """A picture (H, W, 3) between 0 and 1 by the call of diffusers, in two steps and as small as can be."""
    side = 2 * pipeline.vae_scale_factor
    told = {"height": side, "width": side, "num_inference_steps": 2, "max_sequence_length": FLOW_TOKENS, **more}
    generator = torch.Generator().manual_seed(seed)
    picture: np.ndarray = pipeline(prompt=prompt, generator=generator, output_type="np", **told).images[0]
    return picture


def stacks(transformer: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of blocks, by name."""
    return {name: part for name, part in transformer.named_children() if isinstance(part, nn.ModuleList)}


def _settled(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Ready to draw, with no weight left at the zero or the one that it began with."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            _stir(part.eval(), everything=part is pipeline.transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def _stir(network: nn.Module, everything: bool) -> None:
    """Move norms and biases about; as networks of diffusers begin, too little passes through a gate to be seen."""
    for weight in network.parameters():
        if weight.ndim == 1:
            weight.add_(torch.randn_like(weight), alpha=0.1)
        elif everything:
            weight.normal_(std=weight.shape[1] ** -0.5)


def _caption_words() -> list[str]:
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    return [*(f"Ġ{word}" for word in words), *words]


def _byte_pairs(special: Iterable[str], words: Iterable[str]) -> dict[str, Any]:
    """A vocabulary of special tokens, bytes and merges that put words together from their left."""
    merges = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    return {"vocab": {token: index for index, token in enumerate(tokens)}, "merges": list(merges)}


def inputs(pipeline: DiffusionPipeline) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents, timesteps and conditions of two captions of different lengths."""
    config = denoiser(pipeline).config
    channels, side = family_of_pipeline(pipeline).latent_channels(config), config.get("_sample_size", 8)
    latents = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))
    tokenize = tokenizing(pipeline)
    told = Conditions.of(pipeline).embedded(torch.stack([tokenize("red"), tokenize("a green car on a hill")]))
    return latents, torch.tensor([700.0, 100.0]), told
