"""ONNX: graphs for onnxruntime and whatever else reads them, with batch, height and width left open.

Weights lie beside a graph, for protobuf holds no more than 2 GB. Half precision keeps inputs and outputs in float32.
int8 is of the weights alone: those of matrix products in blocks of 32 by onnxruntime's quantiser, those of
convolutions by output channel. Dynamic quantisation rounds what flows through the U-Net as well, and is further from
torch on processors without 8-bit dot products (`benchmarks/onnx_quantization.py`).
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bksdm.common.progress import bar
from bksdm.export.components import Component, components, least_side
from bksdm.export.formats import Format, Source
from bksdm.export.layout import component_folder, why_not, write_layout
from bksdm.runtime.networks import DEEP, Networks
from bksdm.runtime.onnx_networks import part_file

MODEL_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"
_OPSET = 18
_BLOCK = 32
_BITS = {"int8": 8, "int4": 4}


def write(source: Source, folder: Path) -> None:
    """The whole pipeline in `folder`, in the source's precision, and its denoiser in parts."""
    write_networks(source, folder)
    for file in folder.glob(f"*/{MODEL_FILE}"):
        write_parts(file)


def write_networks(source: Source, folder: Path) -> None:
    """The whole pipeline in `folder`, in the source's precision."""
    write_layout(source.pipeline, folder)
    least = least_side(source.pipeline)
    networks = components(source.pipeline, least, least)
    with bar(len(networks), "networks") as progress:
        for component in networks.values():
            made = component_folder(component, folder)
            write_graph(component, made / MODEL_FILE)
            if source.precision == "fp16" and not component.upcast:
                to_half(made / MODEL_FILE)
            elif source.precision in _BITS:
                to_integers(made / MODEL_FILE, _BITS[source.precision])
            progress.advance()


def write_graph(component: Component, file: Path) -> None:
    """A network as a float32 graph, with its weights in a file beside it."""
    # Other ways to attend promise an order in memory that their decomposition does not keep.
    with _quiet(), sdpa_kernel(SDPBackend.MATH):
        module, kept = component.keeping or component.module, [DEEP] if component.keeping else []
        program = torch.onnx.export(
            module,
            tuple(component.inputs.values()),
            dynamo=True,
            opset_version=_OPSET,
            input_names=list(component.inputs),
            output_names=[*component.outputs, *kept],
            # Names alone: torch then finds out itself which multiples a side has, and limits no size.
            dynamic_shapes=_dynamic(component),
        )
        assert program is not None
        for _ in kept:  # a name within the graph from here on
            program.model.graph.outputs.pop()
        _forget_origins(program.model.graph)
        program.save(file, external_data=True)


def _forget_origins(graph: Any) -> None:
    """Leave out where in Python each value came from: most of a graph's bytes, and folders of this machine."""
    for part in (graph, *graph.all_nodes(), *graph.inputs, *graph.outputs, *graph.initializers.values()):
        part.metadata_props.clear()


def _dynamic(component: Component) -> tuple[Any, ...]:
    """Names of the open dimensions, of the arguments in their order."""
    shapes = [{position: axis.name for position, axis in axes.items()} for axes in component.axes.values()]
    count = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in signature(component.module.forward).parameters.values())
    return (*shapes[:count], *([tuple(shapes[count:])] if shapes[count:] else []))


def to_half(file: Path) -> None:
    """The graph in half precision, but for its inputs and outputs; it replaces the file."""
    import onnx  # noqa: PLC0415
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

    model = convert_float_to_float16(onnx.load(file), keep_io_types=True, disable_shape_infer=True)
    _save(model, file)


def to_integers(file: Path, bits: int = 8) -> None:
    """The graph with weights of 8 bits, or of 4 in matrix products; it replaces the file."""
    import onnx  # noqa: PLC0415
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: PLC0415

    quantizer = MatMulNBitsQuantizer(onnx.load(file), bits=bits, block_size=_BLOCK, is_symmetric=True)
    with _quiet():
        quantizer.process()
    model = quantizer.model.model
    _round_convolutions(model.graph)
    _save(model, file)


