"""Attention as the Neural Engine likes it: heads one by one, channels in the second dimension, 1 x 1 convolutions.

The same sums as softmax(q k^T / sqrt(d)) v, with tensors (B, C, 1, L) that are never turned: Apple's
SPLIT_EINSUM ("Deploying Transformers on the Apple Neural Engine", machinelearning.apple.com, 2022).
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class SplitEinsum:
    """A diffusers attention processor for the self- and cross-attentions of a U-Net's transformer blocks."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attended states (B, Q, C) of states (B, Q, C) and, for cross-attention, embeddings (B, K, D)."""
        assert attention_mask is None
        states = _channels_second(hidden_states)
        context = states if encoder_hidden_states is None else _channels_second(encoder_hidden_states)
        query, key, value = (
            _convolve(layer, given)
            for layer, given in ((attn.to_q, states), (attn.to_k, context), (attn.to_v, context))
        )
        heads = zip(
            query.chunk(attn.heads, 1),
            key.transpose(1, 3).chunk(attn.heads, 3),
            value.chunk(attn.heads, 1),
            strict=True,
        )
        attended = torch.cat([_attend(*head, attn.scale) for head in heads], dim=1)
        return _convolve(attn.to_out[0], attended).squeeze(2).transpose(1, 2)


@contextlib.contextmanager
def split_attention(unet: UNet2DConditionModel) -> Iterator[None]:
    """A U-Net has this attention within the block, and its own after it."""
    own = dict(unet.attn_processors)
    unet.set_attn_processor(SplitEinsum())
    try:
        yield
    finally:
        unet.set_attn_processor(own)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One head: query (B, d, 1, Q), key (B, K, 1, d), value (B, d, 1, K) to (B, d, 1, Q)."""
    weights = (torch.einsum("bchq,bkhc->bkhq", query, key) * scale).softmax(dim=1)
    return torch.einsum("bkhq,bchk->bchq", weights, value)


def _channels_second(states: Tensor) -> Tensor:
    """(B, L, C) to (B, C, 1, L)."""
    return states.transpose(1, 2).unsqueeze(2)


def _convolve(layer: nn.Linear, states: Tensor) -> Tensor:
    return F.conv2d(states, layer.weight[:, :, None, None], layer.bias)
