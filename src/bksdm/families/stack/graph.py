"""Transformers that take tokens, and language models that read captions, for other runtimes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bksdm.families.graph import Axis, Graph

TOKENS = 6  # of captions in examples: a number that no other dimension has
_PICTURE, _CAPTION = {0: Axis("batch"), 1: Axis("picture_tokens")}, {0: Axis("batch"), 1: Axis("caption_tokens")}
_AXES = {"hidden_states": _PICTURE, "encoder_hidden_states": _CAPTION}
_IDS = {"img_ids": _PICTURE, "txt_ids": _CAPTION}


class TokenDenoiser(nn.Module):
    """A transformer of diffusers, called with the inputs of these names in their order."""

    def __init__(self, network: nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.transformer = network
        self.inputs = inputs

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        output = self.transformer(**dict(zip(self.inputs, given, strict=True)), return_dict=False)
        return (output[0],)


def token_graph(network: nn.Module, inputs: Mapping[str, Tensor]) -> Graph:
    """A transformer that is called with these inputs by name; positions may be of all samples, or of each."""
    axes = {name: _AXES.get(name, {0: Axis("batch")}) for name in inputs}
    for name, each in _IDS.items():
        axes[name] = each if inputs[name].ndim == 3 else {0: each[1]}
    return Graph(TokenDenoiser(network, tuple(inputs)), inputs, ("out_sample",), axes)


class CaptionReader(nn.Module):
    """Tokens (B, L) and which of them count (B, L) to hidden states of a causal language model, each (B, L, D).

    The mask of its attention is made here, in the form that transformers takes as it is: what transformers makes of
    one itself is no graph.
    """

    def __init__(self, network: Any, layers: Mapping[str, int]) -> None:
        super().__init__()
        self.model = network
        self.layers = layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        seen = (places[None, :] <= places[:, None])[None, None] & (attention_mask != 0)[:, None, None, :]
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        given = {"attention_mask": mask, "output_hidden_states": True, "use_cache": False}
        found = self.model(input_ids=input_ids, **given).hidden_states
        return tuple(found[layer] for layer in self.layers.values())


def reader_graph(network: Any, layers: Mapping[str, int], batch_size: int) -> Graph:
    """A language model that gives the hidden states of layers, by the names of the outputs."""
    axes = {0: Axis("batch"), 1: Axis("tokens")}
    ids = torch.zeros(batch_size, TOKENS, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Graph(CaptionReader(network, layers), inputs, tuple(layers), dict.fromkeys(inputs, axes))