def _round_convolutions(graph: Any) -> None:
    """Weights of convolutions become those of 8 bits, with a scale for each output channel."""
    round_weights(graph, {node.input[1] for node in graph.node if node.op_type == "Conv"})


def round_weights(graph: Any, names: set[str]) -> None:
    """Make floats of 8-bit weights when the graph is loaded; see `rounded`. Names of other values are passed over."""
    from onnx import helper  # noqa: PLC0415

    for name in sorted(names & {tensor.name for tensor in graph.initializer}):
        graph.node.insert(0, helper.make_node("DequantizeLinear", rounded(graph, name), [name], axis=0))


def rounded(graph: Any, name: str) -> list[str]:
    """Replace a weight w by q, from -127 to 127, and by a scale for each row, w = scale q; their names are given."""
    from onnx import numpy_helper  # noqa: PLC0415

    (kept,) = (tensor for tensor in graph.initializer if tensor.name == name)
    weight = numpy_helper.to_array(kept)
    largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)))
    scale = np.where(largest > 0, largest, 1) / np.float32(127)
    whole = np.round(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
    graph.initializer.remove(kept)
    parts: dict[str, Any] = {f"{name}_rounded": whole, f"{name}_scale": scale.astype(np.float32)}
    graph.initializer.extend(numpy_helper.from_array(array, part) for part, array in parts.items())
    return list(parts)


def write_parts(file: Path) -> None:
    """Write the graphs of a network's parts beside it, which share its weights, where it has a tensor `DEEP`."""
    import onnx  # noqa: PLC0415

    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    deep = next((value for value in graph.value_info if value.name == DEEP), None)
    if deep is None:
        return
    keeping, outer = onnx.ModelProto(), onnx.ModelProto()
    keeping.CopyFrom(model)
    keeping.graph.output.append(deep)
    outer.CopyFrom(model)
    _keep(outer.graph, _needed(graph, {DEEP}))
    outer.graph.input.append(deep)
    onnx.save(keeping, part_file(file, "keeping"), format="protobuf")
    onnx.save(outer, part_file(file, "outer"), format="protobuf")


def _needed(graph: Any, known: set[str]) -> set[str]:
    """Names of the values that a graph's outputs are computed from, where some are known."""
    makers = {output: node for node in graph.node for output in node.output}
    needed: set[str] = set()
    asked = [value.name for value in graph.output]
    while asked:
        name = asked.pop()
        if name not in needed | known:
            needed.add(name)
            asked += makers[name].input if name in makers else []
    return needed


def _keep(graph: Any, needed: set[str]) -> None:
    """Leave out what gives no value of these names."""
    for parts, named in (
        (graph.node, lambda node: node.output),
        (graph.initializer, lambda tensor: [tensor.name]),
        (graph.value_info, lambda value: [value.name]),
    ):
        kept = [part for part in parts if needed & set(named(part))]
        del parts[:]
        parts.extend(kept)


def _save(model: Any, file: Path) -> None:
    """Replace a graph and its weights."""
    import onnx  # noqa: PLC0415

    (file.parent / WEIGHTS_FILE).unlink(missing_ok=True)  # onnx would add to it
    onnx.save(model, file, save_as_external_data=True, location=WEIGHTS_FILE)


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


def _open(folder: Path, source: Source) -> Networks:  # noqa: ARG001
    from bksdm.runtime.onnx_networks import OnnxNetworks  # noqa: PLC0415

    return OnnxNetworks(folder)


FORMAT = Format(
    name="onnx",
    precisions=("fp32", "fp16", "int8"),
    packages={"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime", "tokenizers": "tokenizers"},
    write=write,
    pools_keys=True,
    networks=_open,
    why_not=why_not,
    least_psnr={"fp16": 30.0, "int8": 20.0},
)
