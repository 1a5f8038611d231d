"""The networks of a pipeline as other runtimes take them: tensors in, tensors out, by name.

Folders, inputs and outputs have the names that optimum's ONNX and OpenVINO pipelines gave them, which other tools look
for. A dimension that may vary has a name; sides of latents that the U-Net halves are multiples of a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

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
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, Axis]]
    config: str

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
    """Tokens (B, L) to embeddings (B, L, D) and the pooled ones (B, D).

    The network has the name that LoRAs call it by, for runtimes that find layers by what nodes of a graph are called.
    """

    def __init__(self, network: CLIPTextModel) -> None:
        super().__init__()
        self.text_model = network

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        found = self.text_model(input_ids)
        return found.last_hidden_state, found.pooler_output


class UNet(nn.Module):
    """Noisy latents (B, C, h, w), a timestep (1,) and embeddings (B, L, D) to what the U-Net predicts (B, C, h, w)."""

    def __init__(self, network: UNet2DConditionModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        return (self.network(sample, timestep, encoder_hidden_states, return_dict=False)[0],)


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
    unet, vae, text = pipeline.unet, pipeline.vae, pipeline.text_encoder
    factor = pipeline.vae_scale_factor
    halvings = 2 ** (len(unet.config.block_out_channels) - 1)
    tokens = torch.zeros(batch_size, text.config.max_position_embeddings, dtype=torch.int64)
    latents = torch.zeros(batch_size, unet.config.in_channels, height // factor, width // factor)
    embedded = torch.zeros(*tokens.shape, text.config.hidden_size)
    pixels = torch.zeros(batch_size, 3, height, width)
    batch = {0: Axis("batch")}
    sides = batch | {2: Axis("height", halvings), 3: Axis("width", halvings)}
    decoded = latents[:, : vae.config.latent_channels]
    made = (
        Component(
            TEXT_ENCODER,
            TextEncoder(text),
            {"input_ids": tokens},
            ("last_hidden_state", "pooler_output"),
            {"input_ids": batch},
            text.config.to_json_string(),
        ),
        Component(
            UNET,
            UNet(unet),
            {"sample": latents, "timestep": torch.zeros(1), "encoder_hidden_states": embedded},
            ("out_sample",),
            {"sample": sides, "timestep": {}, "encoder_hidden_states": batch},
            unet.to_json_string(),
        ),
        Component(
            DECODER,
            Decoder(vae),
            {"latent_sample": decoded},
            ("sample",),
            {"latent_sample": batch | {2: Axis("height"), 3: Axis("width")}},
            vae.to_json_string(),
        ),
        Component(
            ENCODER,
            Encoder(vae),
            {"sample": pixels},
            ("latent_parameters",),
            {"sample": batch | {2: Axis("height", factor), 3: Axis("width", factor)}},
            vae.to_json_string(),
        ),
    )
    return {component.name: component for component in made}
