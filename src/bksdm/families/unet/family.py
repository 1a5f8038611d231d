"""What Stable Diffusion and SDXL answer alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from bksdm.common.errors import InputError
from bksdm.families.family import Family
from bksdm.families.layers import Layer, Shapes
from bksdm.families.noise import NoiseSchedule
from bksdm.families.reader import Reader
from bksdm.families.recipe import Config, Pruning, Recipe
from bksdm.families.unet import names, structure
from bksdm.families.unet import units as unet_units
from bksdm.families.unet.depth import listed
from bksdm.families.unet.layers import IDLE, READ, USUAL, layers
from bksdm.families.unet.readers import readers
from bksdm.families.units import Names, Removals, Unit
from bksdm.runtime.spared import Spared

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from torch import Tensor, nn

    from bksdm.families.graph import Graph


class UNetFamily(Family):
    """A family whose denoiser is a `UNet2DConditionModel`."""

    inputs = ("in_channels", "out_channels", "cross_attention_dim", "projection_class_embeddings_input_dim")
    defaults = READ | IDLE | USUAL
    projections = {  # noqa: RUF012
        "unet": ("to_q", "to_k", "to_v", "to_out.0"),
        **dict.fromkeys(("text_encoder", "text_encoder_2"), ("q_proj", "k_proj", "v_proj", "out_proj")),
    }

    exports = ("onnx", "openvino", "coreml", "gguf", "executorch", "ldm", "taesd", "tensorrt", "diffusers", "web")
    unready = frozenset({"--caption_features", "--teacher_inputs"})
    controlnet = "ControlNetModel"
    lora_sign = r"(^|[._])(down|up|mid|input|middle|output)_blocks?[._]"
    adapters = ("LoRA", "textual inversion", "ControlNet", "T2I-Adapter", "IP-Adapter", "motion module")

    def why_not(self, config: Config) -> str | None:
        return structure.why_not(config)

    def derive(self, recipe: Recipe, config: Config) -> Pruning:
        return structure.derive(recipe, config)

    def units(self, config: Config) -> tuple[Unit, ...]:
        return unet_units.units(config)

    def removals(self, config: Config) -> tuple[Removals, ...]:
        return tuple(unet_units.removals(config))

    def recipe_without(self, config: Config, names: Names, name: str, summary: str) -> Recipe:
        return unet_units.recipe_without(config, names, name, summary)

    def recipes_between(self, teacher: Config, student: Config, name: str) -> list[Recipe]:
        return list(unet_units.recipes_between(teacher, student, name))

    def difference(self, wanted: Config, found: Config) -> tuple[str, Any, Any] | None:
        return structure.difference(wanted, found)

    def skip_connections(self, config: Config) -> tuple[str, ...]:
        return structure.skip_connections(config)

    def passed(self, config: Config) -> tuple[str, ...]:
        return structure.passed(config)

    def adding(self, denoiser: nn.Module, path: str) -> tuple[tuple[str, ...], ...]:
        """Of a ResNet block what is added up, of an attention what comes out, of a sampler all."""
        kinds = {
            "resnets": ("conv2", "conv_shortcut"),
            "attentions": ("proj_out",),
            "transformer_blocks": ("ff.net.2",),
        }
        names = kinds.get(path.split(".")[-2], ("conv",)) if path else ("conv_out",)
        layer = denoiser.get_submodule(path)
        return (tuple(name for name in names if getattr(layer, name, None) is not None or "." in name),)

    def bypassed(self, denoiser: nn.Module, units: Iterable[Unit]) -> AbstractContextManager[nn.Module]:
        from bksdm.families.unet.bypass import bypassed

        return bypassed(denoiser, units)

    def layers_of(self, config: Config, size: tuple[int, int], tokens: int) -> list[Layer] | None:
        return layers(config, size, tokens)

    def guides(self, pipeline: Config, config: Config) -> bool:
        """Latent-consistency U-Nets of the first kind (arXiv 2310.04378) are told the guidance scale in one call."""
        return super().guides(pipeline, config) and config.get("time_cond_proj_dim") is None

    def sparing(self, denoiser: Any, scheduler: SchedulerMixin, spared: Spared) -> AbstractContextManager[object]:
        from bksdm.families.unet import sparing

        ways = ExitStack()
        if spared.interval is not None:  # first, so that what is kept is of the samples that are left
            schedule = NoiseSchedule.from_scheduler(scheduler)
            ways.enter_context(sparing.guided_within(denoiser, schedule, spared.interval))
        if spared.reuse is not None:
            ways.enter_context(sparing.reusing(denoiser, spared.reuse))
        if spared.pool_keys is not None:
            ways.enter_context(sparing.pooling_keys(denoiser, spared.pool_keys))
        return ways

    def pools_keys(self, config: Config) -> bool:
        outermost = (config["down_block_types"][0], config["up_block_types"][-1])
        only_cross = listed(config.get("only_cross_attention", False), 1)[0]
        return any(kind.startswith("CrossAttn") for kind in outermost) and not only_cross

    def condition_shapes(self, config: Config, tokens: int) -> Shapes:
        return {"context": (tokens, listed(config["cross_attention_dim"], 1)[0])}

    def graph(self, denoiser: Any, latents: Tensor, encoders: Sequence[Any]) -> Graph:
        from bksdm.families.unet.graph import unet_graph

        return unet_graph(denoiser, self, latents, encoders[0].config.max_position_embeddings)

    def latents_a_side(self, config: Config) -> int:
        return int(2 ** (len(config["block_out_channels"]) - 1))

    def readers(self, config: Config) -> list[Reader]:
        return readers(config)

    def attend(self, denoiser: Any, *, plainly: bool) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        if plainly:
            denoiser.set_attn_processor(AttnProcessor())
        else:
            denoiser.set_default_attn_processor()

    def original_paths(self, paths: Iterable[str]) -> dict[str, str]:
        try:
            places = names.unet_places(f"{path}.weight" for path in paths)
        except InputError:
            return {}
        return {
            key.removesuffix(".weight"): place.name.removeprefix(names.UNET).removesuffix(".weight")
            for key, place in places.items()
        }

    def stage_residuals(self, config: Config) -> dict[str, int]:
        return {f"down_blocks.{stage}": width for stage, width in enumerate(config["block_out_channels"])}
