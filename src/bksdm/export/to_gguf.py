"""GGUF: one file of 8-bit or 4-bit weights for stable-diffusion.cpp, which needs no Python.

It knows the U-Nets of Stable Diffusion 1.x by the names of their tensors, and has the widths of all networks in its
source: whole ones, and BK-SDM's tiny. Others it takes for one of these and ends, so they are refused here.
https://github.com/leejet/stable-diffusion.cpp
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from bksdm.export import sd_cpp
from bksdm.export.formats import Format, Source
from bksdm.export.parity import Parity, TorchNetworks, compare, draw
from bksdm.families import derive, family_of_pipeline
from bksdm.pruning.describe import WHOLE

_GGML = {"q8_0": "q8_0", "q4_0": "q4_0", "fp16": "f16"}
_PROMPT = "a"  # one token in every vocabulary of CLIP's
_SIDE, _STEPS, _GUIDANCE, _SEED = 64, 4, 2.5, 0
# Widths, what the layers of the down stages consist of, and the middle block.
_WHOLE = (320, 640, 1280, 1280), (("RA", "RA"),) * 3 + (("R", "R"),), ("RAR",)
_TINY = (320, 640, 1280), (("RA",),) * 3, ()
_UNET: Mapping[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "transformer_layers_per_block": 1,
    "norm_num_groups": 32,
    "act_fn": "silu",
}
_TEXT_ENCODER: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
}
_VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_SCHEDULER: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}


def why_not(source: Source) -> str | None:
    """What stable-diffusion.cpp could not hold; None where it can hold everything."""
    return next(_objections(source.pipeline), None)


def _objections(pipeline: DiffusionPipeline) -> Iterator[str]:
    yield from _unlike("text encoder", pipeline.text_encoder.config.to_dict(), _TEXT_ENCODER)
    if type(pipeline.vae).__name__ != "AutoencoderKL":
        yield f"its decoder is a {type(pipeline.vae).__name__}, not an AutoencoderKL; leave out --decoder"
    yield from _unlike("VAE", pipeline.vae.config, _VAE)
    yield from _unlike("U-Net", pipeline.unet.config, _UNET)
    yield from _unlike("scheduler", pipeline.scheduler.config, _SCHEDULER)
    network = derive(WHOLE, pipeline.unet.config)
    widths, layers = (tuple(map(of, network.down)) for of in (lambda stage: stage.channels, lambda stage: stage.kinds))
    middle = network.mid.kinds if network.mid else ()
    if (widths, layers, middle) in (_WHOLE, _TINY) and [stage.kinds[1:] for stage in network.up] == [*layers]:
        return
    yield (
        f"its U-Net has {len(layers)} stages with {', '.join(str(len(kinds)) for kinds in layers)} layers and "
        f"{'a' if middle else 'no'} middle block, and stable-diffusion.cpp knows that of Stable Diffusion 1.x "
        f"and the recipe tiny alone: it takes base for the whole U-Net and small for tiny, and crashes; prune with "
        f"--recipe tiny, or export to onnx, openvino or executorch"
    )


def _unlike(network: str, config: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """The entries of a config that are not what stable-diffusion.cpp has in its source."""
    for key, value in known.items():
        own = config.get(key, value)
        if (tuple(own) if isinstance(own, list) else own) != value:
            yield (
                f"its {network} has {key} {own}, and stable-diffusion.cpp has {value} in its source, for it knows "
                f"Stable Diffusion 1.x; export to onnx, openvino or executorch"
            )


def write(source: Source, file: Path) -> None:
    """The whole pipeline in one file."""
    folder = file.with_suffix(".weights")  # a name that the next run finds, where a kill left something
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        write_weights(source.pipeline, folder)
        sd_cpp.convert(folder, file, _GGML[source.precision])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_weights(pipeline: DiffusionPipeline, folder: Path) -> None:
    """The weights of a diffusers folder, and no more, under the names that stable-diffusion.cpp looks for."""
    networks: tuple[tuple[str, str, nn.Module], ...] = (
        ("unet", "diffusion_pytorch_model.safetensors", pipeline.unet),
        ("vae", "diffusion_pytorch_model.safetensors", pipeline.vae),
        ("text_encoder", "model.safetensors", pipeline.text_encoder),
    )
    for name, file, network in networks:
        tensors = {key: _half(tensor).contiguous() for key, tensor in network.state_dict().items()}
        if name == "text_encoder":
            tensors = _text_model(tensors)
        (folder / name).mkdir()
        save_file(tensors, folder / name / file, metadata={"format": "pt"})


def _half(tensor: Tensor) -> Tensor:
    """Kernels in half precision, which stable-diffusion.cpp computes them in: their rows are too short for its blocks
    of fewer bits, so that they stay as they are given."""
    return tensor.half() if tensor.dim() == 4 else tensor


def _text_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the prefix that transformers 5 leaves out of the names."""
    prefix = "text_model."
    return {key if key.startswith(prefix) else prefix + key: tensor for key, tensor in tensors.items()}


def check(file: Path, source: Source) -> Parity:
    """Let stable-diffusion.cpp make a small picture from the file, and torch the same one.

    Noise, Euler steps and guidance are the same; stable-diffusion.cpp computes convolutions in half precision.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        sd_cpp.draw(
            file,
            picture,
            prompt=_PROMPT,
            width=_SIDE,
            height=_SIDE,
            cfg_scale=_GUIDANCE,
            seed=_SEED,
            sample_steps=_STEPS,
            sample_method="euler",
            scheduler="discrete",
        )
        ours = np.asarray(Image.open(picture).convert("RGB"))[None]
    return compare(ours, torch_picture(source.pipeline))


def torch_picture(pipeline: DiffusionPipeline) -> NDArray[np.uint8]:
    """What torch makes in the place of stable-diffusion.cpp, 8-bit with shape (1, 64, 64, 3)."""
    scheduler = EulerDiscreteScheduler(**_SCHEDULER, timestep_spacing="linspace")
    parts = pipeline.components | {"scheduler": scheduler}
    family = family_of_pipeline(pipeline)
    euler = family.assembled(parts, {}, family.pipeline)
    latents = torch.randn(1, 4, _SIDE // 8, _SIDE // 8, generator=torch.Generator().manual_seed(_SEED))
    return draw(euler, TorchNetworks(euler), latents.numpy(), _STEPS, prompt=_PROMPT)


FORMAT = Format(
    name="gguf",
    precisions=tuple(_GGML),
    packages={sd_cpp.PACKAGE: "stable-diffusion-cpp-python"},
    write=write,
    check=check,
    suffix=".gguf",
    has_scheduler=False,
    told=("context",),
    why_not=why_not,
    least_psnr={"fp16": 30.0, "q8_0": 25.0},
    scratch=4.0,
    unets_alone="stable-diffusion.cpp makes GGUF of these models itself, from the file that --to transformer writes",
)
