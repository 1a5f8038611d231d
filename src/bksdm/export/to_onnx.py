"""ONNX: graphs for onnxruntime and whatever else reads them, with batch, height and width left open.

Weights lie beside a graph, for protobuf holds no more than 2 GB. Half precision keeps inputs and outputs in float32;
int8 is onnxruntime's dynamic quantisation of matrix products and convolutions.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from bksdm.export.components import UNET, Component, components
from bksdm.export.formats import Format, Source
from bksdm.export.layout import component_folder, write_layout
from bksdm.progress import bar
from bksdm.runtime.networks import Networks

MODEL_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"
_OPSET = 18


def write(source: Source, folder: Path) -> None:
    """The whole pipeline in `folder`, in the source's precision."""
    write_layout(source.pipeline, folder)
    networks = components(source.pipeline, source.height, source.width)
    with bar(len(networks), "networks") as progress:
        for component in networks.values():
            made = component_folder(component, folder)
            write_graph(component, made / MODEL_FILE)
            if source.precision == "fp16":
                to_half(made / MODEL_FILE)
            elif source.precision == "int8" and component.name == UNET:
                to_int8(made / MODEL_FILE)
            progress.advance()


def write_graph(component: Component, file: Path) -> None:
    """A network as a float32 graph, with its weights in a file beside it."""
    with _quiet():
        program = torch.onnx.export(
            component.module,
            tuple(component.inputs.values()),
            dynamo=True,
            opset_version=_OPSET,
            input_names=list(component.inputs),
            output_names=list(component.outputs),
            dynamic_shapes=_dimensions(component),
        )
        assert program is not None
        program.save(file, external_data=True)


def to_half(file: Path) -> None:
    """The graph in half precision, but for its inputs and outputs; it replaces the file."""
    import onnx  # noqa: PLC0415
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

    model = convert_float_to_float16(onnx.load(file), keep_io_types=True, disable_shape_infer=True)
    _save(model, file)


def to_int8(file: Path) -> None:
    """The graph with 8-bit weights, their inputs quantised as they come; it replaces the file."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415

    made = file.with_name("quantized.onnx")
    with _quiet():
        quantize_dynamic(
            file,
            made,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"DefaultTensorType": 1},
        )
    import onnx  # noqa: PLC0415

    model = onnx.load(made)
    for leftover in made.parent.glob("quantized.onnx*"):
        leftover.unlink()
    _save(model, file)


def _save(model: Any, file: Path) -> None:
    """Replace a graph and its weights."""
    import onnx  # noqa: PLC0415

    (file.parent / WEIGHTS_FILE).unlink(missing_ok=True)  # onnx would add to it
    onnx.save(model, file, save_as_external_data=True, location=WEIGHTS_FILE)


def _dimensions(component: Component) -> dict[str, dict[int, Any]]:
    """The axes as torch.export takes them; a multiple of a number is that number times a dimension."""
    named: dict[str, Any] = {}
    found: dict[str, dict[int, Any]] = {}
    for name, axes in component.axes.items():
        found[name] = {}
        for position, axis in axes.items():
            dimension = named.setdefault(axis.name, Dim(axis.name))
            found[name][position] = axis.multiple * dimension if axis.multiple > 1 else dimension
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from printing its steps, and its libraries from advice that is not for users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _open(folder: Path, source: Source) -> Networks:
    from bksdm.runtime.onnx_networks import OnnxNetworks  # noqa: PLC0415

    return OnnxNetworks(folder)


FORMAT = Format(
    name="onnx",
    summary="onnxruntime, and what else reads ONNX",
    precisions=("fp32", "fp16", "int8"),
    packages={"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime", "tokenizers": "tokenizers"},
    write=write,
    networks=_open,
    least_psnr={"fp16": 30.0},
)
