r"""A U-Net that leaves out work in some calls of the way from noise to picture, for a while and in memory.

Guidance in an interval of noise levels $\sqrt{(1 - \bar\alpha) / \bar\alpha}$: at others the half of a batch that is
told of no caption is not computed, and what the other half gives stands for both, so that guidance changes nothing
(arXiv 2404.07724). Reuse: in all calls but every n-th the outermost stage alone computes, on what the stages inside of
it gave last (DeepCache, arXiv 2312.00858); these are whatever the U-Net has, so that it may be a pruned one, and one
without a middle block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bksdm.families.noise import NoiseSchedule
from bksdm.runtime.defaults import Interval


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
