"""Small random pipelines in the shape of Stable Diffusion 1.x and 2.x and of SDXL, made in a blink.

Pictures of 32x32 become latents of 8x8x4, as far as the four stages of the U-Net need them.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MAX_TOKENS = 8
CONTEXT = 32
PICTURE = 32
LATENT = 8
V1_UNET = {
    "sample_size": LATENT,
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 2,
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
V2_UNET = V1_UNET | {"attention_head_dim": (2, 4, 4, 8), "use_linear_projection": True}
XL_UNET = {
    "sample_size": LATENT,
    "block_out_channels": (16, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": (1, 2, 4),
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
XL_SHALLOW_UNET = XL_UNET | {"transformer_layers_per_block": (1, 1, 2)}  # for verbs, to which depths are one
XL_WIDTHS = (CONTEXT // 4, 3 * CONTEXT // 4)  # of its two text encoders
# Two stages of one layer, and one ResNet between them: quick to trace.
TWO_STAGES = {
    "sample_size": LATENT,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 1,
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
XL_TWO_STAGES = XL_UNET | {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (1, 2),
}
# As SD 1.4 has it: nothing about the spacing of timesteps, which nobody could choose then.
SCHEDULER_OF_2022 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
CAPTIONS = ("red apple", "apple red", "red car", "green car", "a red", "a green", "apple car", "car")
_COLOURS = ("red", "green", "crimson", "lime", "orange", "teal", "blue", "gold")


def build_pipeline(unet: dict, prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A whole pipeline around a U-Net with this config; the weights are random."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**unet).eval(),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_xl_pipeline(unet: dict, prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionXLPipeline:
    """The same as SDXL has it: its second tokenizer pads with another token, and its second text encoder is wider."""
    torch.manual_seed(seed)
    tokenizer, second = build_tokenizer(), build_tokenizer(pad_token="!")
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    pipeline = StableDiffusionXLPipeline(
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer, XL_WIDTHS[0]),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config(second, XL_WIDTHS[1], projection_dim=pooled)).eval(),
        tokenizer_2=second,
        unet=UNet2DConditionModel(**unet).eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
            prediction_type=prediction_type,
        ),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=PICTURE,
    ).eval()


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = CONTEXT) -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer, width)).eval()


def text_config(tokenizer: CLIPTokenizer, width: int, **more: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def build_tokenizer(**special: str) -> CLIPTokenizer:
    """A byte-pair vocabulary in CLIP's form that knows a few whole words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "r</w>"), ("g", "re"), ("e", "n</w>")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS, **special)


def tokenize(tokenizer: CLIPTokenizer, text: str) -> torch.Tensor:
    """Tokens with shape (L,)."""
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids
    return ids[0]


def build_pictures(folder: Path) -> Path:
    """Eight pictures, left half coloured and right half white, with their captions."""
    folder.mkdir(parents=True)
    lines = []
    for index, (colour, text) in enumerate(zip(_COLOURS, CAPTIONS, strict=True)):
        picture = Image.new("RGB", (PICTURE, PICTURE), "white")
        picture.paste(colour, (0, 0, PICTURE // 2, PICTURE))
        picture.save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def random_inputs(batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents (B, 4, 8, 8), timesteps (B,) and context (B, L, D) for the U-Nets here."""
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, LATENT, LATENT, generator=rng)
    timesteps = torch.randint(1000, (batch,), generator=rng)
    return latents, timesteps, torch.randn(batch, MAX_TOKENS, CONTEXT, generator=rng)


def added_conditions(config: Mapping[str, Any], batch: int = 2) -> dict[str, torch.Tensor]:
    """What a U-Net of SDXL's takes besides: pooled captions (B, P) and the numbers (B, 6) about pictures."""
    if not config.get("addition_embed_type"):
        return {}
    width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    rng = torch.Generator().manual_seed(1)
    numbers = torch.tensor([[PICTURE, PICTURE, 0, 4, PICTURE, PICTURE]]).expand(batch, -1)
    return {"text_embeds": torch.randn(batch, width, generator=rng), "time_ids": numbers}


def random_told(config: Mapping[str, Any], batch: int = 2, seed: int = 5) -> dict[str, torch.Tensor]:
    """What a U-Net with this config is told, by name: random captions, and pictures of the size that are here."""
    context = torch.randn(batch, MAX_TOKENS, CONTEXT, generator=torch.Generator().manual_seed(seed))
    return {"context": context, **added_conditions(config, batch)}


def random_latents(batch: int = 2) -> dict[str, torch.Tensor]:
    """The posterior of the latents of as many pictures."""
    shape = (batch, 4, LATENT, LATENT)
    mean, std = (torch.Generator().manual_seed(seed) for seed in (3, 4))
    return {"latents_mean": torch.randn(shape, generator=mean), "latents_std": torch.rand(shape, generator=std)}


def asked(
    unet: UNet2DConditionModel, latents: torch.Tensor, timesteps: torch.Tensor, told: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What a U-Net answers to latents (B, 4, h, w), by the call of diffusers."""
    added = {name: value for name, value in told.items() if name != "context"}
    return unet(latents, timesteps, told["context"], added_cond_kwargs=added).sample


def run_randomly(unet: UNet2DConditionModel, seed: int = 0) -> torch.Tensor:
    """What a U-Net of any kind answers to random inputs."""
    latents, timesteps, context = random_inputs(seed=seed)
    return asked(unet, latents, timesteps, {"context": context, **added_conditions(unet.config)})


@cache
def xl_unet() -> UNet2DConditionModel:
    """A random U-Net in the shape of SDXL's. Not to be changed."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**XL_UNET).eval()


def age(folder: Path) -> Path:
    """Make a saved v1 pipeline look as the folders of 2022 do, such as SD 1.4's: other names, and defaults left out."""
    (folder / "tokenizer" / "tokenizer.json").unlink()
    write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {"model_max_length": MAX_TOKENS, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"},
    )
    text, vae = folder / "text_encoder" / "model.safetensors", folder / "vae" / "diffusion_pytorch_model.safetensors"
    save(text, load_file(text) | {"text_model.embeddings.position_ids": torch.arange(MAX_TOKENS)[None]})
    save(vae, {_old_attention(name): tensor for name, tensor in load_file(vae).items()})
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_OF_2022)
    of_unet = {"mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False}
    for part, defaults in (("unet", of_unet), ("vae", {"scaling_factor": 0.18215})):
        config = json.loads((folder / part / "config.json").read_text())
        told = {key: value for key, value in config.items() if key not in defaults or value != defaults[key]}
        write_json(folder / part / "config.json", told)
    return add_safety_checker(folder)


def add_safety_checker(folder: Path) -> Path:
    """One that finds no fault, as the folders of 2022 have it."""
    StableDiffusionSafetyChecker(_tiny_clip()).save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").mkdir()
    write_json(
        folder / "feature_extractor" / "preprocessor_config.json",
        {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 16, "size": 16, "do_resize": True},
    )
    index = json.loads((folder / "model_index.json").read_text())
    old_parts = {
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    write_json(folder / "model_index.json", {**index, **old_parts, "requires_safety_checker": True})
    return folder


def _old_attention(name: str) -> str:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return next((name.replace(new, old) for new, old in names.items() if f".{new}." in name), name)


def _tiny_clip() -> CLIPConfig:
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return CLIPConfig(text_config=tower, vision_config=tower | {"image_size": 16, "patch_size": 8}, projection_dim=8)


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values))
