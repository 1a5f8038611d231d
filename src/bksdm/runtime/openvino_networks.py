"""Networks of an OpenVINO folder, computed by OpenVINO on the CPU."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bksdm.common.errors import InputError, one_line
from bksdm.runtime.folder_networks import FolderNetworks, Input, Network
from bksdm.runtime.networks import DEEP, Part


@cache
def core() -> Any:
    """OpenVINO's core, one as long as the process lives.

    A core sets up the stack that signals are handled on, and on its end brings back the one that it found; which is
    gone where that was an earlier core's. The next Ctrl-C would then end the process before Python hears of it.
    """
    try:
        import openvino  # noqa: PLC0415
    except ImportError as error:
        raise InputError("OpenVINO folders need openvino; pip install openvino") from error
    return openvino.Core()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep OpenVINO and NNCF from their bars and notices, and from sending statistics, which they leave out in CI."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


class OpenvinoNetworks(FolderNetworks):
    """Each network is an `openvino_model.xml` with its weights in `openvino_model.bin`."""

    file = "openvino_model.xml"

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        low_memory: bool = False,
        precision: str | None = "f32",
        cache: Path | None = None,
    ) -> None:
        """Take the networks of `folder`; none is loaded yet.

        Arguments:
            folder: With a folder for each network.
            threads: Of the CPU; all by default.
            low_memory: Whether a network leaves the memory when another is loaded.
            precision: Of the arithmetic, "f32", "f16" or "bf16"; None for what the processor is fastest in, which
                moves pictures a little from machine to machine.
            cache: A folder that keeps what was compiled, so that the next start is quick.

        Raises:
            InputError: OpenVINO is missing.
        """
        super().__init__(folder, low_memory=low_memory)
        self._core = core()
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "CACHE_DIR": cache}
        self._settings = {name: str(value) for name, value in settings.items() if value is not None}

    def is_parted(self, file: Path) -> bool:
        return f'names="{DEEP}"'.encode() in file.read_bytes()

    def load(self, file: Path, part: Part = "whole") -> Network:
        try:
            model = self._core.read_model(str(file))
            self._take_fractions(model)
            if part != "whole":
                (deep,) = model.add_outputs(DEEP)
                model = _outer(model, deep.get_node()) if part == "outer" else model
            return _Compiled(self._core.compile_model(model, "CPU", self._settings))
        except RuntimeError as error:
            raise InputError(f"{file} cannot be loaded ({one_line(error, None)}); export the model again") from error

    def _take_fractions(self, model: Any) -> None:
        """Declare whole timesteps as numbers of any kind, which the U-Net makes of them first of all."""
        import openvino  # noqa: PLC0415

        for given in model.inputs:
            if "timestep" in given.get_names():
                given.get_node().set_element_type(openvino.Type.f32)
        model.validate_nodes_and_infer_types()


def _outer(model: Any, deep: Any) -> Any:
    """What of a model computes its first output from the tensor that the result `deep` takes, as an input of it."""
    import openvino  # noqa: PLC0415

    source = deep.input_value(0)
    given = openvino.opset1.parameter(source.get_partial_shape(), source.get_element_type())
    model.remove_result(deep)
    for taker in source.get_target_inputs():
        taker.replace_source_output(given.output(0))
    source.get_tensor().set_names(set())
    given.output(0).get_tensor().set_names({DEEP})
    return openvino.Model(model.get_results(), [*model.get_parameters(), given])


class _Compiled(Network):
    def __init__(self, model: Any) -> None:
        self._request = model.create_infer_request()
        self.inputs = {
            name: Input(
                given.get_element_type().to_dtype(),
                tuple(size.get_length() if size.is_static else None for size in given.get_partial_shape()),
            )
            for given in model.inputs
            for name in given.get_names()
        }

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        self._request.infer(dict(inputs))
        return [self._request.get_tensor(output).data.copy() for output in outputs]
