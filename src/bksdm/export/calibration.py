"""What a quantiser looks at: inputs of the U-Net from denoising that the model itself does, under guidance."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from bksdm.common.progress import bar
from bksdm.export.formats import Source
from bksdm.generate.sampling import Request, sample_latents
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


@dataclass(frozen=True)
class Step:
    """Inputs of the U-Net in one denoising step.

    Attributes:
        sample: Noisy latents with shape (2, C, h, w), those of the empty prompt first.
        timestep: Shape (1,).
        encoder_hidden_states: Embeddings with shape (2, L, D).
    """

    sample: Array
    timestep: NDArray[np.int64]
    encoder_hidden_states: Array


def denoising_steps(source: Source) -> list[Step]:
    """All steps of a picture for each of the source's prompts, or of a few that are built in.

    The pictures have the model's own size and scheduler, 8 steps, and seeds that count from 0.
    """
    prompts = source.calibration or PROMPTS
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    found: list[Step] = []
    with bar(len(requests), "calibration pictures") as progress, _recorded(source.pipeline.unet, found):
        for _ in sample_latents(source.pipeline, requests, steps=_STEPS, guidance=_GUIDANCE, batch_size=1):
            progress.advance()
    return found


@contextlib.contextmanager
def _recorded(unet: nn.Module, steps: list[Step]) -> Iterator[None]:
    """Keep what the U-Net is given."""

    def keep(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ARG001
        sample, timestep = given
        at = np.array([int(timestep)], np.int64)
        steps.append(Step(_array(sample), at, _array(named["encoder_hidden_states"])))

    hook = unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _array(tensor: Tensor) -> Array:
    return np.array(tensor.numpy(), dtype=np.float32)
