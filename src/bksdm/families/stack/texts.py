"""Captions as chat models are given them, of whose tokens some pad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Encoding
    from torch import Tensor, nn


def chat(tokenizer: Any, caption: str, *, thinks: bool) -> str:
    """A caption as what a person says to a chat model, up to where that would answer."""
    said = [{"role": "user", "content": caption}]
    text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=thinks)
    return text


def marked(encoding: Encoding) -> Tensor:
    """Tokens with shape (L,), of which those that pad are below zero: n is -1 - n there."""
    import torch

    ids, counts = torch.tensor(encoding.ids), torch.tensor(encoding.attention_mask)
    return torch.where(counts == 1, ids, ~ids)


def has_no_data(tensor: Tensor) -> bool:
    """Whether it has a shape alone: what is foreseen with such is foreseen for captions of full length."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


def hidden_states(encoder: nn.Module, tokens: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of tokens (B, L) as `marked` has them, what every layer gives, and which do not pad."""
    mask = tokens >= 0
    ids = tokens.where(mask, ~tokens)
    found = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return found.hidden_states, mask
