"""The layers of a denoiser, seen when it runs on the meta device, where tensors have shapes and no data.

So every config can be counted that makes a network at all, and this is what counts from a config alone are held to.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from bksdm.common.errors import InputError, one_line
from bksdm.families import family_claiming
from bksdm.families.layers import Layer


def layers(config: Mapping[str, Any], size: tuple[int, int], tokens: int) -> list[Layer]:
    """All that has tensors or multiplies them; arguments are those of `Family.layers_of`.

    Raises:
        InputError: The config is not one of a U-Net that runs.
    """
    try:
        family = family_claiming(config)
        network = family.outline(config)
        watch = _Watch(network)
        with torch.device("meta"), torch.no_grad():
            told = {
                name: torch.empty(1, *shape) for name, shape in family.condition_shapes(network.config, tokens).items()
            }
            latents = torch.empty(1, family.latent_channels(network.config), *size)
            family.answer(network, latents, torch.empty(1, dtype=torch.long), told)
    except (AssertionError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = one_line(error)
        raise InputError(f"the config of the U-Net does not make a network that runs ({reason}); mend it") from error
    found = []
    for path, module in network.named_modules():
        tensors = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
        if tensors or path in watch.products:
            found.append(Layer(path, tensors, watch.places[path], watch.products[path]))
    return found


class _Watch:
    """Places and products of a network's modules by their paths, of all passes from now on."""

    def __init__(self, network: nn.Module) -> None:
        self.places: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        for path, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(partial(self._layer, path))
            elif isinstance(module, (Attention, AttentionModuleMixin)):
                module.register_forward_hook(partial(self._attention, path), with_kwargs=True)

    def _layer(self, path: str, module: nn.Conv2d | nn.Linear, args: Any, output: Tensor) -> None:  # noqa: ARG002
        self.places[path] += output.numel() // len(module.weight)

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
        self.products[path] += 2 * queries.shape[0] * own * others * module.inner_dim
