"""A network as other runtimes take it: tensors in, tensors out, by name.

Inputs and outputs have the names that optimum's ONNX and OpenVINO pipelines gave them, which other tools look for. A
dimension that may vary has a name; sides of latents that the U-Net halves are multiples of a number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Axis:
    """A dimension that may vary: its name, and the number that it is a multiple of."""

    name: str
    multiple: int = 1


@dataclass(frozen=True)
class Graph:
    """A network to be traced.

    Attributes:
        module: Takes the inputs in their order and returns the outputs as a tuple.
        inputs: Example tensors by name.
        outputs: Names.
        axes: Of each input, the dimensions that may vary.
        keeping: The same network, which gives as one more output what runtimes know as `DEEP`; None where it has none.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, Axis]]
    keeping: nn.Module | None = None


class TextEncoder(nn.Module):
    """Tokens (B, L) to the outputs that are asked for, such as embeddings (B, L, D) and pooled ones (B, D).

    The network has the name that LoRAs call it by, for runtimes that find layers by what nodes of a graph are called.
    """

    def __init__(self, network: Any, outputs: Sequence[str]) -> None:
        super().__init__()
        self.text_model = network
        self.asked = outputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Their names, each layer's for hidden states."""
        layers = range(self.text_model.config.num_hidden_layers + 1)
        each = {"hidden_states": [f"hidden_states.{layer}" for layer in layers]}
        return tuple(name for asked in self.asked for name in each.get(asked, [asked]))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        hidden = {"output_hidden_states": True} if "hidden_states" in self.asked else {}
        found = self.text_model(input_ids, **hidden)
        each = [found[name] for name in self.asked]
        return tuple(value for one in each for value in (one if isinstance(one, tuple) else [one]))


def text_graph(network: Any, outputs: Sequence[str], batch_size: int, tokens: int | None = None) -> Graph:
    """A text encoder that takes tokens alone.

    Arguments:
        network: Of transformers.
        outputs: What it is asked for.
        batch_size: Of the example.
        tokens: Of the example, where their number may vary; else it is that of the network.
    """
    module, axes = TextEncoder(network, outputs), {0: Axis("batch")} | ({1: Axis("tokens")} if tokens else {})
    ids = torch.zeros(batch_size, tokens or network.config.max_position_embeddings, dtype=torch.int64)
    return Graph(module, {"input_ids": ids}, module.outputs, {"input_ids": axes})
