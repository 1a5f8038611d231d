"""Networks of torch as OpenVINO's models."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def to_openvino(network: nn.Module, inputs: Sequence[Tensor], **settings: Any) -> Any:
    """An `openvino.Model` in float32.

    It is traced once; torch would trace it a second time to compare, which our own comparisons make needless.

    Arguments:
        network: In eval mode; takes tensors and returns a tuple of them.
        inputs: An example.
        settings: More of `openvino.convert_model`'s.

    Raises:
        openvino.frontend.OpConversionFailure: OpenVINO does not know an operation of it.
    """
    import openvino  # noqa: PLC0415
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # noqa: PLC0415

    example = tuple(inputs)
    with torch.no_grad():
        traced = TorchScriptPythonDecoder(network, example_input=example, trace_kwargs={"check_trace": False})
    return openvino.convert_model(traced, example_input=example, **settings)
