"""Core ML: model packages with the names, shapes and types of Apple's Swift runtime (apple/ml-stable-diffusion).

Apple's own converter has a U-Net of its own, which always has a middle block and two layers a stage. Here diffusers'
networks are converted as they are. Embeddings come as (B, D, 1, L), a timestep for every sample of the batch, outputs
are float32. 6bit and 4bit put every weight matrix into a palette of 64 or 16 values, chosen by k-means.

Packages are compiled on a Mac, by the script beside them. Elsewhere the comparison with torch is made by `mil`.
"""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bksdm.common.progress import bar
from bksdm.common.runs import write_text
from bksdm.export import components as parts
from bksdm.export.components import Component, components
from bksdm.export.formats import Format, Source
from bksdm.export.mil import Program, quiet_coremltools
from bksdm.export.split_einsum import split_attention
from bksdm.export.swift import RESOURCES, guide, script
from bksdm.models.folders import save_vocabulary
from bksdm.runtime.networks import Array, Networks, Tokens, Told

NAMES = {
    parts.TEXT_ENCODER: "TextEncoder",
    parts.UNET: "Unet",
    parts.DECODER: "VAEDecoder",
    parts.ENCODER: "VAEEncoder",
}
_BITS = {"6bit": 6, "4bit": 4}
_FEWEST = 512  # values of a weight that is worth a palette of 64


@dataclass(frozen=True)
class Package:
    """A network as Swift takes it.

    Attributes:
        name: Of the package.
        module: Takes the inputs in their order.
        inputs: Examples by name.
        outputs: Names.
        traced: Whether it is traced; coremltools lacks what torch.export makes of a text encoder's mask.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    traced: bool = False


class _UNet(nn.Module):
    """Takes embeddings as (B, D, 1, L)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        (predicted,) = self.module(sample, timestep, encoder_hidden_states.squeeze(2).transpose(1, 2))
        return predicted  # type: ignore[no-any-return]


