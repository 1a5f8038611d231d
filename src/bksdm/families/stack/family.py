"""What transformers that are stacks of blocks answer alike."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from bksdm.common.errors import InputError
from bksdm.families.family import Family, Timesteps
from bksdm.families.flow import FlowSchedule
from bksdm.families.layers import Layer, are_sizes, said
from bksdm.families.originals import Joined, joined_layers, original_tensors
from bksdm.families.reader import Reader
from bksdm.families.recipe import Config, Pruning, Recipe
from bksdm.families.single_file import FileShapes, Layout
from bksdm.families.stack.structure import Stack, Stacks
from bksdm.families.units import Names, Removals, Unit

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from torch import Tensor, nn

SIDES = "_sample_size"  # of a config: begins so that diffusers keeps it and asks nothing of it


class StackFamily(Family):
    """A family whose denoiser is a transformer that any of its blocks can be taken out of.

    Attributes:
        stacks: Its blocks.
        signs: Entries that its config alone has, by which one without a class is known.
        originals: Its layers by their names in original checkpoints, with `{n}` for the number of a block.
        original_others: Tensors that are of no such layer, by their names there.
        names_stay: Whether what has no other name is called as in diffusers.
        out: Path of the linear layer that gives the answer.
        usual_sides: Height and width of latents of pictures of 1024 pixels.
    """

    denoiser = "transformer"
    noun = "transformer"
    unready = frozenset(
        {"personalize", "benchmark", "demo", "decoder"}
        | {"--image", "--mask", "--decoder", "--guided_output", "--guidance_interval", "--reuse"}
        | {"--pool_keys", "--fast"}
    )
    exports: ClassVar[tuple[str, ...]] = ("onnx", "openvino", "transformer")
    projections = {}  # noqa: RUF012
    adapters: ClassVar[tuple[str, ...]] = ("LoRA",)
    lora_prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("lycoris_", "lora_unet_", "lora_transformer_"),
        "text_encoder": ("lora_te_", "lora_te1_"),
    }
    lora_names = "diffusers"
    words = ()
    by_flow = True
    lora_versions = {}  # noqa: RUF012
    usual_tokens = 512
    out: ClassVar[str] = "proj_out"
    usual_sides: ClassVar[tuple[int, int]] = (128, 128)
    latents_of_a_token = 4
    stacks: ClassVar[tuple[Stack, ...]]
    signs: ClassVar[tuple[str, ...]]
    originals: ClassVar[Mapping[str, Joined]]
    original_others: ClassVar[Mapping[str, str]]
    names_stay: ClassVar[bool] = False

    @cached_property
    def _structure(self) -> Stacks:
        return Stacks(self.stacks, self.defaults)

    @abstractmethod
    def runs(self, whole: Config, size: tuple[int, int]) -> bool:
        """Whether a network that is all this runs on latents of this height and width, as far as is known here."""

    @abstractmethod
    def consists_of(self, whole: Config, size: tuple[int, int], tokens: int) -> Iterator[Layer]:
        """Its layers, where it runs."""

    def width(self, config: Config) -> int:
        """Channels of its hidden states."""
        whole = self._structure.whole(config)
        return int(whole["num_attention_heads"] * whole["attention_head_dim"])

    def claims(self, config: Config) -> bool:
        if "_class_name" in config:
            return bool(config["_class_name"] == self.networks[self.denoiser])
        return all(sign in config for sign in self.signs)

    def why_not(self, config: Config) -> str | None:
        return self._structure.why_not(config)

    def misfit(self, configs: Mapping[str, Config]) -> str | None:  # noqa: ARG002
        return None

    def derive(self, recipe: Recipe, config: Config) -> Pruning:
        return self._structure.derive(recipe, config, self.width(config))

    def units(self, config: Config) -> tuple[Unit, ...]:
        return self._structure.units(config)

    def removals(self, config: Config) -> tuple[Removals, ...]:
        return self._structure.removals(config)

    def recipe_without(self, config: Config, names: Names, name: str, summary: str) -> Recipe:
        return self._structure.recipe_without(config, names, name, summary)

    def recipes_between(self, teacher: Config, student: Config, name: str) -> list[Recipe]:
        return list(self._structure.recipes_between(teacher, student, name))

    def difference(self, wanted: Config, found: Config) -> tuple[str, Any, Any] | None:
        return self._structure.difference(wanted, found)

    def layers_of(self, config: Config, size: tuple[int, int], tokens: int) -> list[Layer] | None:
        whole = self._structure.whole(said(config))
        known = whole.keys() == self.defaults.keys() and not self.why_not(whole) and are_sizes(*size, tokens)
        return list(self.consists_of(whole, size, tokens)) if known and self.runs(whole, size) else None

    def skip_connections(self, config: Config) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def passed(self, config: Config) -> tuple[str, ...]:
        return tuple(stack.block(n) for stack in self.stacks for n in range(self.depths(config)[stack.path]))

    def adding(self, denoiser: nn.Module, path: str) -> tuple[tuple[str, ...], ...]:  # noqa: ARG002
        if not path:
            return ((self.out,),)
        return next(stack.adding for stack in self.stacks if path.startswith(f"{stack.path}."))

    def bypassed(self, denoiser: nn.Module, units: Iterable[Unit]) -> AbstractContextManager[nn.Module]:
        return self._structure.bypassed(denoiser, units)

    def feature(self, module: nn.Module, output: Any, latents: Tensor, *, captions: bool = False) -> Tensor:
        """What becomes of the picture, (B, L, C), and of the caption, of which nothing is drawn, where it is wanted.

        Blocks for both apart give the caption first, and their attentions the picture.
        """
        import torch

        if isinstance(output, tuple):
            caption, picture = reversed(output[:2]) if "Attention" in type(module).__name__ else output[:2]
            return torch.cat([caption, picture], dim=1) if captions else picture
        found: Tensor = output
        if captions:
            return found
        return found[:, self.picture_tokens(latents.shape[2] * latents.shape[3] // self.latents_of_a_token)]

    def picture_tokens(self, count: int) -> slice:
        """Which tokens are the picture's `count` where blocks take them with those of the caption: the last."""
        return slice(-count, None)

    def depths(self, config: Config) -> dict[str, int]:
        return self._structure.depths(config)

    def joined(self, paths: Collection[str]) -> dict[str, Joined]:
        named = joined_layers(self.originals, paths)
        return {name: joined for name, joined in named.items() if not joined.as_it_is}

    def original_tensors(self, names: Collection[str]) -> dict[str, Joined]:
        made, left = original_tensors(self.originals, self.original_others, names)
        if left and not self.names_stay:
            raise InputError(f"{min(left)} has no name in original checkpoints of {self.name}")
        return made | {name: Joined((name,)) for name in left}

    def original_paths(self, paths: Iterable[str]) -> dict[str, str]:
        named = joined_layers(self.originals, set(paths))
        return {joined.parts[0]: name for name, joined in named.items() if joined.as_it_is}

    def readers(self, config: Config) -> list[Reader]:  # noqa: ARG002
        return [Reader("diffusers", "folder", "yes", "run")]

    def caption_length(self, config: Config) -> int:  # noqa: ARG002
        return self.usual_tokens

    def token_lengths(self, tokenizers: Sequence[Any]) -> list[int]:
        return [self.usual_tokens] * len(tokenizers)

    def reading(self, tokens: int) -> dict[str, Any]:
        """Its pipelines read their usual number whatever the tokenizer says."""
        return {"max_sequence_length": tokens}

    def scaled(self, vae: Any, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        factor = vae.config.scaling_factor
        return (mean - vae.config.shift_factor) * factor, std * factor

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        found: Tensor = latents / vae.config.scaling_factor + vae.config.shift_factor
        return found

    def noise_schedule(self, scheduler: SchedulerMixin, timesteps: Timesteps = "even") -> FlowSchedule:
        from diffusers import FlowMatchEulerDiscreteScheduler

        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise InputError(
                f"scheduler {type(scheduler).__name__} is none of flow matching, by which this model learnt; use one "
                f"with a FlowMatchEulerDiscreteScheduler"
            )
        return FlowSchedule(partial(self.shift, scheduler.config), timesteps == "logit_normal")

    def shift(self, scheduler: Mapping[str, Any], height: int, width: int) -> float:
        """By what a scheduler with this config shifts noise levels for latents of this height and width."""
        if not scheduler["use_dynamic_shifting"]:
            return float(scheduler["shift"])
        mu = self.mu(scheduler, height * width // self.latents_of_a_token)
        return mu if scheduler["time_shift_type"] == "linear" else math.exp(mu)

    def set_steps(self, scheduler: Any, steps: int, sides: tuple[int, int]) -> None:
        """As its pipelines do: by noise levels that are even before they are shifted."""
        import torch

        tokens = sides[0] * sides[1] // self.latents_of_a_token
        levels = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sigmas=levels, mu=self.mu(scheduler.config, tokens, steps))

    def latents_a_side(self, config: Config) -> int:  # noqa: ARG002
        return math.isqrt(self.latents_of_a_token)

    def mu(self, scheduler: Mapping[str, Any], tokens: int, steps: int | None = None) -> float:  # noqa: ARG002
        """The shift that its pipelines ask a scheduler for, for pictures of so many tokens and so many steps."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return float(calculate_shift(tokens, *(scheduler[name] for name in names)))

    def latent_sides(self, config: Config) -> tuple[int, int]:
        """Of pictures of 1024 pixels; no entry of diffusers says otherwise, so models of other sizes have our own."""
        return super().latent_sides({"sample_size": config.get(SIDES, self.usual_sides)})

    def draws_its_size(self, config: Config) -> bool:
        return self.latent_sides(config) == self.usual_sides

    def layout(self, config: Config) -> Layout:  # noqa: ARG002
        raise InputError(f"{self.name} is not written as a single file yet; save the folder")

    def layout_of(self, shapes: FileShapes) -> Layout | None:  # noqa: ARG002
        return None

    def is_whole(self, config: Config) -> bool:
        usual = self._structure.depths({})
        return self._structure.depths(config) == usual

    def assembled(self, parts: Mapping[str, Any], like: Mapping[str, Any], kind: str) -> DiffusionPipeline:  # noqa: ARG002
        import diffusers

        return getattr(diffusers, kind)(**parts)
