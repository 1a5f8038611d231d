"""Which pictures are asked for, before a model is there to draw them."""

from collections.abc import Sequence
from dataclasses import dataclass

from bksdm.common.devices import choose_device
from bksdm.common.errors import InputError
from bksdm.options.generate import GenerateOptions

_SEEDS = 2**63 - 2**32


@dataclass(frozen=True)
class Request:
    """One picture: what it shows and which random numbers it starts from."""

    prompt: str
    seed: int


def check(options: GenerateOptions) -> None:
    """Refuse options that no model could serve.

    Raises:
        InputError: Naming the option and its value.
    """
    for name in ("steps", "batch_size", "images_per_prompt"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; give at least 1")
    if not 0 <= options.seed < _SEEDS:
        raise InputError(f"seed is {options.seed}; give 0 or more, and less than 2^63")
    if options.strengths is not None and not (options.strengths and options.image):
        raise InputError(f"strengths is {options.strengths}; give one or more, with an --image to start from")
    for strength in options.strengths or [options.strength]:
        if not 0 < strength <= 1:
            raise InputError(f"strength is {strength}; give more than 0 and at most 1")
        if options.image and options.steps is not None and options.steps * strength < 1:
            raise InputError(f"strength {strength} of {options.steps} steps leaves no step to do; give more of either")
    for name in ("height", "width"):
        value = getattr(options, name)
        if value is not None and (value < 8 or value % 8):
            raise InputError(f"{name} is {value}; give a multiple of 8")
    choose_device(options.device)


def numbered(prompts: Sequence[str], images_per_prompt: int, seed: int) -> list[Request]:
    """Requests in the order of the prompts; number n has seed + n."""
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    return [Request(prompt, seed + number) for number, prompt in enumerate(repeated)]
