"""Networks of an ONNX folder, computed by onnxruntime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm.common.errors import InputError
from bksdm.runtime.folder_networks import FolderNetworks, Input, Network
from bksdm.runtime.networks import Part

_FORMATS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
_ERRORS_ONLY = 3


def part_file(file: Path, part: Part) -> Path:
    """The graph of a part of a network, which shares the weights that lie beside the whole graph `file`."""
    return file if part == "whole" else file.with_name(f"{file.name}.{part}")


class OnnxNetworks(FolderNetworks):
    """Each network is a `model.onnx`, with its weights in it or beside it."""

    file = "model.onnx"

    def __init__(self, folder: Path, *, threads: int | None = None, low_memory: bool = False) -> None:
        """Take the networks of `folder`; none is loaded yet.

        Arguments:
            folder: With a folder for each network.
            threads: Of the CPU; all by default.
            low_memory: Whether a network leaves the memory when another is loaded.

        Raises:
            InputError: onnxruntime is missing.
        """
        super().__init__(folder, low_memory=low_memory)
        try:
            import onnxruntime  # noqa: PLC0415
        except ImportError as error:
            raise InputError("ONNX folders need onnxruntime; pip install onnxruntime") from error
        self._runtime: Any = onnxruntime
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = _ERRORS_ONLY
        # Weights kept in 8 bits are made floats once, when the network is loaded, and not in every step.
        self._options.add_session_config_entry("session.disable_quant_qdq", "1")
        if threads is not None:
            self._options.intra_op_num_threads = threads
        # What an operator asked for once need not stay for good; pictures of another size ask for other amounts.
        self._options.enable_cpu_mem_arena = not low_memory

    def is_parted(self, file: Path) -> bool:
        return part_file(file, "outer").is_file()

    def load(self, file: Path, part: Part = "whole") -> Network:
        graph = part_file(file, part)
        try:
            session = self._runtime.InferenceSession(graph, self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's kinds of error have no base of their own
            first = str(error).splitlines()[0]
            raise InputError(f"{graph} cannot be loaded ({first}); export the model again") from error
        return _Session(session)


class _Session(Network):
    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = {
            given.name: Input(
                np.dtype(_FORMATS[given.type]), tuple(size if isinstance(size, int) else None for size in given.shape)
            )
            for given in session.get_inputs()
        }

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = self._session.run(list(outputs), dict(inputs))
        return found
