"""SDXL: a U-Net that is told a caption by two text encoders, its pooled embedding, and six numbers about the picture.

The numbers are the size of the picture before it was scaled, the corner where it was cut, and the size that is drawn
(arXiv 2307.01952, section 2.2).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from bksdm.families.family import Denoiser, Frame, Shapes, Told
from bksdm.families.recipe import Config
from bksdm.families.unet import structure
from bksdm.families.unet.depth import listed
from bksdm.families.unet.family import UNetFamily

_NUMBERS = structure.NUMBERS


class StableDiffusionXL(UNetFamily):
    """SDXL."""

    name = "SDXL"
    tag = "stable-diffusion-xl"
    pipeline = "StableDiffusionXLPipeline"
    from_image = "StableDiffusionXLImg2ImgPipeline"
    under_mask = "StableDiffusionXLInpaintPipeline"
    networks = {  # noqa: RUF012
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    text_outputs = (
        ("last_hidden_state", "pooler_output", "hidden_states"),
        ("text_embeds", "last_hidden_state", "hidden_states"),
    )
    of_caption = ("context", "text_embeds")
    of_picture = ("time_ids",)
    upcasts_vae = True

    def claims(self, config: Config) -> bool:
        return bool(config.get(structure.ADDED))

    def why_not(self, config: Config) -> str | None:
        return structure.why_not(config)

    def misfit(self, config: Config, encoders: Sequence[Mapping[str, Any]]) -> str | None:
        widths, takes = [encoder["hidden_size"] for encoder in encoders], config["cross_attention_dim"]
        if sum(widths) not in listed(takes, 1):
            return f"its text encoders give embeddings of width {' and '.join(map(str, widths))}, and its U-Net {takes}"
        pooled, wanted = encoders[1]["projection_dim"], _pooled_width(config)
        if pooled != wanted:
            return f"its second text encoder gives pooled embeddings of width {pooled}, and its U-Net takes {wanted}"
        return None

    def remark(self, config: Config, scheduler: Mapping[str, Any]) -> str | None:  # noqa: ARG002
        if scheduler.get("timestep_spacing") != "trailing":
            return None
        return (
            "the teacher's timesteps are spaced as those of few-step models are (turbo, lightning): such a teacher "
            "knows a few timesteps only, and a student learns at all of them; the model that it was made from teaches "
            "more, and bksdm lcm makes few steps of a student"
        )

    def condition_shapes(self, config: Config, tokens: int) -> Shapes:
        return {
            "context": (tokens, listed(config["cross_attention_dim"], 1)[0]),
            "text_embeds": (_pooled_width(config),),
            "time_ids": (_NUMBERS,),
        }

    def embedded(self, encoders: Sequence[nn.Module], input_ids: Tensor) -> Told:
        """The last hidden states but one of both text encoders side by side, and the second's pooled embedding."""
        found = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(encoders, input_ids.unbind(dim=1), strict=True)
        ]
        context = torch.cat([one.hidden_states[-2] for one in found], dim=-1)
        return {"context": context, "text_embeds": found[-1].text_embeds}

    def embeds_empty(self, pipeline: DiffusionPipeline) -> bool:
        return not pipeline.config.get("force_zeros_for_empty_prompt", True)

    def of_frame(self, frame: Frame) -> Told:
        return {"time_ids": torch.tensor([*frame.original, *frame.corner, *frame.size], dtype=torch.float32)}

    def answer(self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        added = {name: told[name] for name in ("text_embeds", "time_ids")}
        output: Tensor = denoiser(latents, timesteps, told["context"], added_cond_kwargs=added).sample
        return output

    def assembled(self, parts: Mapping[str, Any], like: Mapping[str, Any], kind: str) -> DiffusionPipeline:
        optional = dict.fromkeys(("feature_extractor", "image_encoder"))
        zeros = like.get("force_zeros_for_empty_prompt", True)
        return getattr(diffusers, kind)(**optional | dict(parts), force_zeros_for_empty_prompt=zeros)


def _pooled_width(config: Config) -> int:
    width: int = config["projection_class_embeddings_input_dim"] - _NUMBERS * config["addition_time_embed_dim"]
    return width
