"""ONNX graphs for the web: without what only tools read, and with weights in files that static hosts take."""

from pathlib import Path
from typing import Any

import numpy as np

from bksdm.export.to_onnx import WEIGHTS_FILE, round_weights, rounded

_LEAST_OUTSIDE = 1024  # bytes; what is smaller stays in the graph


def into_pieces(file: Path, most: int, *, in_bytes: bool) -> list[Path]:
    """Write a graph anew, and its weights into files of at most `most` bytes.

    Arguments:
        file: The graph, with its weights beside it, which are replaced.
        most: Bytes of a file of weights.
        in_bytes: Whether embeddings, and what `Gemm` multiplies with, become 8-bit weights with a scale for each row.

    Returns:
        The files of weights, in order.
    """
    import onnx  # noqa: PLC0415

    model = onnx.load(file)
    (file.parent / WEIGHTS_FILE).unlink()
    graph = model.graph
    del graph.value_info[:]  # shapes of what is in between, which only tools read
    if in_bytes:
        _round_embeddings(graph)
        round_weights(graph, {node.input[1] for node in graph.node if node.op_type == "Gemm" and _by_rows(node)})
    _cut(graph, most)
    pieces = _place(graph, file, most)
    onnx.save(model, file)
    return pieces


def _by_rows(node: Any) -> bool:
    """Whether the rows of a `Gemm`'s weight are its output channels."""
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _round_embeddings(graph: Any) -> None:
    """Rows that are looked up are kept as q and a scale, and multiplied where they are looked up."""
    from onnx import TensorProto, helper  # noqa: PLC0415

    kept = {tensor.name for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Gather" and node.input[0] in kept]:
        whole, scale = rounded(graph, node.input[0])
        found = f"{node.output[0]}_rounded"
        node.input[0], made, node.output[0] = whole, node.output[0], found
        at = [*graph.node].index(node) + 1
        axis = helper.make_tensor(f"{found}_axis", TensorProto.INT64, [1], [-1])
        graph.initializer.append(axis)
        added = (
            helper.make_node("Cast", [found], [f"{found}_float"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [scale, node.input[1]], [f"{found}_scale"]),
            helper.make_node("Unsqueeze", [f"{found}_scale", axis.name], [f"{found}_scales"]),
            helper.make_node("Mul", [f"{found}_float", f"{found}_scales"], [made]),
        )
        for number, new in enumerate(added):
            graph.node.insert(at + number, new)


def _cut(graph: Any, most: int) -> None:
    """Join weights of more than `most` bytes, when the graph is loaded, of parts that have less."""
    from onnx import helper, numpy_helper  # noqa: PLC0415

    for tensor in [tensor for tensor in graph.initializer if len(tensor.raw_data) > most]:
        weight = numpy_helper.to_array(tensor)
        count = min(-(-weight.nbytes // most) + 1, len(weight))  # one more, for parts differ by a row
        parts = {f"{tensor.name}_{number}": part for number, part in enumerate(np.array_split(weight, count))}
        graph.initializer.remove(tensor)
        graph.initializer.extend(numpy_helper.from_array(part, name) for name, part in parts.items())
        graph.node.insert(0, helper.make_node("Concat", list(parts), [tensor.name], axis=0))


def _place(graph: Any, file: Path, most: int) -> list[Path]:
    """Say of every weight in which file it lies; the graph is written with them by whoever saves it."""
    from onnx.external_data_helper import set_external_data  # noqa: PLC0415

    pieces: list[Path] = []
    room = 0
    for tensor in graph.initializer:
        size = len(tensor.raw_data)
        if size < _LEAST_OUTSIDE:
            continue
        if size > room:
            pieces.append(file.with_name(f"weights.{len(pieces)}"))
            room = most
        room -= size
        set_external_data(tensor, location=pieces[-1].name)
    return pieces
