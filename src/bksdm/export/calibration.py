"""What a quantiser looks at: inputs of the U-Net from denoising that the model itself does, under guidance."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from bksdm.common.progress import bar
from bksdm.export.formats import Source
from bksdm.families import family_of_pipeline
from bksdm.generate.requests import Request
from bksdm.generate.sampling import sample_latents
from bksdm.runtime.asks import INPUTS
from bksdm.runtime.networks import Array

PROMPTS = (
    "red apple, noto style",
    "a photo of a dog in the snow",
    "green car, fluent style",
    "an oil painting of a lighthouse",
    "yellow bird, twemoji style",
    "a bowl of soup on a wooden table",
)
_STEPS, _GUIDANCE = 8, 7.5


# Inputs of the exported U-Net in one denoising step, by name: noisy latents `sample` with shape (2, C, h, w), those of
# the empty prompt first, a `timestep` (1,), and what it is told of both.
Step = dict[str, NDArray[Any]]


def denoising_steps(source: Source) -> list[Step]:
    """All steps of a picture for each of the source's prompts, or of a few that are built in.

    The pictures have the model's own size and scheduler, 8 steps, and seeds that count from 0.
    """
    prompts = source.calibration or PROMPTS
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    found: list[Step] = []
    family = family_of_pipeline(source.pipeline)
    told = {INPUTS.get(name, name) for name in (*family.of_caption, *family.of_picture)}
    with bar(len(requests), "calibration pictures") as progress, _recorded(source.pipeline.unet, told, found):
        for _ in sample_latents(source.pipeline, requests, steps=_STEPS, guidance=_GUIDANCE, batch_size=1):
            progress.advance()
    return found


@contextlib.contextmanager
def _recorded(unet: nn.Module, told: set[str], steps: list[Step]) -> Iterator[None]:
    """Keep what the U-Net is given, also what is named in it."""

    def keep(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ARG001
        sample, timestep = given
        kept = {name: _array(value) for name, value in _flat(named) if name in told}
        steps.append({"sample": _array(sample), "timestep": np.array([int(timestep)], np.int64), **kept})

    hook = unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _flat(named: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in named.items():
        yield from value.items() if isinstance(value, Mapping) else [(name, value)]


def _array(tensor: Tensor) -> Array:
    return np.array(tensor.numpy(), dtype=np.float32)
