"""A frozen network that OpenVINO computes on the CPU, where torch would at each step order its weights anew."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bksdm.models.openvino import to_openvino
from bksdm.runtime.openvino_networks import core, quiet


def openvino_is_faster(device: torch.device, precision: torch.dtype) -> bool:
    """Whether OpenVINO is here and faster than torch at a network whose weights stay: on a CPU; see docs/log.md."""
    return device.type == "cpu" and precision == torch.float32 and find_spec("openvino") is not None


class NotConverted(Exception):  # noqa: N818
    """OpenVINO does not know an operation of the network."""


class ByOpenvino:
    """A network in float32, for inputs of one shape.

    Arguments:
        network: Takes tensors and returns a tuple of tensors; nothing in it may learn.
        inputs: An example.

    Raises:
        NotConverted: OpenVINO does not know an operation of it.
    """

    def __init__(self, network: nn.Module, inputs: Sequence[Tensor]) -> None:
        import openvino  # noqa: PLC0415

        shapes = [tuple(value.shape) for value in inputs]
        try:
            with quiet():
                model = to_openvino(network, inputs, input=shapes)
        except openvino.frontend.OpConversionFailure as error:
            raise NotConverted from error
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # of several processes all threads would be pinned to the same cores
        }
        self._request = core().compile_model(model, "CPU", settings).create_infer_request()
        self._outputs = len(model.outputs)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self._request.infer([value.numpy() for value in inputs], share_inputs=True)
        found = (self._request.get_output_tensor(number) for number in range(self._outputs))
        return [torch.from_numpy(tensor.data.copy()) for tensor in found]
