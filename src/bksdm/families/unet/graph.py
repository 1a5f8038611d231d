"""A U-Net for other runtimes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bksdm.families.family import Family
from bksdm.families.graph import Axis, Graph
from bksdm.runtime.asks import INPUTS


class Denoiser(nn.Module):
    """Noisy latents (B, C, h, w), a timestep (1,) and what it is told to what the U-Net predicts (B, C, h, w)."""

    network: Any

    def __init__(self, network: nn.Module, family: Family, told: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.family, self.told = family, told

    def forward(self, sample: Tensor, timestep: Tensor, *told: Tensor) -> tuple[Tensor]:
        return (self.family.answer(self.network, sample, timestep, dict(zip(self.told, told, strict=True))),)


class KeepingDenoiser(Denoiser):
    """The same, and what its outermost stage gets on the way up, with shape (B, D, h, w)."""

    def forward(self, sample: Tensor, timestep: Tensor, *told: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        deep: list[Tensor] = []

        def seen(module: nn.Module, given: Any, named: Any) -> None:  # noqa: ARG001
            deep.append(named["hidden_states"])

        hook = self.network.up_blocks[-1].register_forward_pre_hook(seen, with_kwargs=True)
        try:
            return (*super().forward(sample, timestep, *told), *deep)
        finally:
            hook.remove()


def unet_graph(network: Any, family: Family, latents: Tensor, tokens: int) -> Graph:
    """A U-Net, of which the example has these latents (B, C, h, w) and captions of so many tokens."""
    halvings = 2 ** (len(network.config.block_out_channels) - 1)
    shapes = family.condition_shapes(network.config, tokens)
    told = {INPUTS.get(name, name): torch.zeros(len(latents), *shape) for name, shape in shapes.items()}
    sides = {0: Axis("batch"), 2: Axis("height", halvings), 3: Axis("width", halvings)}
    has_inside = len(network.down_blocks) > 1 or network.mid_block is not None
    return Graph(
        Denoiser(network, family, tuple(shapes)),
        {"sample": latents, "timestep": torch.zeros(1), **told},
        ("out_sample",),
        {"sample": sides, "timestep": {}, **{name: {0: Axis("batch")} for name in told}},
        KeepingDenoiser(network, family, tuple(shapes)) if has_inside else None,
    )
