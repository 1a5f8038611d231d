"""The networks of a pipeline as other runtimes take them.

Folders have the names that optimum's ONNX and OpenVINO pipelines gave them, which other tools look for.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from bksdm.families import family_of_pipeline
from bksdm.families.family import Family
from bksdm.families.graph import Axis, Graph
from bksdm.models.pipelines import denoiser, pixels_a_side, text_encoders

TEXT_ENCODER, UNET, DECODER, ENCODER = "text_encoder", "unet", "vae_decoder", "vae_encoder"


@dataclass(frozen=True, kw_only=True)
class Component(Graph):
    """A network to export.

    Attributes:
        name: Of its folder.
        config: What its config.json holds.
        denoises: Whether it is the network that is made smaller.
        upcast: Whether its arithmetic stays in float32 in half precision, where it would overflow.
    """

    name: str
    config: str
    denoises: bool = False
    upcast: bool = False

    @classmethod
    def of(cls, name: str, graph: Graph, config: str, *, denoises: bool = False, upcast: bool = False) -> "Component":
        """The network of a graph."""
        return cls(**vars(graph), name=name, config=config, denoises=denoises, upcast=upcast)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())


def multiple(pipeline: DiffusionPipeline) -> int:
    """Of which sides in pixels are multiples, so that the denoiser halves them evenly or makes tokens of them."""
    return pixels_a_side(pipeline) * family_of_pipeline(pipeline).latents_a_side(denoiser(pipeline).config)


def least_side(pipeline: DiffusionPipeline) -> int:
    """The side in pixels that examples with open sides have at least: a side of one latent would stay one.

    It is also enough, and tracing a network that computes is quicker and takes less memory the smaller its example.
    """
    return 2 * multiple(pipeline)


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
        batch_size: Of the examples; the denoiser's, with guidance, is twice the number of pictures.
    """
    family, vae = family_of_pipeline(pipeline), pipeline.vae
    upcast = family.upcasts_vae and bool(vae.config.force_upcast)
    decoder, encoder = _halves(pipeline, height, width, batch_size)
    made = (
        *_encoders(pipeline, family, batch_size),
        _denoiser(pipeline, family, height, width, batch_size),
        Component.of(DECODER, decoder, _with(vae.to_json_string(), family.told_to_decode(vae)), upcast=upcast),
        Component.of(ENCODER, encoder, vae.to_json_string(), upcast=upcast),
    )
    return {component.name: component for component in made}


def _halves(pipeline: DiffusionPipeline, height: int, width: int, batch_size: int) -> tuple[Graph, Graph]:
    """Decoder and encoder of the VAE."""
    vae, factor, batch = pipeline.vae, pipeline.vae_scale_factor, {0: Axis("batch")}
    latents = torch.zeros(batch_size, vae.config.latent_channels, height // factor, width // factor)
    pixels = torch.zeros(batch_size, 3, height, width)
    open_latents = {"latent_sample": batch | {2: Axis("height"), 3: Axis("width")}}
    open_pixels = {"sample": batch | {2: Axis("height", factor), 3: Axis("width", factor)}}
    return (
        Graph(Decoder(vae), {"latent_sample": latents}, ("sample",), open_latents),
        Graph(Encoder(vae), {"sample": pixels}, ("latent_parameters",), open_pixels),
    )


def _encoders(pipeline: DiffusionPipeline, family: Family, batch_size: int) -> Iterator[Component]:
    networks = text_encoders(pipeline)
    for name, network, graph in zip(family.encoders, networks, family.text_graphs(networks, batch_size), strict=True):
        yield Component.of(name, graph, network.config.to_json_string())


def _denoiser(pipeline: DiffusionPipeline, family: Family, height: int, width: int, batch_size: int) -> Component:
    network, factor = denoiser(pipeline), pixels_a_side(pipeline)
    channels = family.latent_channels(network.config)
    latents = torch.zeros(batch_size, channels, height // factor, width // factor)
    graph = family.graph(network, latents, text_encoders(pipeline))
    return Component.of(family.denoiser, graph, network.to_json_string(), denoises=True)


def _with(config: str, more: Mapping[str, Any]) -> str:
    """A config in JSON, with more entries."""
    return json.dumps(json.loads(config) | more, indent=2, sort_keys=True) + "\n" if more else config
