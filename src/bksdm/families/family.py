"""What differs from one kind of model to another, as questions that every family answers.

Nothing outside `families/` asks which family it is. A new one is a package here, and a line in `families.FAMILIES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from bksdm.common.errors import InputError
from bksdm.families import networks
from bksdm.families.layers import Layer, Shapes, tensor_shapes
from bksdm.families.noise import ForwardProcess, NoiseSchedule
from bksdm.families.originals import Joined
from bksdm.families.reader import Reader
from bksdm.families.recipe import Config, Pruning, Recipe
from bksdm.families.single_file import FileShapes, Layout
from bksdm.families.units import Names, Removals, Unit
from bksdm.runtime.defaults import Defaults
from bksdm.runtime.spared import NOTHING, Spared

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from tokenizers import Encoding
    from torch import Tensor, nn

    from bksdm.families.graph import Graph

Told: TypeAlias = "dict[str, Tensor]"  # by name: what a denoiser is told besides noisy latents and their timestep
_ANY_SIZE = (64, 64)  # of latents, by which no shape of a tensor goes
Timesteps = Literal["even", "logit_normal"]
_FEW_STEPS = (
    "such a teacher knows a few timesteps only, and a student learns at all of them; the model that it was made from "
    "teaches more"
)
Denoiser = Any  # the network, or what is called in its place and has its config


def few_steps(why: str, mend: str) -> str:
    """What to say of a teacher that draws in few steps.

    Arguments:
        why: How that is known.
        mend: What to do about it.
    """
    return f"{why}: {_FEW_STEPS}; {mend}"


@dataclass(frozen=True)
class Frame:
    """How a picture became what is learnt from; in pixels, height before width.

    Attributes:
        original: Size of the picture as it is.
        corner: Top and left of what was cut out of it, after it was scaled.
        size: What was cut out.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def fitted(cls, original: tuple[int, int], size: tuple[int, int]) -> Frame:
        """Of the middle of a picture, as much of it as has the wanted shape."""
        scale = max(size[0] / original[0], size[1] / original[1])
        top, left = (round((scale * whole - part) / 2) for whole, part in zip(original, size, strict=True))
        return cls(original, (top, left), size)

    @classmethod
    def whole(cls, size: tuple[int, int]) -> Frame:
        """Of a picture of which nothing was scaled or cut."""
        return cls(size, (0, 0), size)


