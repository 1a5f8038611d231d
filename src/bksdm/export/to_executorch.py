"""ExecuTorch: a program for each network with XNNPACK's kernels for CPUs, which Android and iOS apps run.

Shapes are fixed: the text encoder takes one prompt, the U-Net twice as many latents as there are pictures, for
guidance, and the VAE as many as there are pictures.
https://docs.pytorch.org/executorch
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from bksdm.common.progress import bar
from bksdm.common.runs import write_text
from bksdm.export.components import DECODER, ENCODER, TEXT_ENCODER, UNET, Component, components
from bksdm.export.formats import Format, Source
from bksdm.export.layout import component_folder, write_layout
from bksdm.runtime.networks import Array, Networks, Tokens, Told

MODEL_FILE, README_FILE = "model.pte", "README.md"
_README = """# Programs for ExecuTorch

Each network is a program with one method, `forward`, for the XNNPACK backend. Shapes are fixed.

{table}

1. Tokens: those of `tokenizer/`, {tokens} a prompt; embed the empty prompt and the prompt, one call each.
2. Each step: `sample` holds the latents twice, `encoder_hidden_states` the embeddings of the empty prompt and of the
   prompt; some schedulers have a `timestep` between whole ones. Guidance and the step of `scheduler/` are the app's to
   compute.
3. `latent_sample` is the latents divided by {scale}; pixels come in [-1, 1].

Android, with `org.pytorch:executorch-android` of the same release as the exporter:

```kotlin
val unet = Module.load("unet/{file}")
val out = unet.forward(EValue.from(sample), EValue.from(timestep), EValue.from(context))[0].toTensor()
```
"""


def write(source: Source, folder: Path) -> None:
    """The whole pipeline in `folder`, with a page that says how to run it."""
    write_layout(source.pipeline, folder)
    networks = fixed_components(source.pipeline, source.height, source.width, source.batch_size)
    with bar(len(networks), "networks") as progress:
        for component in networks.values():
            write_program(component, component_folder(component, folder) / MODEL_FILE)
            progress.advance()
    write_text(folder / README_FILE, _readme(source.pipeline, networks))


def fixed_components(pipeline: DiffusionPipeline, height: int, width: int, batch_size: int) -> dict[str, Component]:
    """The networks, each with examples of the batch that its program takes."""
    batches = {TEXT_ENCODER: 1, UNET: 2 * batch_size, DECODER: batch_size, ENCODER: batch_size}
    return {name: components(pipeline, height, width, batch)[name] for name, batch in batches.items()}


def write_program(component: Component, file: Path) -> None:
    """A network as a program of the shapes of its examples."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # noqa: PLC0415
    from executorch.exir import to_edge_transform_and_lower  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(component.module, tuple(component.inputs.values()))
        program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    with file.open("wb") as opened:
        program.write_to_file(opened)


def _readme(pipeline: DiffusionPipeline, networks: dict[str, Component]) -> str:
    lines = ["| program | inputs, in order | outputs |", "|---|---|---|"]
    for name, component in networks.items():
        inputs = [
            f"`{key}` {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            for key, value in component.inputs.items()
        ]
        outputs = ", ".join(f"`{output}`" for output in component.outputs)
        lines.append(f"| `{name}/{MODEL_FILE}` | {', '.join(inputs)} | {outputs} |")
    return _README.format(
        table="\n".join(lines),
        tokens=pipeline.text_encoder.config.max_position_embeddings,
        scale=pipeline.vae.config.scaling_factor,
        file=MODEL_FILE,
    )


class ExecutorchNetworks:
    """The programs of a folder by ExecuTorch's runtime; batches are cut into those that a program takes."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        """Take the programs of `folder`; each is loaded when it is first asked for.

        Arguments:
            folder: As `write` leaves it.
            batch_size: Pictures at a time that it was exported for.
        """
        self._folder, self._batch_size = folder, batch_size
        self._methods: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {}

    def encode(self, tokens: Tokens) -> Told:
        return {"context": self._run(TEXT_ENCODER, 1, tokens)}

    def predict(self, latents: Array, timestep: float, told: Told) -> Array:
        return self._run(UNET, 2 * self._batch_size, latents, told["context"], timestep=timestep)

    def decode(self, latents: Array) -> Array:
        return self._run(DECODER, self._batch_size, latents)

    def moments(self, pixels: Array) -> Array:
        return self._run(ENCODER, self._batch_size, pixels)

    def _run(self, name: str, batch: int, *arrays: Any, timestep: float | None = None) -> Array:
        method, found = self._method(name), []
        count = len(arrays[0])
        for start in range(0, count, batch):
            picked = [min(n, count - 1) for n in range(start, start + batch)]  # the last fills a batch up
            given = [torch.from_numpy(np.ascontiguousarray(array[picked])) for array in arrays]
            if timestep is not None:
                given.insert(1, torch.tensor([timestep]))
            found.append(method(given)[0].numpy().copy())
        return np.asarray(np.concatenate(found)[:count])

    def _method(self, name: str) -> Callable[[list[Tensor]], list[Tensor]]:
        from executorch.runtime import Runtime  # noqa: PLC0415

        if name not in self._methods:
            program = Runtime.get().load_program(self._folder / name / MODEL_FILE)
            self._methods[name] = program.load_method("forward").execute
        return self._methods[name]


def _open(folder: Path, source: Source) -> Networks:
    return ExecutorchNetworks(folder, source.batch_size)


FORMAT = Format(
    name="executorch",
    precisions=("fp32",),
    packages={"executorch": "executorch", "torchao": "torchao"},
    write=write,
    networks=_open,
    fixed_size=True,
    told=("context",),
    memory=4.0,
    unets_alone="its programs are written here for one text encoder and a U-Net",
)
