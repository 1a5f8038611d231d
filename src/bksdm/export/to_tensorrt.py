"""TensorRT: ONNX whose tensors say their number format, and the commands that make engines of it on an NVIDIA machine.

TensorRT 11 knows strongly typed networks only: precision is what the graph says. TensorRT 10, which Jetson Orin on
JetPack 6 has, is told so by a flag. An engine takes one size of picture, and one picture up to a batch.

Nothing of this has been run: the graphs are compared with torch under onnxruntime, the scripts are written from
NVIDIA's documentation.
"""

from collections.abc import Mapping
from pathlib import Path

from bksdm.common.runs import write_text
from bksdm.export import to_onnx
from bksdm.export.components import Component, components
from bksdm.export.formats import Format, Source

_FLAGS = {"10": " --stronglyTyped", "11": ""}


def write(source: Source, folder: Path) -> None:
    """The ONNX pipeline in `folder`, with `build_engines_trt10.sh` and `build_engines_trt11.sh`."""
    to_onnx.write_networks(source, folder)
    networks = components(source.pipeline, source.height, source.width)
    for version, flags in _FLAGS.items():
        write_text(folder / f"build_engines_trt{version}.sh", script(networks, source.batch_size, version, flags))


def script(networks: Mapping[str, Component], batch_size: int, version: str, flags: str) -> str:
    """Shell commands that make an engine of every network, for pictures of the examples' size.

    Arguments:
        networks: What was exported, by name.
        batch_size: Most pictures at a time; the U-Net's batch, with guidance, is twice that.
        version: Of TensorRT.
        flags: What this version needs besides.
    """
    lines = [
        "#!/bin/sh",
        f"# Engines for TensorRT {version}, made on the machine that will run them. Not run by those who wrote it.",
        "set -e",
        'cd "$(dirname "$0")"',
    ]
    for name, component in networks.items():
        shapes = [f"--{which}Shapes={_shapes(component, batch)}" for which, batch in _batches(name, batch_size)]
        lines.append(
            f"trtexec --onnx={name}/{to_onnx.MODEL_FILE} --saveEngine={name}/model.plan{flags} {' '.join(shapes)}"
        )
    return "\n".join([*lines, ""])


def _batches(name: str, batch_size: int) -> list[tuple[str, int]]:
    most = batch_size * (2 if name in ("unet", "text_encoder") else 1)
    return [("min", 1), ("opt", most), ("max", most)]


def _shapes(component: Component, batch: int) -> str:
    """Of the inputs with open dimensions, as trtexec takes them."""
    found = []
    for name, example in component.inputs.items():
        if component.axes[name]:
            found.append(f"{name}:{'x'.join(map(str, (batch, *example.shape[1:])))}")
    return ",".join(found)


FORMAT = Format(
    name="tensorrt",
    precisions=("fp16", "fp32"),
    packages=to_onnx.FORMAT.packages,
    write=write,
    pools_keys=True,
    networks=to_onnx.FORMAT.networks,
    told=("context",),
    fixed_size=False,
    least_psnr=to_onnx.FORMAT.least_psnr,
    unets_alone="its scripts are written here for one text encoder and a U-Net",
)
