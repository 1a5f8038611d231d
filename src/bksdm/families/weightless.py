"""Networks of which names and shapes are wanted alone, or whose weights are put in afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.modeling_utils import no_init_weights


@contextmanager
def without_weights() -> Iterator[None]:
    """What is built inside lies on the meta device, and no time goes into first values that nobody sees."""
    with torch.device("meta"), no_init_weights():
        yield