class _TextEncoder(nn.Module):
    """Takes tokens as numbers with a point."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(input_ids.long())  # type: ignore[no-any-return]


def packages(source: Source) -> list[Package]:
    """What Swift loads, with examples of the source's sizes; the U-Net's batch is both halves of the guidance."""
    one, whole, double = (
        components(source.pipeline, source.height, source.width, batch_size)
        for batch_size in (1, source.batch_size, 2 * source.batch_size)
    )
    text, unet = one[parts.TEXT_ENCODER], double[parts.UNET]
    decoder, encoder = whole[parts.DECODER], whole[parts.ENCODER]
    sample, embedded = unet.inputs["sample"], unet.inputs["encoder_hidden_states"]
    given = {
        "sample": sample,
        "timestep": torch.zeros(len(sample)),
        "encoder_hidden_states": embedded.transpose(1, 2).unsqueeze(2).contiguous(),
    }
    tokens = {"input_ids": text.inputs["input_ids"].float()}
    outputs = ("last_hidden_state", "pooled_outputs")
    return [
        Package(NAMES[parts.TEXT_ENCODER], _TextEncoder(text.module), tokens, outputs, traced=True),
        Package(NAMES[parts.UNET], _UNet(unet.module), given, ("noise_pred",)),
        Package(NAMES[parts.DECODER], decoder.module, {"z": _only(decoder)}, ("image",)),
        Package(NAMES[parts.ENCODER], encoder.module, {"x": _only(encoder)}, ("latent",)),
    ]


def write(source: Source, folder: Path) -> None:
    """Packages, vocabulary, the script that compiles and the page that says how."""
    made = packages(source)
    splits = source.attention == "split_einsum"
    with bar(len(made), "networks") as progress, split_attention(source.pipeline.unet) if splits else nullcontext():
        for package in made:
            model = convert(package, half=source.precision != "fp32")
            if source.precision in _BITS:
                model = palettize(model, _BITS[source.precision])
            with quiet_coremltools():
                model.save(str(folder / f"{package.name}.mlpackage"))
            progress.advance()
    (folder / RESOURCES).mkdir()
    save_vocabulary(source.pipeline.tokenizer.backend_tokenizer, folder / RESOURCES)
    write_text(folder / "compile.sh", script([package.name for package in made]))
    (folder / "compile.sh").chmod(0o755)
    write_text(folder / "README.md", guide(source))


def convert(package: Package, half: bool) -> Any:
    """A coremltools model for iOS 16 and macOS 13 on.

    Arguments:
        package: What to convert.
        half: Whether it computes in half precision; tokens and outputs stay in float32.
    """
    with quiet_coremltools() as ct:
        given = np.float16 if half and not package.traced else np.float32
        precision = ct.precision.FLOAT16 if half else ct.precision.FLOAT32
        return ct.convert(
            _program(package),
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS16,
            skip_model_load=True,
            inputs=[ct.TensorType(name, example.shape, given) for name, example in package.inputs.items()],
            outputs=[ct.TensorType(name, dtype=np.float32) for name in package.outputs],
            compute_precision=precision,
        )


def palettize(model: Any, bits: int) -> Any:
    """The model with palettes of 2^bits values for its weights; embedding tables stay as they are."""
    with quiet_coremltools():
        from coremltools.optimize.coreml import (  # noqa: PLC0415
            OpPalettizerConfig,
            OptimizationConfig,
            palettize_weights,
        )

        each = OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=_FEWEST)
        config = OptimizationConfig(global_config=each, op_type_configs={"gather": None})
        return palettize_weights(model, config)


@torch.no_grad()
def _program(package: Package) -> Any:
    examples = tuple(package.inputs.values())
    package.module.eval()
    if package.traced:
        return torch.jit.trace(package.module, examples)  # type: ignore[no-untyped-call]
    return torch.export.export(package.module, examples).run_decompositions({})


def _only(component: Component) -> Tensor:
    (example,) = component.inputs.values()
    return example


class _Model(Protocol):
    """A package that is open: shapes of its inputs, and outputs by name of inputs by name."""

    inputs: dict[str, tuple[int, ...]]

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class _Apple:
    """A package computed by Core ML itself, on a Mac."""

    def __init__(self, package: Path) -> None:
        with quiet_coremltools() as ct:
            self._model = ct.models.MLModel(str(package))
        described = self._model.get_spec().description.input
        self.inputs = {each.name: tuple(each.type.multiArrayType.shape) for each in described}

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self._model.predict({name: tensor.float().numpy() for name, tensor in given.items()})
        return {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in found.items()}


class CoreMLNetworks:
    """The packages in a folder, by Core ML on a Mac and by `mil` elsewhere.

    Shapes are fixed: a batch is computed in parts of the size that a package takes, the last one filled up.
    """

    def __init__(self, folder: Path) -> None:
        opened = _Apple if sys.platform == "darwin" else Program
        self._models: dict[str, _Model] = {part: opened(folder / f"{name}.mlpackage") for part, name in NAMES.items()}

    def encode(self, tokens: Tokens) -> Told:
        return {"context": self._run(parts.TEXT_ENCODER, "last_hidden_state", {"input_ids": tokens})}

    def predict(self, latents: Array, timestep: float, told: Told) -> Array:
        steps, context = np.full(len(latents), timestep, np.float32), told["context"]
        given = {"sample": latents, "timestep": steps, "encoder_hidden_states": context.transpose(0, 2, 1)[:, :, None]}
        return self._run(parts.UNET, "noise_pred", given)

    def decode(self, latents: Array) -> Array:
        return self._run(parts.DECODER, "image", {"z": latents})

    def moments(self, pixels: Array) -> Array:
        return self._run(parts.ENCODER, "latent", {"x": pixels})

    def _run(self, part: str, output: str, given: Mapping[str, Any]) -> Array:
        model = self._models[part]
        size = next(iter(model.inputs.values()))[0]
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array, np.float32)) for name, array in given.items()}
        total = len(next(iter(tensors.values())))
        found = []
        for start in range(0, total, size):
            rows = [min(start + row, total - 1) for row in range(size)]
            found.append(model({name: tensor[rows] for name, tensor in tensors.items()})[output])
        return np.asarray(torch.cat(found)[:total].numpy())


def _open(folder: Path, source: Source) -> Networks:  # noqa: ARG001 formats open by both
    return CoreMLNetworks(folder)


def _why_not(source: Source) -> str | None:
    channels = source.pipeline.unet.config.in_channels, source.pipeline.vae.config.latent_channels
    if channels[0] != channels[1]:
        return f"its U-Net takes {channels[0]} channels, and Apple's runtime gives it {channels[1]}; use --to onnx"
    if channels[1] != 4:
        return f"its latents have {channels[1]} channels, and Apple's runtime has 4; use --to onnx"
    return None


FORMAT = Format(
    name="coreml",
    precisions=("fp16", "fp32", "6bit", "4bit"),
    packages={"coremltools": "coremltools"},
    write=write,
    networks=_open,
    fixed_size=True,
    pools_keys=True,
    has_scheduler=False,
    told=("context",),
    why_not=_why_not,
    least_psnr={"fp16": 30.0, "6bit": 25.0},
    memory=3.0,
    unets_alone="Apple's Swift runtime, for which Core ML is written here, draws none of these models",
)
