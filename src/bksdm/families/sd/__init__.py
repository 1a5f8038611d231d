"""Stable Diffusion 1.x and 2.x: a U-Net that is told a caption, embedded by one text encoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from bksdm.families.family import Denoiser, Shapes, Told
from bksdm.families.recipe import Config
from bksdm.families.unet import structure
from bksdm.families.unet.depth import listed
from bksdm.families.unet.family import UNetFamily


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

    def claims(self, config: Config) -> bool:
        return not config.get(structure.ADDED)

    def why_not(self, config: Config) -> str | None:
        return structure.why_not(config)

    def misfit(self, config: Config, encoders: Sequence[Mapping[str, Any]]) -> str | None:
        width, takes = encoders[0]["hidden_size"], config["cross_attention_dim"]
        if width in listed(takes, 1):
            return None
        return f"its text encoder gives embeddings of width {width}, and its U-Net takes {takes}"

    def condition_shapes(self, config: Config, tokens: int) -> Shapes:
        return {"context": (tokens, listed(config["cross_attention_dim"], 1)[0])}

    def embedded(self, encoders: Sequence[nn.Module], input_ids: Tensor) -> Told:
        return {"context": encoders[0](input_ids).last_hidden_state}

    def answer(self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        output: Tensor = denoiser(latents, timesteps, told["context"]).sample
        return output

    def assembled(self, parts: Mapping[str, Any], like: Mapping[str, Any], kind: str) -> DiffusionPipeline:
        optional = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        needs_checker = like.get("requires_safety_checker", parts.get("safety_checker") is not None)
        return getattr(diffusers, kind)(**optional | dict(parts), requires_safety_checker=needs_checker)
