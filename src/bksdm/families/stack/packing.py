"""Latents as the tokens of transformers: squares of 2 by 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def patchified(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) with the four of every 2 by 2 square as channels: (B, 4 C, h / 2, w / 2)."""
    b, c, h, w = latents.shape
    squares = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return squares.reshape(b, 4 * c, h // 2, w // 2)


def unpatchified(latents: Tensor) -> Tensor:
    """Undo `patchified`."""
    b, c, h, w = latents.shape
    squares = latents.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
    return squares.reshape(b, c // 4, 2 * h, 2 * w)


def as_tokens(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C)."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `as_tokens` for latents of this height and width."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def positions(latents: Tensor, axes: int) -> Tensor:
    """Row and column of every token of latents (B, C, h, w), in the second and third of `axes` numbers: (h w, axes)."""
    import torch

    height, width = latents.shape[2:]
    places = latents.new_zeros(height, width, axes)
    places[..., 1] = torch.arange(height, device=latents.device)[:, None]
    places[..., 2] = torch.arange(width, device=latents.device)
    return places.flatten(0, 1)
