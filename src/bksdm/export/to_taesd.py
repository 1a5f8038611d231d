"""A small decoder as one file with the names of TAESD (github.com/madebyollin/taesd), as ComfyUI's Load VAE reads it.

TAESD counts its layers from a clamp, tanh(x / 3) 3, which diffusers' `AutoencoderTiny` has outside of them: layer N
there is layer N + 1 here.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from bksdm.export.formats import Format, Source
from bksdm.export.parity import TorchNetworks
from bksdm.families.weightless import without_weights
from bksdm.models.decoder import SmallDecoder, with_autoencoder
from bksdm.runtime.networks import Networks

_SCALE, _SHIFT = "vae_scale", "vae_shift"  # what the VAE's latents are multiplied by and moved for the decoder


def write(source: Source, file: Path) -> None:
    """The decoder alone, with the factor by which it takes the latents of the model's VAE."""
    dtype = torch.float16 if source.precision == "fp16" else torch.float32
    small = _decoder(source)
    tensors = {_renamed(key): value.to(dtype).contiguous() for key, value in small.decoder.state_dict().items()}
    tensors |= {_SCALE: torch.tensor(small.factor), _SHIFT: torch.tensor(0.0)}
    save_file(tensors, file, metadata={"format": "pt"})


def why_not(source: Source) -> str | None:
    """Why readers of TAESD's files would not take a decoder; None where they do."""
    with without_weights():
        known = AutoencoderTiny(latent_channels=source.pipeline.vae.config.latent_channels)  # TAESD, by its defaults
    if repr(_decoder(source).decoder) == repr(known.decoder):
        return None
    return (
        "readers have TAESD's layers in their source, 64 channels, 3 blocks a size and 8 pixels a latent, and its "
        "small decoder has others; where the model's VAE has 8, train one by bksdm decoder --channels 64 --blocks 3"
    )


def _decoder(source: Source) -> SmallDecoder:
    small = source.pipeline.vae.decoder
    assert isinstance(small, SmallDecoder), "the format needs one"
    return small


def _renamed(key: str) -> str:
    """TAESD's name of a tensor of `AutoencoderTiny.decoder`."""
    _, number, rest = key.split(".", 2)
    return f"taesd_decoder.{int(number) + 1}.{rest}"


def _open(file: Path, source: Source) -> Networks:
    """The model with the decoder that was written."""
    tensors, own = load_file(file), source.pipeline.vae.config
    small = AutoencoderTiny(
        latent_channels=own.latent_channels, scaling_factor=own.scaling_factor / float(tensors[_SCALE])
    )
    small.decoder.load_state_dict({key: tensors[_renamed(key)].float() for key in small.decoder.state_dict()})
    return TorchNetworks(with_autoencoder(source.pipeline, small.eval()))


FORMAT = Format(
    name="taesd",
    precisions=("fp32", "fp16"),
    packages={},
    write=write,
    networks=_open,
    suffix=".safetensors",
    has_scheduler=False,
    needs_decoder=True,
    told=("context",),
    why_not=why_not,
    least_psnr={"fp16": 30.0},
    memory=1.0,
    unets_alone="no small decoder is trained here for these models",
)
