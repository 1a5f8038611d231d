"""A small decoder in the place of a VAE's own.

A step of Stable Diffusion's U-Net is 338 GMACs at 512 px and its decoder 1257, so that with few steps most of the
work is decoding. An `AutoencoderTiny` (TAESD, github.com/madebyollin/taesd) decodes the same latents with far less.

The latents that a U-Net makes are the VAE's times its `scaling_factor` s. Pipelines divide by s before they decode, and
an `AutoencoderTiny` takes the U-Net's latents divided by a factor t of its own, which is 1; so what stands in for the
decoder multiplies by s / t.
"""

import copy
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from bksdm.common.assets import ART, asset
from bksdm.common.errors import InputError
from bksdm.families.recipe import Config
from bksdm.models.folders import decoder_folder
from bksdm.models.pipelines import load_network, load_pipeline, with_parts


class SmallDecoder(nn.Module):
    """Decodes as the decoder of an `AutoencoderKL` does: latents (B, C, h, w) over s to pixels (B, 3, H, W).

    Arguments:
        decoder: Takes latents times `factor`.
        factor: s / t.
    """

    def __init__(self, decoder: nn.Module, factor: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.factor = factor

    def forward(self, latents: Tensor, latent_embeds: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return cast(Tensor, self.decoder(latents * self.factor))


def load_model(
    model: str | Path, dtype: torch.dtype = torch.float32, decoder: str | Path | None = None
) -> DiffusionPipeline:
    """The pipeline that MODEL stands for (see `load_pipeline`), with a small decoder where one is named.

    Raises:
        InputError: There is no such model or decoder, or they do not fit; see `with_decoder`.
    """
    pipeline = load_pipeline(model, dtype)
    return pipeline if decoder is None else with_decoder(pipeline, decoder)


def with_decoder(pipeline: DiffusionPipeline, decoder: str | Path) -> DiffusionPipeline:
    """The same pipeline with a small decoder; everything else is shared, the encoder of image-to-image with it.

    Its `vae` is to be called; `save_pipeline` refuses it, for its config is that of the VAE whose encoder it has.

    Arguments:
        pipeline: On any device, in any number format; the decoder gets those of its VAE.
        decoder: Folder or Hub id of an `AutoencoderTiny`, or 'emoji'.

    Raises:
        InputError: There is no such decoder, or it decodes other latents than this pipeline's.
    """
    small = load_decoder(decoder)
    _check_fits(small, pipeline, decoder)
    return with_autoencoder(pipeline, small)


def with_autoencoder(pipeline: DiffusionPipeline, small: AutoencoderTiny) -> DiffusionPipeline:
    """`with_decoder` for one that is loaded already."""
    whole = pipeline.vae
    vae = copy.copy(whole)
    vae._modules = dict(whole._modules)
    factor = whole.config.scaling_factor / small.config.scaling_factor
    decoder = SmallDecoder(small.decoder, factor).to(whole.device, whole.dtype)
    vae.decoder, vae.post_quant_conv = decoder.eval().requires_grad_(False), nn.Identity()
    return with_parts(pipeline, vae=vae)


def with_own_decoder(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline with the small decoder that ships for its VAE, where one does."""
    own = load_file(asset(ART, "model", "vae", "diffusion_pytorch_model.safetensors"))
    tensors = pipeline.vae.state_dict()
    same = own.keys() == tensors.keys() and all(torch.equal(own[key].to(tensors[key]), tensors[key]) for key in own)
    return with_decoder(pipeline, ART) if same else pipeline


def load_decoder(decoder: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderTiny:
    """The `AutoencoderTiny` that a name stands for, on the CPU and in eval mode.

    Raises:
        InputError: There is none, it is incomplete or damaged, or its weights are not safetensors.
    """
    return load_network(decoder_folder(decoder), AutoencoderTiny, dtype)


def fresh_autoencoder(vae: Config, channels: int, blocks: int, seed: int) -> AutoencoderTiny:
    """An untrained `AutoencoderTiny` for the latents of the VAE with this config.

    Its encoder is there because the class has one, and is slight: a block at each size but the largest.

    Arguments:
        vae: An `AutoencoderKL` config.
        channels: Of every layer.
        blocks: Blocks of three convolutions at each size but the largest, which has one.
        seed: Of the weights.
    """
    sizes = len(vae["block_out_channels"])
    widths = (channels,) * sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderTiny(
            in_channels=vae["in_channels"],
            out_channels=vae["out_channels"],
            latent_channels=vae["latent_channels"],
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=(0, *(1,) * (sizes - 1)),
            num_decoder_blocks=(*(blocks,) * (sizes - 1), 1),
        )


def upsampling(small: AutoencoderTiny) -> int:
    """How many pixels a side of a latent becomes."""
    config = small.config
    return int(config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1))


def _check_fits(small: AutoencoderTiny, pipeline: DiffusionPipeline, decoder: str | Path) -> None:
    latent, takes = pipeline.vae.config.latent_channels, small.config.latent_channels
    if takes != latent:
        raise InputError(
            f"decoder {decoder} takes latents of {takes} channels, and this model's have {latent}; give a decoder that "
            f"was made for its VAE"
        )
    factor, makes = pipeline.vae_scale_factor, upsampling(small)
    if makes != factor:
        raise InputError(
            f"decoder {decoder} makes {makes} pixels of a latent, and this model's VAE {factor}; give a decoder that "
            f"was made for its VAE"
        )
