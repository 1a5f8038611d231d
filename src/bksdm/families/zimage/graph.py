"""Z-Image's transformer for other runtimes: rectangular tensors in the place of lists, real numbers of complex ones.

diffusers fills up picture and caption to multiples of 32 tokens with tokens that were learnt, and captions of a batch
to the longest, of which no attention sees the rest. Which of its tokens a caption has, and where each token of both
lies, are inputs here, as in optimum's OpenVINO pipelines:

- `encoder_attention_mask` (B, M): 0 for a caption's own tokens, the least number for what fills it up;
- `txt_ids` (B, M, 3): first 1, 2, ... for tokens up to a multiple of 32, and zeros for what no attention sees;
- `img_ids` (B, N, 3): first the number of those tokens and one, then row and column, and zeros for what fills it up.

The output is what the network itself gives: how far the picture is, which pipelines turn around.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bksdm.families.graph import Axis, Graph

_TOKENS = 32  # whose multiples diffusers fills up to
_PATCH = 2
_ENDS = f"{_PATCH}-1"  # of the layers for patches of this side, in one frame


class _RealRotations:
    """The attention of Z-Image, told cosines and sines with shape (B, L, 2, D / 2) in the place of complex numbers."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, attention_mask: Tensor | None, freqs_cis: Tensor, **_: object
    ) -> Tensor:
        each = [part(hidden_states).unflatten(-1, (attn.heads, -1)) for part in (attn.to_q, attn.to_k, attn.to_v)]
        norms = [norm or nn.Identity() for norm in (attn.norm_q, attn.norm_k)]
        query, key = (_rotated(norm(value), freqs_cis) for norm, value in zip(norms, each[:2], strict=True))
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        q, k, v = (value.transpose(1, 2) for value in (query, key, each[2]))
        found: Tensor = attn.to_out[0](scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return found


def _rotated(states: Tensor, turns: Tensor) -> Tensor:
    """States (B, L, H, D), of which every two numbers are turned by an angle."""
    cosine, sine = turns[:, :, None, 0], turns[:, :, None, 1]
    first, second = states[..., ::2], states[..., 1::2]
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(3)


class RectangularZImage(nn.Module):
    """Latents (B, C, h, w), timesteps (B,) and captions (B, M, D) to (B, C, h, w); see above for the other inputs."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.transformer = network
        rope = network.rope_embedder
        for axis, table in enumerate(rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)):
            self.register_buffer(f"turns_{axis}", torch.stack([table.real, table.imag], dim=1), persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        txt_ids: Tensor,
        img_ids: Tensor,
    ) -> tuple[Tensor]:
        network, count = self.transformer, hidden_states.shape[2] * hidden_states.shape[3] // _PATCH**2
        time = network.t_embedder(timestep * network.t_scale)
        picture = self._filled_up(network.all_x_embedder[_ENDS](_patches(hidden_states)), img_ids.shape[1])
        own = (encoder_attention_mask >= 0).unsqueeze(-1)
        caption = torch.where(own, network.cap_embedder(encoder_hidden_states), network.cap_pad_token)
        hidden = _hidden(txt_ids[..., 0] == 0)
        turns = [self._turns(ids) for ids in (img_ids, txt_ids)]
        with _real_rotations(network):
            for block in network.noise_refiner:
                picture = block(picture, None, turns[0], time)
            for block in network.context_refiner:
                caption = block(caption, hidden, turns[1])
            both = torch.cat([picture, caption], dim=1)
            mask = torch.cat([torch.zeros_like(picture[..., 0]), hidden], dim=1)
            for block in network.layers:
                both = block(both, mask, torch.cat(turns, dim=1), time)
        patches = network.all_final_layer[_ENDS](both, c=time)[:, :count]
        return (_from_patches(patches, hidden_states),)

    def _filled_up(self, picture: Tensor, length: int) -> Tensor:
        """A picture's tokens (B, n, D), and behind them as many learnt ones as make (B, L, D)."""
        filling = self.transformer.x_pad_token.expand(picture.shape[0], length, -1)
        return torch.cat([picture, filling[:, picture.shape[1] :]], dim=1)

    def _turns(self, ids: Tensor) -> Tensor:
        """Cosines and sines with shape (B, L, 2, D / 2) of places (B, L, 3)."""
        tables = (self.get_buffer(f"turns_{axis}") for axis in range(ids.shape[-1]))
        return torch.cat([table[ids[..., axis].long()] for axis, table in enumerate(tables)], dim=-1)


def _hidden(where: Tensor) -> Tensor:
    """What is added to attention: the least number where it is not to look, and 0 elsewhere."""
    none = torch.zeros(where.shape, device=where.device)
    return none.masked_fill(where, torch.finfo(none.dtype).min)


def _patches(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w / 4, 4 C), in which channels come last."""
    b, c, h, w = latents.shape
    squares = latents.view(b, c, h // _PATCH, _PATCH, w // _PATCH, _PATCH).permute(0, 2, 4, 3, 5, 1)
    return squares.reshape(b, h * w // _PATCH**2, _PATCH**2 * c)


def _from_patches(patches: Tensor, like: Tensor) -> Tensor:
    """Undo `_patches`, for latents of this shape."""
    b, c, h, w = like.shape
    squares = patches.reshape(b, h // _PATCH, w // _PATCH, _PATCH, _PATCH, c).permute(0, 5, 1, 3, 2, 4)
    return squares.reshape(b, c, h, w)


@contextmanager
def _real_rotations(network: nn.Module) -> Iterator[None]:
    attentions: list[Any] = [part for part in network.modules() if hasattr(part, "processor")]
    before = [attention.processor for attention in attentions]
    try:
        for attention in attentions:
            attention.processor = _RealRotations()
        yield
    finally:
        for attention, processor in zip(attentions, before, strict=True):
            attention.processor = processor


def zimage_graph(network: Any, latents: Tensor) -> Graph:
    """Z-Image's transformer, of which the example has these latents (B, C, h, w)."""
    count = len(latents)
    caption, picture = (torch.ones(count, _TOKENS, 3, dtype=torch.int32) for _ in range(2))
    inputs = {
        "hidden_states": latents,
        "timestep": torch.zeros(count),
        "encoder_hidden_states": torch.zeros(count, 2 * _TOKENS, network.config.cap_feat_dim),
        "encoder_attention_mask": torch.zeros(count, 2 * _TOKENS),
        "txt_ids": caption.repeat(1, 2, 1),
        "img_ids": picture,
    }
    batch = {0: Axis("batch")}
    open_caption, open_picture = batch | {1: Axis("caption_tokens")}, batch | {1: Axis("picture_tokens")}
    axes = {
        "hidden_states": batch | {2: Axis("height", _PATCH), 3: Axis("width", _PATCH)},
        "timestep": batch,
        "encoder_hidden_states": open_caption,
        "encoder_attention_mask": open_caption,
        "txt_ids": open_caption,
        "img_ids": open_picture,
    }
    return Graph(RectangularZImage(network), inputs, ("sample",), axes)
