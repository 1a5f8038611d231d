"""A small decoder in TAESD's layout: its names, its shapes, and what it decodes, computed from the layout alone."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from bksdm.common.errors import InputError
from bksdm.export.run import export
from bksdm.models.decoder import fresh_autoencoder
from bksdm.models.pipelines import load_pipeline, save_pipeline
from bksdm.options.export import ExportOptions
from tiny_models import TWO_STAGES, build_pipeline

WIDTH, LATENT = 64, 4
# A layer's number -> channels that it takes and gives, of the three kinds; a clamp is layer 0, and activations and
# upsampling have numbers too.
BIASED = {1: (LATENT, WIDTH), 19: (WIDTH, 3)}
UNBIASED = dict.fromkeys((7, 12, 17), (WIDTH, WIDTH))
BLOCKS = (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose VAE makes eight pixels of a latent, and has a scaling factor of its own."""
    pipeline = build_pipeline(TWO_STAGES)
    pipeline.vae = AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=16,
        scaling_factor=0.5,
    ).eval()
    folder = tmp_path_factory.mktemp("taesd")
    save_pipeline(StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False), folder / "model")
    return folder / "model"


def decoder(model: Path, out: Path, channels: int = WIDTH, blocks: int = 3) -> str:
    """An untrained one."""
    vae = load_pipeline(model, with_denoiser=False).vae
    fresh_autoencoder(vae.config, channels, blocks, seed=0).save_pretrained(out)
    return str(out)


def written(model: Path, tmp_path: Path, precision: str | None = None) -> tuple[dict[str, Tensor], AutoencoderTiny]:
    small, file = decoder(model, tmp_path / "small"), tmp_path / "taesd.safetensors"
    made = export(ExportOptions(str(model), "taesd", str(file), precision=precision, decoder=small))
    assert made.parity is not None
    assert made.parity.largest <= 2
    return load_file(file), AutoencoderTiny.from_pretrained(small)


def test_names_and_shapes_are_taesds(model: Path, tmp_path: Path) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in written(model, tmp_path)[0].items()}
    wanted: dict[str, tuple[int, ...]] = {"vae_scale": (), "vae_shift": ()}
    for number, (takes, gives) in (BIASED | UNBIASED).items():
        wanted[f"taesd_decoder.{number}.weight"] = (gives, takes, 3, 3)
        if number in BIASED:
            wanted[f"taesd_decoder.{number}.bias"] = (gives,)
    for number in BLOCKS:
        for part in (0, 2, 4):
            wanted[f"taesd_decoder.{number}.conv.{part}.weight"] = (WIDTH, WIDTH, 3, 3)
            wanted[f"taesd_decoder.{number}.conv.{part}.bias"] = (WIDTH,)
    assert found == wanted


def taesd(tensors: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Pixels in [-1, 1] of a VAE's latents, as TAESD's decoder is described."""

    def convolved(layer: str, x: Tensor) -> Tensor:
        layer = f"taesd_decoder.{layer}"
        return F.conv2d(x, tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias"), padding=1)

    x = torch.tanh((latents - tensors["vae_shift"]) * tensors["vae_scale"] / 3) * 3
    for number in range(1, 20):
        if number in BLOCKS:
            inner = x
            for part in (0, 2, 4):
                inner = convolved(f"{number}.conv.{part}", F.relu(inner) if part else inner)
            x = F.relu(inner + x)
        elif number in UNBIASED:
            x = convolved(str(number), F.interpolate(x, scale_factor=2))
        elif number in BIASED:
            x = convolved(str(number), x)
        elif number == 2:
            x = F.relu(x)
    return 2 * x - 1


@torch.no_grad()
def test_the_file_decodes_what_the_decoder_does(model: Path, tmp_path: Path) -> None:
    tensors, small = written(model, tmp_path)
    latents = torch.randn(2, LATENT, 4, 6, generator=torch.Generator().manual_seed(0))
    pixels = taesd(tensors, latents)
    assert pixels.shape == (2, 3, 32, 48)
    torch.testing.assert_close(pixels, small.decode(0.5 * latents).sample, rtol=1e-5, atol=1e-5)


def test_half_precision_is_half_the_size(model: Path, tmp_path: Path) -> None:
    tensors, _ = written(model, tmp_path, "fp16")
    assert {tensor.dtype for name, tensor in tensors.items() if name.startswith("taesd")} == {torch.float16}


@pytest.mark.parametrize(("channels", "blocks"), [(32, 3), (64, 2)])
def test_other_widths_and_depths_are_refused(model: Path, tmp_path: Path, channels: int, blocks: int) -> None:
    small = decoder(model, tmp_path / "small", channels, blocks)
    with pytest.raises(InputError, match=r"to taesd: readers have TAESD's layers .* --channels 64 --blocks 3"):
        export(ExportOptions(str(model), "taesd", str(tmp_path / "x.safetensors"), decoder=small))
    assert not list(tmp_path.glob("*.safetensors"))


def test_without_a_decoder_there_is_nothing_to_write(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="taesd holds a small decoder alone; give it by --decoder"):
        export(ExportOptions(str(model), "taesd", str(tmp_path / "x.safetensors")))
