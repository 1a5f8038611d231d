"""SDXL: a U-Net that is told a caption by two text encoders, its pooled embedding, and six numbers about the picture.

The numbers are the size of the picture before it was scaled, the corner where it was cut, and the size that is drawn
(arXiv 2307.01952, section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bksdm.common.errors import InputError
from bksdm.families.family import Denoiser, Frame, Told, few_steps
from bksdm.families.layers import Shapes
from bksdm.families.recipe import Config
from bksdm.families.single_file import FileShapes, Layout, Part, Vocabulary
from bksdm.families.unet import names, structure, text_names
from bksdm.families.unet.depth import Depths, listed
from bksdm.families.unet.family import UNetFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

_NUMBERS = structure.NUMBERS
_CONDITIONER = "conditioner.embedders."
_FIRST, _SECOND = f"{_CONDITIONER}0.transformer.text_model.", f"{_CONDITIONER}1.model."
_WHOLE = Depths(((), (2, 2), (10, 10)), ((), (2, 2, 2), (10, 10, 10)), 10)
_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_VOCABULARIES = (
    Vocabulary("openai/clip-vit-large-patch14"),
    Vocabulary("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", {"pad_token": "!"}),
)


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
    settings = ("force_zeros_for_empty_prompt",)
    lora_prefixes = {  # noqa: RUF012
        "unet": ("lora_unet_",),
        "text_encoder": ("lora_te1_",),
        "text_encoder_2": ("lora_te2_",),
    }
    lora_sign = UNetFamily.lora_sign + r"|^lora_te2_text_model_"  # Flux has a text encoder of another kind there
    lora_versions = {2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora")}  # noqa: RUF012
    words = ("clip_l", "clip_g")
    shrinks = 2

    def claims(self, config: Config) -> bool:
        return bool(config.get(structure.ADDED))

    def misfit(self, configs: Mapping[str, Config]) -> str | None:
        unet, first, second, vae = (configs[name] for name in ("unet", "text_encoder", "text_encoder_2", "vae"))
        widths, takes = [first["hidden_size"], second["hidden_size"]], unet["cross_attention_dim"]
        if sum(widths) not in listed(takes, 1):
            return f"its text encoders give embeddings of width {' and '.join(map(str, widths))}, and its U-Net {takes}"
        pooled, wanted = second["projection_dim"], _pooled_width(unet)
        if pooled != wanted:
            return f"its second text encoder gives pooled embeddings of width {pooled}, and its U-Net takes {wanted}"
        if vae.get("latents_mean") or vae.get("latents_std"):
            return (
                "its VAE has latents_mean and latents_std, as that of Playground 2.5 has, and SDXL's latents are "
                "scaled by one factor"
            )
        return None

    def remark(self, pipeline: Config, config: Config, scheduler: Config) -> str | None:  # noqa: ARG002
        if scheduler.get("timestep_spacing") != "trailing":
            return None
        return few_steps(
            "the teacher's timesteps are spaced as those of few-step models are (turbo, lightning)",
            "bksdm lcm makes few steps of a student; pictures of this one want --guidance 0 and --steps 1 to 4 (turbo) "
            "or 4 to 8 (lightning)",
        )

    def condition_shapes(self, config: Config, tokens: int) -> Shapes:
        added = {"text_embeds": (_pooled_width(config),), "time_ids": (_NUMBERS,)}
        return super().condition_shapes(config, tokens) | added

    def embedded(self, encoders: Sequence[nn.Module], input_ids: Tensor) -> Told:
        """The last hidden states but one of both text encoders side by side, and the second's pooled embedding."""
        import torch

        found = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(encoders, input_ids.unbind(dim=1), strict=True)
        ]
        context = torch.cat([one.hidden_states[-2] for one in found], dim=-1)
        return {"context": context, "text_embeds": found[-1].text_embeds}

    def embeds_empty(self, pipeline: DiffusionPipeline) -> bool:
        return not pipeline.config.get("force_zeros_for_empty_prompt", True)

    def of_frame(self, frame: Frame) -> Told:
        import torch

        return {"time_ids": torch.tensor([*frame.original, *frame.corner, *frame.size], dtype=torch.float32)}

    def answer(self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        added = {name: told[name] for name in ("text_embeds", "time_ids")}
        output: Tensor = denoiser(latents, timesteps, told["context"], added_cond_kwargs=added).sample
        return output

    def layout(self, config: Config) -> Layout:  # noqa: ARG002
        return _LAYOUT

    def layout_of(self, shapes: FileShapes) -> Layout | None:
        return _LAYOUT if any(name.startswith(_CONDITIONER) for name in shapes) else None

    def is_whole(self, config: Config) -> bool:
        shape = structure.UNetShape.of(config)
        return (shape.layers, shape.depths) == ((2, 2, 2), _WHOLE)

    def stage_residuals(self, config: Config) -> dict[str, int]:
        """The last, which the middle block takes, is as wide as the innermost stage."""
        widths = super().stage_residuals(config)
        return widths | ({"mid_block": config["block_out_channels"][-1]} if config.get("mid_block_type", True) else {})

    def assembled(self, parts: Mapping[str, Any], like: Mapping[str, Any], kind: str) -> DiffusionPipeline:
        import diffusers

        optional = dict.fromkeys(("feature_extractor", "image_encoder"))
        zeros = like.get("force_zeros_for_empty_prompt", True)
        return getattr(diffusers, kind)(**optional | dict(parts), force_zeros_for_empty_prompt=zeros)


def _pooled_width(config: Config) -> int:
    width: int = config["projection_class_embeddings_input_dim"] - _NUMBERS * config["addition_time_embed_dim"]
    return width


def _unet_config(shapes: FileShapes) -> dict[str, Any]:
    label = f"{names.UNET}label_emb.0.0.weight"
    found = names.unet_config(shapes)
    if label not in shapes:
        raise InputError(f"its U-Net is told nothing about pictures (no {label})")
    takes, pooled = shapes[label][1], shapes.get(_SECOND + text_names.PROJECTION, (0, 0))[1]
    each, rest = divmod(takes - pooled, _NUMBERS)
    return found | {
        "sample_size": 128,
        structure.ADDED: "text_time",
        "addition_time_embed_dim": each if pooled and not rest else 256,
        "projection_class_embeddings_input_dim": takes,
    }


def _vae_config(shapes: FileShapes) -> dict[str, Any]:
    """Playground 2.5 has what it calls `edm_mean` beside its VAE."""
    scales = {"latents_mean": list(shapes["edm_mean"])} if "edm_mean" in shapes else {}
    return names.vae_config(shapes) | {"sample_size": 1024, "scaling_factor": 0.13025} | scales


_LAYOUT = Layout(
    {
        "unet": Part(names.UNET, names.unet_places, _unet_config),
        "vae": Part(names.VAE, names.vae_places, _vae_config),
        "text_encoder": text_names.clip(_FIRST),
        "text_encoder_2": text_names.open_clip(_SECOND),
    },
    _SCHEDULER,
    _VOCABULARIES,
)
