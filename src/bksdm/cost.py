"""What a U-Net costs: parameters and multiply-accumulates, from its config alone.

The U-Net is built and run on the meta device, where tensors have shapes and no data. Two
conventions are in use for the multiply-accumulates (MACs): `modules` counts convolutions and
linear layers, as the paper and common counters do; `all` adds the two matrix products of each
attention.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from bksdm.errors import InputError

TOKENS = 77  # of a caption, in Stable Diffusion


@dataclass(frozen=True)
class UNetCost:
    """Cost of one forward pass at batch 1.

    Attributes:
        params: Parameters.
        macs_modules: MACs of convolutions and linear layers.
        macs_attention: MACs of the matrix products inside attention.
        latent_size: Side of the latents; their height, where they are not square.
    """

    params: int
    macs_modules: int
    macs_attention: int
    latent_size: int

    @property
    def gmacs_modules(self) -> float:
        return self.macs_modules / 1e9

    @property
    def gmacs_all(self) -> float:
        return (self.macs_modules + self.macs_attention) / 1e9


def unet_cost(
    config: Mapping[str, Any], latent_size: int | None = None, tokens: int = TOKENS, latent_width: int | None = None
) -> UNetCost:
    """Cost of the U-Net with this config.

    Arguments:
        config: A `UNet2DConditionModel` config.
        latent_size: Side of the latents; the config's `sample_size` by default (64 for 512 px).
        tokens: Length of the text context.
        latent_width: Width of the latents, where they are not square.

    Raises:
        InputError: The config is not one of a U-Net that runs.
    """
    size = latent_size or config.get("sample_size")
    if not isinstance(size, int):
        raise InputError(
            f"sample_size is {size!r} in the config of the U-Net; write the side of the latents, such as 64"
        )
    return _cost(json.dumps(dict(config), sort_keys=True, default=str), size, latent_width or size, tokens)


@lru_cache(maxsize=64)
def _cost(config: str, size: int, latent_width: int, tokens: int) -> UNetCost:
    """The cost by the config's JSON: the same teacher is asked about again and again."""
    try:
        with torch.device("meta"), torch.no_grad():
            unet = UNet2DConditionModel.from_config(json.loads(config))
            counter = _MacCounter(unet)
            widths = unet.config.cross_attention_dim
            width = widths if isinstance(widths, int) else widths[0]
            latents = torch.empty(1, unet.config.in_channels, size, latent_width)
            unet(latents, torch.empty(1, dtype=torch.long), torch.empty(1, tokens, width))
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the config of the U-Net does not make a network that runs ({reason}); mend it") from error
    params = sum(p.numel() for p in unet.parameters())
    return UNetCost(params, counter.modules, counter.attention, size)


class _MacCounter:
    def __init__(self, model: nn.Module) -> None:
        self.modules = 0
        self.attention = 0
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(self._convolution)
            elif isinstance(module, nn.Linear):
                module.register_forward_hook(self._linear)
            elif isinstance(module, Attention):
                module.register_forward_hook(self._attention, with_kwargs=True)

    def _convolution(self, module: nn.Conv2d, args: Any, output: Tensor) -> None:  # noqa: ARG002
        height, width = module.kernel_size
        self.modules += output.numel() * module.in_channels // module.groups * height * width

    def _linear(self, module: nn.Linear, args: Any, output: Tensor) -> None:  # noqa: ARG002
        self.modules += output.numel() * module.in_features

    def _attention(self, module: Attention, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> None:  # noqa: ARG002
        queries = args[0] if args else kwargs["hidden_states"]
        context = kwargs.get("encoder_hidden_states")
        keys = queries if context is None else context
        self.attention += 2 * queries.shape[0] * queries.shape[1] * keys.shape[1] * module.inner_dim
