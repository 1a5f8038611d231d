"""Stable Diffusion 1.x and 2.x: a U-Net that is told a caption, embedded by one text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bksdm.families.family import Denoiser, Told
from bksdm.families.recipe import Config
from bksdm.families.single_file import FileShapes, Layout, Part, Vocabulary
from bksdm.families.unet import names, structure, text_names
from bksdm.families.unet.depth import listed
from bksdm.families.unet.family import UNetFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
}


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x."""

    name = "Stable Diffusion 1.x or 2.x"
    tag = "stable-diffusion"
    pipeline = "StableDiffusionPipeline"
    from_image = "StableDiffusionImg2ImgPipeline"
    under_mask = "StableDiffusionInpaintPipeline"
    networks = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}  # noqa: RUF012
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    text_outputs = (("last_hidden_state", "pooler_output"),)
    of_caption = ("context",)
    lora_prefixes = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}  # noqa: RUF012
    lora_versions = {  # noqa: RUF012
        768: ("sd_v1", "stable-diffusion-v1/lora"),
        1024: ("sd_v2", "stable-diffusion-v2/lora"),
    }

    def claims(self, config: Config) -> bool:
        return not config.get(structure.ADDED)

    def misfit(self, configs: Mapping[str, Config]) -> str | None:
        width, takes = configs["text_encoder"]["hidden_size"], configs["unet"]["cross_attention_dim"]
        if width in listed(takes, 1):
            return None
        return f"its text encoder gives embeddings of width {width}, and its U-Net takes {takes}"

    def embedded(self, encoders: Sequence[nn.Module], input_ids: Tensor) -> Told:
        return {"context": encoders[0](input_ids).last_hidden_state}

    def answer(self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        output: Tensor = denoiser(latents, timesteps, told["context"]).sample
        return output

    def layout(self, config: Config) -> Layout:
        """Version 2 has linear projections and OpenCLIP's text encoder, and readers expect both or neither."""
        return _layout(bool(config.get("use_linear_projection")))

    def layout_of(self, shapes: FileShapes) -> Layout:
        return _layout(_OPEN_CLIP + "token_embedding.weight" in shapes)

    def is_whole(self, config: Config) -> bool:
        whole = len(config["block_out_channels"]) == 4 and config["layers_per_block"] == 2
        return whole and config["mid_block_type"] == "UNetMidBlock2DCrossAttn"

    def assembled(self, parts: Mapping[str, Any], like: Mapping[str, Any], kind: str) -> DiffusionPipeline:
        import diffusers

        optional = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        needs_checker = like.get("requires_safety_checker", parts.get("safety_checker") is not None)
        return getattr(diffusers, kind)(**optional | dict(parts), requires_safety_checker=needs_checker)


def _layout(open_clip: bool) -> Layout:
    unet = Part(names.UNET, names.unet_places, names.unet_config)
    vae = Part(names.VAE, names.vae_places, names.vae_config)
    text = _of_version_2(text_names.open_clip(_OPEN_CLIP)) if open_clip else text_names.clip(_CLIP)
    vocabulary = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" if open_clip else "openai/clip-vit-large-patch14"
    return Layout({"unet": unet, "vae": vae, "text_encoder": text}, _SCHEDULER, (Vocabulary(vocabulary),))


def _of_version_2(part: Part) -> Part:
    """The text encoder without the last of its 24 layers, which the file holds and the U-Net was never shown."""

    def config(shapes: FileShapes) -> dict[str, Any]:
        found = part.config(shapes)
        return found | ({"num_hidden_layers": 23} if found["num_hidden_layers"] == 24 else {})

    return replace(part, config=config)
