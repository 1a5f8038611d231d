"""The networks of a pipeline as other runtimes take them: tensors in, tensors out, by name.

Folders, inputs and outputs have the names that optimum's ONNX and OpenVINO pipelines gave them, which other tools look
for. A dimension that may vary has a name; sides of latents that the U-Net halves are multiples of a number.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from bksdm.families import family_of_pipeline
from bksdm.families.family import Family
from bksdm.models.pipelines import text_encoders
from bksdm.runtime.conditions import INPUTS

TEXT_ENCODER, UNET, DECODER, ENCODER = "text_encoder", "unet", "vae_decoder", "vae_encoder"


@dataclass(frozen=True)
class Axis:
    """A dimension that may vary: its name, and the number that it is a multiple of."""

    name: str
    multiple: int = 1


@dataclass(frozen=True)
class Component:
    """A network to export.

    Attributes:
        name: Of its folder.
        module: Takes the inputs in their order and returns the outputs as a tuple.
        inputs: Example tensors by name.
        outputs: Names.
        axes: Of each input, the dimensions that may vary.
        config: What its config.json holds.
        denoises: Whether it is the network that is made smaller.
        upcast: Whether its arithmetic stays in float32 in half precision, where it would overflow.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, Axis]]
    config: str
    denoises: bool = False
    upcast: bool = False

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())


def least_side(pipeline: DiffusionPipeline) -> int:
    """The side in pixels that examples with open sides have at least: a side of one latent would stay one.

    It is also enough, and tracing a network that computes is quicker and takes less memory the smaller its example.
    """
    halvings = len(pipeline.unet.config.block_out_channels) - 1
    return int(2 * pipeline.vae_scale_factor * 2**halvings)


class TextEncoder(nn.Module):
    """Tokens (B, L) to the outputs that are asked for, such as embeddings (B, L, D) and pooled ones (B, D).

    The network has the name that LoRAs call it by, for runtimes that find layers by what nodes of a graph are called.
    """

    def __init__(self, network: Any, outputs: Sequence[str]) -> None:
        super().__init__()
        self.text_model = network
        self.asked = outputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Their names, each layer's for hidden states."""
        layers = range(self.text_model.config.num_hidden_layers + 1)
        each = {"hidden_states": [f"hidden_states.{layer}" for layer in layers]}
        return tuple(name for asked in self.asked for name in each.get(asked, [asked]))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        hidden = {"output_hidden_states": True} if "hidden_states" in self.asked else {}
        found = self.text_model(input_ids, **hidden)
        each = [found[name] for name in self.asked]
        return tuple(value for one in each for value in (one if isinstance(one, tuple) else [one]))


class Denoiser(nn.Module):
    """Noisy latents (B, C, h, w), a timestep (1,) and what it is told to what the U-Net predicts (B, C, h, w)."""

    def __init__(self, network: nn.Module, family: Family, told: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.family, self.told = family, told

    def forward(self, sample: Tensor, timestep: Tensor, *told: Tensor) -> tuple[Tensor]:
        return (self.family.answer(self.network, sample, timestep, dict(zip(self.told, told, strict=True))),)


class Decoder(nn.Module):
    """Latents (B, C, h, w), divided by the scaling factor, to pixels (B, 3, H, W) in about [-1, 1]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.before = vae.post_quant_conv or nn.Identity()
        self.network = vae.decoder

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        return (self.network(self.before(latent_sample)),)


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [-1, 1] to mean and log-variance of the latents, (B, 2 C, h, w)."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.network = vae.encoder
        self.after = vae.quant_conv or nn.Identity()

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        return (self.after(self.network(sample)),)


def components(pipeline: DiffusionPipeline, height: int, width: int, batch_size: int = 2) -> dict[str, Component]:
    """The networks of a pipeline by name, with examples for pictures of this size.

    Arguments:
        pipeline: On the CPU, in float32 and in eval mode.
        height, width: In pixels.
        batch_size: Of the examples; the U-Net's, with guidance, is twice the number of pictures.
    """
    family, vae, batch = family_of_pipeline(pipeline), pipeline.vae, {0: Axis("batch")}
    factor, upcast = pipeline.vae_scale_factor, family.upcasts_vae and bool(pipeline.vae.config.force_upcast)
    latents = torch.zeros(batch_size, pipeline.unet.config.in_channels, height // factor, width // factor)
    made = (
        *_encoders(pipeline, family, batch_size),
        _denoiser(pipeline, family, latents),
        Component(
            DECODER,
            Decoder(vae),
            {"latent_sample": latents[:, : vae.config.latent_channels]},
            ("sample",),
            {"latent_sample": batch | {2: Axis("height"), 3: Axis("width")}},
            vae.to_json_string(),
            upcast=upcast,
        ),
        Component(
            ENCODER,
            Encoder(vae),
            {"sample": torch.zeros(batch_size, 3, height, width)},
            ("latent_parameters",),
            {"sample": batch | {2: Axis("height", factor), 3: Axis("width", factor)}},
            vae.to_json_string(),
            upcast=upcast,
        ),
    )
    return {component.name: component for component in made}


def _encoders(pipeline: DiffusionPipeline, family: Family, batch_size: int) -> Iterator[Component]:
    for name, network, asked in zip(family.encoders, text_encoders(pipeline), family.text_outputs, strict=True):
        tokens = torch.zeros(batch_size, network.config.max_position_embeddings, dtype=torch.int64)
        module, axes = TextEncoder(network, asked), {"input_ids": {0: Axis("batch")}}
        yield Component(name, module, {"input_ids": tokens}, module.outputs, axes, network.config.to_json_string())


def _denoiser(pipeline: DiffusionPipeline, family: Family, latents: Tensor) -> Component:
    network = pipeline.unet
    halvings = 2 ** (len(network.config.block_out_channels) - 1)
    shapes = family.condition_shapes(network.config, text_encoders(pipeline)[0].config.max_position_embeddings)
    told = {INPUTS.get(name, name): torch.zeros(len(latents), *shape) for name, shape in shapes.items()}
    sides = {0: Axis("batch"), 2: Axis("height", halvings), 3: Axis("width", halvings)}
    return Component(
        UNET,
        Denoiser(network, family, tuple(shapes)),
        {"sample": latents, "timestep": torch.zeros(1), **told},
        ("out_sample",),
        {"sample": sides, "timestep": {}, **{name: {0: Axis("batch")} for name in told}},
        network.to_json_string(),
        denoises=True,
    )