def first(output: Any) -> Tensor:
    """What a module gives, or the first where it gives several: of a down block, the hidden states."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class Family(ABC):
    """A kind of model.

    Attributes:
        name: For people.
        tag: By which the Hub lists such models.
        pipeline, from_image, under_mask: Classes of diffusers that draw from a prompt alone, from a picture, and
            within a mask.
        networks: Classes of the networks that make a pipeline, by their names in it.
        denoiser: The name of the network that is made smaller.
        noun: What people call it.
        inputs: Entries of its config that say what it takes and gives.
        defaults: What its denoiser is in diffusers where a config does not say, as far as that is reckoned with.
        encoders, tokenizers: Names of the text encoders, and of their tokenizers in the same order.
        text_outputs: Of each text encoder, what it gives other runtimes, in the order in which transformers does.
        of_caption, of_picture: Names of the conditions that a caption gives, and that say something of a picture.
        upcasts_vae: Whether its VAE decodes in float32 where its config has `force_upcast`, as all of diffusers do.
        settings: Entries of a pipeline's config that a single file has to tell, for no network does.
        projections: Names of the projections of attentions, by network: what a LoRA is learnt beside.
        lora_prefixes: Of the names of layers in kohya's scripts, by network: what is written, then what is read too.
        lora_sign: What names of layers in LoRAs of its denoiser have, as a regular expression.
        lora_versions: What kohya's scripts call its models, and the architecture of their LoRAs, by the width of the
            captions that they take.
        adapters: Kinds of what others make for it that can be carried to students, as `bksdm adapt` calls them.
        controlnet: The class of its ControlNets, if diffusers has one.
        lora_names: Whose names the LoRAs that are written have.
        words: What the vectors of a textual inversion are called in a file, one name a text encoder; "" where they are
            called as the word.
        shrinks: By how much the first residual of a T2I-Adapter is smaller than latents.
        latents_of_a_token: How many of the latents that its denoiser is asked about become one.
        unsaid: Options of its scheduler that readers are not told where they are usual, for its authors do not.
        exports: Formats that `bksdm export` writes of it.
        unready: Verbs that it does not go through yet, and options of others, such as "--lora".
        patch: Latents of its VAE to a side of one of its own.
        unguided: The guidance scale up to which there is none.
        usual: How its pictures are drawn where no model of it says.
        by_flow: Whether it learnt by flow matching.
        usual_tokens: Of a caption, where no text encoder says.
    """

    name: ClassVar[str]
    tag: ClassVar[str]
    pipeline: ClassVar[str]
    from_image: ClassVar[str]
    under_mask: ClassVar[str]
    networks: ClassVar[Mapping[str, str]]
    denoiser: ClassVar[str] = "unet"
    noun: ClassVar[str] = "U-Net"
    inputs: ClassVar[tuple[str, ...]]
    defaults: ClassVar[Config]
    encoders: ClassVar[tuple[str, ...]]
    tokenizers: ClassVar[tuple[str, ...]]
    text_outputs: ClassVar[tuple[tuple[str, ...], ...]]
    of_caption: ClassVar[tuple[str, ...]]
    of_picture: ClassVar[tuple[str, ...]] = ()
    upcasts_vae: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()
    projections: ClassVar[Mapping[str, Sequence[str]]]
    lora_prefixes: ClassVar[Mapping[str, tuple[str, ...]]]
    lora_sign: ClassVar[str]
    lora_versions: ClassVar[Mapping[int, tuple[str, str]]]
    adapters: ClassVar[tuple[str, ...]]
    controlnet: ClassVar[str | None] = None
    lora_names: ClassVar[Literal["kohya", "diffusers"]] = "kohya"
    words: ClassVar[tuple[str, ...]] = ("",)
    shrinks: ClassVar[int] = 1
    unsaid: ClassVar[tuple[str, ...]] = ()
    exports: ClassVar[tuple[str, ...]]
    unready: ClassVar[frozenset[str]] = frozenset()
    patch: ClassVar[int] = 1
    unguided: ClassVar[float] = 1.0
    usual: ClassVar[Defaults] = Defaults()
    latents_of_a_token: ClassVar[int] = 1
    by_flow: ClassVar[bool] = False
    usual_tokens: ClassVar[int] = 77

    # Is it mine?

    @abstractmethod
    def claims(self, config: Config) -> bool:
        """Whether a denoiser with this config is one of this kind, if of any."""

    @abstractmethod
    def why_not(self, config: Config) -> str | None:
        """Why a denoiser of this kind cannot be worked with; None where it can."""

    @abstractmethod
    def misfit(self, configs: Mapping[str, Config]) -> str | None:
        """Why networks with these configs, by their names in a pipeline, do not go together; None where they do."""

    def remark(self, pipeline: Config, config: Config, scheduler: Config) -> str | None:  # noqa: ARG002
        """What to say, if anything, of a teacher with such pipeline, denoiser and scheduler before it teaches."""
        return None

    # What does a recipe mean?

    @abstractmethod
    def derive(self, recipe: Recipe, config: Config) -> Pruning:
        """What follows from a recipe for a teacher with this config; `InputError` where it does not fit."""

    @abstractmethod
    def units(self, config: Config) -> tuple[Unit, ...]:
        """The parts that it can run without, one at a time, in the order in which the data meets them."""

    @abstractmethod
    def removals(self, config: Config) -> tuple[Removals, ...]:
        """Which of them recipes can remove together."""

    @abstractmethod
    def recipe_without(self, config: Config, names: Names, name: str, summary: str) -> Recipe:
        """The recipe that removes these units and nothing else."""

    @abstractmethod
    def recipes_between(self, teacher: Config, student: Config, name: str) -> list[Recipe]:
        """The recipes that make a denoiser with the student's config out of one with the teacher's."""

    @abstractmethod
    def difference(self, wanted: Config, found: Config) -> tuple[str, Any, Any] | None:
        """Name and both values of an entry in which a config is not the wanted one, if there is one."""

    @abstractmethod
    def skip_connections(self, config: Config) -> tuple[str, ...]:
        """Paths of the modules whose outputs it keeps for later layers, in the order in which it makes them."""

    @abstractmethod
    def passed(self, config: Config) -> tuple[str, ...]:
        """Paths of its layers, each of which takes what the one before gives, in the order in which data leaves them.

        So layers within one come before it.
        """

    @abstractmethod
    def adding(self, denoiser: nn.Module, path: str) -> tuple[tuple[str, ...], ...]:
        """What adds to what the layer at `path` gives, by paths in it: linear layers, convolutions, weights of norms.

        They are corrected in this order, those that stand together at once: their results are added to one another with
        nothing between. Without a path, those of the answer.
        """

    @abstractmethod
    def bypassed(self, denoiser: nn.Module, units: Iterable[Unit]) -> AbstractContextManager[nn.Module]:
        """The network without these units inside a `with` block, in memory; afterwards it is as it was."""

    def latent_channels(self, config: Config) -> int:
        """Channels of the latents that a denoiser with this config takes."""
        return int(config["in_channels"])

    def channels_of(self, vae: Config) -> int:
        """Channels of the latents that its VAE, with this config, makes of pictures."""
        return int(vae["latent_channels"])

    def latent_sides(self, config: Config) -> tuple[int, int]:
        """Height and width of the latents that it was made for; `InputError` where the config does not say."""
        size = config.get("sample_size")
        height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
        if not isinstance(height, int) or not isinstance(width, int):
            raise InputError(
                f"sample_size is {size!r} in the config of the U-Net; write the side of the latents, such as 64, or "
                f"height and width, such as [64, 96]"
            )
        return height, width

    def draws_its_size(self, config: Config) -> bool:  # noqa: ARG002
        """Whether its pipelines draw pictures of the size that such a denoiser was made for unless told otherwise."""
        return True

    def layers_of(self, config: Config, size: tuple[int, int], tokens: int) -> list[Layer] | None:  # noqa: ARG002
        """All that a denoiser consists of, for latents of this height and width and captions of so many tokens.

        None where the config says anything that is not reckoned with here, so that it has to be built to be counted.
        """
        return None

    def shapes_of(self, config: Config, name: str | None = None) -> Shapes | None:
        """Shapes of the tensors of one of its networks by their names: of the one of this name, or the denoiser.

        None where the config says anything that is not reckoned with here, or the network is of another kind.
        """
        if name is not None and name != self.denoiser:
            return networks.shapes(self.networks[name], config)
        layers = self.layers_of(config, _ANY_SIZE, self.usual_tokens)
        return None if layers is None else tensor_shapes(layers)

    def readers(self, config: Config) -> list[Reader]:  # noqa: ARG002
        """What is known of programs and a denoiser with this config."""
        return []

    # What is it told, and what does it answer?

    @abstractmethod
    def condition_shapes(self, config: Config, tokens: int) -> Shapes:
        """Shape of each condition of one sample, for captions of so many tokens."""

    def prompted(self, tokenizer: Any, caption: str) -> str:  # noqa: ARG002
        """What a tokenizer is given for a caption."""
        return caption

    def token_lengths(self, tokenizers: Sequence[Any]) -> list[int]:
        """How many tokens of a caption each text encoder takes."""
        return [tokenizer.model_max_length for tokenizer in tokenizers]

    def caption_length(self, config: Config) -> int:
        """How many tokens of a caption the denoiser is told, by the config of the first text encoder."""
        found = config.get("max_position_embeddings")
        return found if isinstance(found, int) else self.usual_tokens

    def token_shape(self, length: int) -> tuple[int, ...]:
        """Shape of the tokens of a caption, (L,), or (N, L) where there are N text encoders."""
        return (length,) if len(self.encoders) == 1 else (len(self.encoders), length)

    def tokens(self, encodings: Sequence[Encoding]) -> Tensor:
        """The tokens of a caption from what each tokenizer makes of it; see `token_shape`."""
        import torch

        return torch.tensor([one.ids for one in encodings]).squeeze(0)

    @abstractmethod
    def embedded(self, encoders: Sequence[nn.Module], input_ids: Tensor) -> Told:
        """What B captions give, from their tokens; see `token_shape`."""

    def embeds_empty(self, pipeline: DiffusionPipeline) -> bool:  # noqa: ARG002
        """Whether guidance embeds the empty prompt where there is no caption; else it tells zeros."""
        return True

    def without_caption(self, pipeline: DiffusionPipeline, empty: Told) -> Told:
        """What guidance tells it where there is no caption, given empty prompts as `embedded` has them."""
        if self.embeds_empty(pipeline):
            return empty
        return {name: value.new_zeros(value.shape) for name, value in empty.items()}

    def of_frame(self, frame: Frame) -> Told:  # noqa: ARG002
        """What it is told of a picture, of one sample."""
        return {}

    def attend(self, denoiser: nn.Module, *, plainly: bool) -> None:  # noqa: B027 - there need not be a choice
        """Let attentions compute by matrix products, or as diffusers has them."""

    def feature(self, module: nn.Module, output: Any, latents: Tensor, *, captions: bool = False) -> Tensor:  # noqa: ARG002
        """What is matched of what a module of its denoiser gives.

        Arguments:
            module: The module.
            output: What it gives.
            latents: What the denoiser was asked about, (B, C, h, w).
            captions: Whether what becomes of the caption's tokens is matched too.
        """
        return first(output)

    def scaled(self, vae: Any, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of the latents that the denoiser works on, from that of its VAE's."""
        factor = vae.config.scaling_factor
        return mean * factor, std * factor

    def unscaled(self, vae: Any, latents: Tensor) -> Tensor:
        """What its VAE decodes, from the latents that the denoiser works on."""
        found: Tensor = latents / vae.config.scaling_factor
        return found

    def for_vae(self, vae: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:  # noqa: ARG002
        """What its VAE decodes, from the latents that a pipeline gives of pictures of this size in pixels."""
        return self.unscaled(vae, latents)

    def set_steps(self, scheduler: Any, steps: int, sides: tuple[int, int]) -> None:  # noqa: ARG002
        """Let a scheduler visit as many steps as its pipelines do, for latents of this height and width."""
        scheduler.set_timesteps(steps)

    def call(self, guidance: float, negative: Sequence[str] | None) -> dict[str, Any]:
        """How a pipeline is told of guidance, and of what to keep away from."""
        return {"guidance_scale": guidance, "negative_prompt": negative}

    def reading(self, tokens: int) -> dict[str, Any]:  # noqa: ARG002
        """How a pipeline is told to read so many tokens of a prompt; U-Nets' know from their tokenizers."""
        return {}

    def prompt(self, told: Told, negative: bool = False) -> dict[str, Any]:
        """How a pipeline is told of captions that are embedded already, or of what guidance leads away from."""
        names = {"context": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
        return {f"{'negative_' * negative}{name}": told[key] for key, name in names.items() if key in told}

    def taught_guidance(self, config: Config) -> bool:  # noqa: ARG002
        """Whether a denoiser with this config is told of guidance, and needs no second call for it."""
        return False

    def guides(self, pipeline: Config, config: Config) -> bool:  # noqa: ARG002
        """Whether a pipeline with this config, around a denoiser with that, calls it a second time for guidance."""
        return not self.taught_guidance(config)

    def second_call(self, pipeline: Config, config: Config, guidance: float) -> float:
        r"""The g of $\epsilon_\emptyset + g\,(\epsilon_c - \epsilon_\emptyset)$ in such a pipeline, by its scale."""
        guides = self.guides(pipeline, config) and guidance > self.unguided
        return 1.0 + guidance - self.unguided if guides else 1.0

    def sparing(
        self,
        denoiser: Denoiser,  # noqa: ARG002
        scheduler: SchedulerMixin,  # noqa: ARG002
        spared: Spared,
    ) -> AbstractContextManager[object]:
        """The denoiser in a pipeline that calls it with less work inside a `with` block; then it is as it was.

        Arguments:
            denoiser: Called with both halves of guidance at once, where there is any.
            scheduler: Whose timesteps it is called with.
            spared: What it leaves out; its steps are calls here.
        """
        assert spared == NOTHING, self.name
        return nullcontext()

    def pools_keys(self, config: Config) -> bool:  # noqa: ARG002
        """Whether the outermost stage of a denoiser with this config has self-attentions, whose keys can be pooled."""
        return False

    def noise_schedule(self, scheduler: SchedulerMixin, timesteps: Timesteps = "even") -> ForwardProcess:
        """The forward process, its timesteps and its target; `InputError` where they cannot be learnt by."""
        if timesteps != "even":
            raise InputError(f"timesteps is {timesteps}, which is for flow matching; {self.name} has even alone")
        return NoiseSchedule.from_scheduler(scheduler)

    @abstractmethod
    def answer(self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        """The denoiser's output (B, C, h, w) for latents (B, C, h, w), timesteps (B,) and what it is told."""

    # How do other runtimes take it?

    @abstractmethod
    def graph(self, denoiser: Any, latents: Tensor, encoders: Sequence[Any]) -> Graph:
        """The denoiser, of which the example has these latents (B, C, h, w), beside its text encoders."""

    def text_graphs(self, encoders: Sequence[Any], batch_size: int) -> list[Graph]:
        """The text encoders, in their order."""
        from bksdm.families.graph import text_graph

        pairs = zip(encoders, self.text_outputs, strict=True)
        return [text_graph(network, outputs, batch_size) for network, outputs in pairs]

    @abstractmethod
    def latents_a_side(self, config: Config) -> int:
        """Of how many latents the sides of a picture are multiples, for a denoiser with this config."""

    def told_to_decode(self, vae: Any) -> dict[str, Any]:  # noqa: ARG002
        """What readers look for in the config of the decoder besides that of its VAE."""
        return {}

    def tokenizer_for_readers(self, tokenizer: Any) -> Any:
        """A tokenizer of its pipeline as readers of an export take it."""
        return tokenizer

    # Where does it lie in a single file?

    @abstractmethod
    def layout(self, config: Config) -> Layout:
        """Of a file with a denoiser of this config."""

    @abstractmethod
    def layout_of(self, shapes: FileShapes) -> Layout | None:
        """Of a file with these tensors, if they are of this kind, if of any; None where they are of another."""

    @abstractmethod
    def is_whole(self, config: Config) -> bool:
        """Whether a denoiser, whose config follows from a file, is one that was published whole."""

    # What do others make for it?

    def original_paths(self, paths: Iterable[str]) -> dict[str, str]:  # noqa: ARG002
        """What the layers of a whole denoiser at these paths are called in original checkpoints, if anything."""
        return {}

    def original_tensors(self, names: Collection[str]) -> dict[str, Joined]:  # noqa: ARG002
        """The tensors of a denoiser by their names in original checkpoints of it alone, if there are such."""
        return {}

    def joined(self, paths: Collection[str]) -> dict[str, Joined]:  # noqa: ARG002
        """Layers of original checkpoints that are none of a denoiser's as they are, by their names there."""
        return {}

    def depths(self, config: Config) -> dict[str, int]:  # noqa: ARG002
        """How many blocks each stack has, by its path; nothing where the denoiser is no stacks of blocks."""
        return {}

    def stage_residuals(self, config: Config) -> dict[str, int]:  # noqa: ARG002
        """Channels of the residuals that a T2I-Adapter gives, in order, by the paths of the modules that take them."""
        return {}

    # What is it made of?

    def network_class(self, name: str) -> Any:
        """The class of one of its networks."""
        import diffusers

        kind = self.networks[name]
        found = getattr(diffusers, kind, None)
        if found is None:
            import transformers

            found = getattr(transformers, kind)
        return found

    def build(self, config: Config, name: str | None = None) -> Any:
        """A network with this config, without weights of any worth: the one of this name, or the denoiser."""
        kind = self.network_class(name or self.denoiser)
        if hasattr(kind, "from_config"):  # one of diffusers
            return kind.from_config(dict(config))
        return kind(kind.config_class(**{key: value for key, value in config.items() if not key.startswith("_")}))

    def outline(self, config: Config, name: str | None = None) -> Any:
        """The same on the meta device: its shapes alone, and no random numbers are drawn for it."""
        from bksdm.families.weightless import without_weights

        with without_weights():
            return self.build(config, name)

    @abstractmethod
    def assembled(self, parts: Mapping[str, Any], like: Mapping[str, Any], kind: str) -> DiffusionPipeline:
        """A pipeline of parts.

        Arguments:
            parts: By their names; None for those that it goes without.
            like: The config of a pipeline whose settings it takes over; empty for the usual ones.
            kind: Its class: `pipeline`, `from_image` or `under_mask`.
        """
