"""What a U-Net and parts of it cost: parameters and multiply-accumulates, from its config alone.

The U-Net is built and run on the meta device, where tensors have shapes and no data. Two
conventions are in use for the multiply-accumulates (MACs): `modules` counts convolutions and
linear layers, as the paper and common counters do; `all` adds the two matrix products of each
attention.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from bksdm.common.errors import InputError, one_line
from bksdm.families import family_claiming

TOKENS = 77  # of a caption, in Stable Diffusion


@dataclass(frozen=True)
class UNetCost:
    """Cost of one forward pass at batch 1.

    Attributes:
        params: Parameters.
        macs_modules: MACs of convolutions and linear layers.
        macs_attention: MACs of the matrix products inside attention.
        latent_size: Height and width of the latents.
    """

    params: int
    macs_modules: int
    macs_attention: int
    latent_size: tuple[int, int]

    @property
    def gmacs_modules(self) -> float:
        return self.macs_modules / 1e9

    @property
    def gmacs_all(self) -> float:
        return (self.macs_modules + self.macs_attention) / 1e9


def unet_cost(
    config: Mapping[str, Any], latent_size: int | tuple[int, int] | None = None, tokens: int = TOKENS
) -> UNetCost:
    """Cost of the U-Net with this config.

    Arguments:
        config: A `UNet2DConditionModel` config.
        latent_size: Side of the latents, or height and width; those of the config by default.
        tokens: Length of the text context.

    Raises:
        InputError: The config is not one of a U-Net that runs.
    """
    size = _size(config, latent_size)
    counts = _counted(_key(config), size, tokens)
    return UNetCost(counts.params.total(), counts.modules.total(), counts.attention.total(), size)


def parts_cost(
    config: Mapping[str, Any],
    parts: Mapping[str, Sequence[str]],
    latent_size: int | tuple[int, int] | None = None,
    tokens: int = TOKENS,
) -> dict[str, UNetCost]:
    """What parts of that U-Net cost in it.

    Arguments:
        config: As in `unet_cost`, with `latent_size` and `tokens`.
        parts: Name -> paths of the modules that make up the part.

    Raises:
        InputError: The config is not one of a U-Net that runs.
    """
    size = _size(config, latent_size)
    counts = _counted(_key(config), size, tokens)
    costs = {}
    for name, paths in parts.items():
        inside = tuple(f"{path}." for path in paths)
        params, modules, attention = (
            sum(count for path, count in counter.items() if f"{path}.".startswith(inside))
            for counter in (counts.params, counts.modules, counts.attention)
        )
        costs[name] = UNetCost(params, modules, attention, size)
    return costs


@dataclass(frozen=True)
class _Counts:
    """Parameters and MACs of the modules of a U-Net by their paths."""

    params: Counter[str]
    modules: Counter[str]
    attention: Counter[str]


def _key(config: Mapping[str, Any]) -> str:
    """The config as JSON, without what says where it is from: equal networks are counted once."""
    of_origin = ("_name_or_path", "_diffusers_version")
    return json.dumps({name: value for name, value in config.items() if name not in of_origin}, sort_keys=True)


def _size(config: Mapping[str, Any], latent_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if latent_size is None:
        return family_claiming(config).latent_sides(config)
    return latent_size if isinstance(latent_size, tuple) else (latent_size, latent_size)


@lru_cache(maxsize=32)  # a pass without data takes a second, and the same few U-Nets are asked for again and again
def _counted(config: str, size: tuple[int, int], tokens: int) -> _Counts:
    """Count in one pass of the U-Net with this config, as JSON."""
    try:
        with torch.device("meta"), torch.no_grad():
            given = json.loads(config)
            family = family_claiming(given)
            unet = family.build(given)
            counter = _MacCounter(unet)
            told = {
                name: torch.empty(1, *shape) for name, shape in family.condition_shapes(unet.config, tokens).items()
            }
            latents = torch.empty(1, family.latent_channels(unet.config), *size)
            family.answer(unet, latents, torch.empty(1, dtype=torch.long), told)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = one_line(error)
        raise InputError(f"the config of the U-Net does not make a network that runs ({reason}); mend it") from error
    params = Counter({name: parameter.numel() for name, parameter in unet.named_parameters()})
    return _Counts(params, counter.modules, counter.attention)


class _MacCounter:
    """MACs of a model's modules by their paths, of all passes from now on."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()
        for path, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(partial(self._convolution, path))
            elif isinstance(module, nn.Linear):
                module.register_forward_hook(partial(self._linear, path))
            elif isinstance(module, (Attention, AttentionModuleMixin)):
                module.register_forward_hook(partial(self._attention, path), with_kwargs=True)

    def _convolution(self, path: str, module: nn.Conv2d, args: Any, output: Tensor) -> None:  # noqa: ARG002
        height, width = module.kernel_size
        self.modules[path] += output.numel() * module.in_channels // module.groups * height * width

    def _linear(self, path: str, module: nn.Linear, args: Any, output: Tensor) -> None:  # noqa: ARG002
        self.modules[path] += output.numel() * module.in_features

    def _attention(
        self,
        path: str,
        module: Any,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Any],
        output: Tensor,  # noqa: ARG002
    ) -> None:
        queries = args[0] if args else kwargs["hidden_states"]
        context = kwargs.get("encoder_hidden_states")
        own, others = queries.shape[1], queries.shape[1] if context is None else context.shape[1]
        if context is not None and not isinstance(module, Attention):  # picture and caption attend to both
            own = others = own + others
        self.attention[path] += 2 * queries.shape[0] * own * others * module.inner_dim
