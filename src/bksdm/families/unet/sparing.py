r"""A U-Net that leaves out work in some calls of the way from noise to picture, for a while and in memory.

Guidance in an interval of noise levels $\sqrt{(1 - \bar\alpha) / \bar\alpha}$: at others the half of a batch that is
told of no caption is not computed, and what the other half gives stands for both, so that guidance changes nothing
(arXiv 2404.07724). Reuse: in all calls but every n-th the outermost stage alone computes, on what the stages inside of
it gave last (DeepCache, arXiv 2312.00858); these are whatever the U-Net has, so that it may be a pruned one, and one
without a middle block. Pooled keys: in the self-attentions of the outermost stage, where tokens are most, keys and
values come from means over squares of n x n tokens, so that products of queries and keys are n^2 times fewer (ToDo,
arXiv 2402.13573, which takes one token of each square instead of the mean).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bksdm.families.noise import NoiseSchedule
from bksdm.runtime.spared import Interval


@contextmanager
def guided_within(unet: nn.Module, schedule: NoiseSchedule, interval: Interval) -> Iterator[None]:
    """Inside the block, batches of two halves are computed whole at noise levels of the interval alone.

    Arguments:
        unet: Called with latents (2B, C, h, w), a timestep for all, and by name with what the halves are told.
        schedule: Gives the noise level of a timestep.
        interval: The least and the largest noise level with guidance.
    """
    halved = False

    def before(module: nn.Module, given: Any, named: Any) -> Any:  # noqa: ARG001
        nonlocal halved
        latents, timestep = given
        low, high = interval
        halved = not low <= schedule.level(float(timestep)) <= high
        return tuple(_second_half((given, named), len(latents))) if halved else None

    def after(module: nn.Module, given: Any, output: Any) -> Any:  # noqa: ARG001
        return (torch.cat([output[0], output[0]]), *output[1:]) if halved else None

    hooks = [unet.register_forward_pre_hook(before, with_kwargs=True), unet.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def reusing(unet: Any, every: int) -> Iterator[None]:
    """Inside the block, what is within the outermost stage computes in the first of every so many calls.

    And where a call has more samples than the one before; where it has fewer, they are taken for its last.
    """
    inside = [*unet.down_blocks[1:], *([unet.mid_block] if unet.mid_block else []), *unet.up_blocks[:-1]]
    kept: dict[nn.Module, Any] = {}
    since, samples, most = 0, 0, 0

    def before(module: nn.Module, given: Any) -> None:  # noqa: ARG001
        nonlocal since, samples, most
        samples = len(given[0])
        since = (since + 1) % every if samples <= most else 0
        if since == 0 or not kept:
            since, most = 0, samples
            kept.clear()

    def keeping(module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*given: Any, **named: Any) -> Any:
            if module not in kept:
                kept[module] = own(*given, **named)
            return _last(kept[module], samples)

        return forward

    hook = unet.register_forward_pre_hook(before)
    for module in inside:
        module.forward = keeping(module, module.forward)
    try:
        yield
    finally:
        hook.remove()
        for module in inside:
            del module.forward


@contextmanager
def pooling_keys(unet: Any, side: int) -> Iterator[None]:
    """Inside the block, self-attentions of the outermost stage have keys and values of squares of tokens.

    A square that reaches past an edge has the mean of the tokens that it holds.

    Arguments:
        unet: One that `UNetFamily.pools_keys`.
        side: Of a square, in tokens.
    """
    outermost = (unet.down_blocks[0], unet.up_blocks[-1])
    transformers = [transformer for stage in outermost for transformer in getattr(stage, "attentions", ())]
    hooks = [hook for transformer in transformers for hook in _pooled(transformer, side)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pooled(transformer: Any, side: int) -> Iterator[RemovableHandle]:
    """Let the self-attentions of a transformer, which is called with states (B, C, h, w), have pooled keys."""
    sides: Sequence[int] = ()

    def before(module: nn.Module, given: Any) -> None:  # noqa: ARG001
        nonlocal sides
        sides = given[0].shape[2:]

    def pooling(module: nn.Module, given: Any, named: Any) -> Any:  # noqa: ARG001
        return given, {**named, "encoder_hidden_states": _means(given[0], sides, side)}

    yield transformer.register_forward_pre_hook(before)
    for block in transformer.transformer_blocks:
        yield block.attn1.register_forward_pre_hook(pooling, with_kwargs=True)


def _means(tokens: Tensor, sides: Sequence[int], side: int) -> Tensor:
    """Means (B, K, C) of squares of tokens (B, h * w, C), row by row, by h and w."""
    squares = tokens.reshape(-1, *sides, tokens.shape[-1]).permute(0, 3, 1, 2)
    pooled = F.avg_pool2d(squares, side, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2)


def _second_half(given: Any, samples: int) -> Any:
    """What of the arguments belongs to the second half of so many samples."""
    if isinstance(given, Tensor):
        return given[samples // 2 :] if given.ndim and len(given) == samples else given
    if isinstance(given, dict):
        return {name: _second_half(value, samples) for name, value in given.items()}
    if isinstance(given, tuple):
        return tuple(_second_half(value, samples) for value in given)
    return given


def _last(given: Any, samples: int) -> Any:
    """What belongs to the last so many samples."""
    if isinstance(given, tuple):
        return tuple(_last(value, samples) for value in given)
    return given[-samples:]
