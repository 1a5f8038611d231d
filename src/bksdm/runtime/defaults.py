"""What a model draws best with, which belongs to its folder as `sampling.json`.

The file holds arguments that diffusers' pipelines are called with, so that `pipeline(prompt, **json.load(file))` draws
with them:

    {"num_inference_steps": 25, "guidance_scale": 2.5}

A model of flow matching that learnt to draw in few steps has its list of noise levels too, as it is before the
scheduler shifts it; every step begins at one of them:

    {"num_inference_steps": 4, "guidance_scale": 0.0, "sigmas": [1.0, 0.75, 0.5, 0.25]}
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bksdm.common.errors import InputError

SAMPLING_FILE = "sampling.json"
Interval = tuple[float, float]  # the least and the largest of noise levels
_STEPS, _GUIDANCE, _SIGMAS = "num_inference_steps", "guidance_scale", "sigmas"


@dataclass(frozen=True)
class Defaults:
    """How pictures are drawn where nothing is asked for.

    Attributes:
        steps: Denoising steps.
        guidance: Guidance scale; 1 for none.
        sigmas: The noise level that each step begins at, in (0, 1] and falling; None for those of pipeline and
            scheduler.
        interval: The noise levels at which guidance is given; None for all. No file says.
        reuse: Every how many steps the inside of the denoiser is computed; None for every one. No file says.
        pool_keys: Side of the squares of tokens, more than 1, whose means give the outermost self-attentions keys and
            values; None where all tokens do. No file says.
    """

    steps: int = 25
    guidance: float = 7.5
    sigmas: tuple[float, ...] | None = None
    interval: Interval | None = None
    reuse: int | None = None
    pool_keys: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], source: object, usual: "Defaults | None" = None) -> "Defaults":
        """Those that a file names, and the usual ones for the rest.

        Arguments:
            values: Of the file.
            source: What to call it.
            usual: The usual ones.

        Raises:
            InputError: A key or its value means nothing here.
        """
        unknown = sorted(values.keys() - {_STEPS, _GUIDANCE, _SIGMAS})
        if unknown:
            known = ", ".join((_STEPS, _GUIDANCE, _SIGMAS))
            raise InputError(f"{source} has {unknown[0]}, which is not known here; it may have {known}")
        sigmas = _levels(values[_SIGMAS], source) if _SIGMAS in values else None
        usual = usual or cls()
        steps = values.get(_STEPS, usual.steps if sigmas is None else len(sigmas))
        guidance = values.get(_GUIDANCE, usual.guidance)
        if type(steps) is not int or steps < 1:
            raise InputError(f"{source} has {_STEPS} {steps!r}; write a whole number of at least 1")
        if sigmas is not None and len(sigmas) != steps:
            raise InputError(f"{source} has {_STEPS} {steps} and {len(sigmas)} {_SIGMAS}; write one for each step")
        if type(guidance) not in (int, float) or not 0 <= guidance < math.inf:
            raise InputError(f"{source} has {_GUIDANCE} {guidance!r}; write a number from 0")
        return cls(steps, float(guidance), sigmas)

    def arguments(self) -> dict[str, Any]:
        """What a pipeline of diffusers is called with."""
        levels = {} if self.sigmas is None else {_SIGMAS: list(self.sigmas)}
        return {_STEPS: self.steps, _GUIDANCE: self.guidance, **levels}

    def to_dict(self) -> dict[str, Any]:
        """By the names used here."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def text(self) -> str:
        """What the file holds."""
        return json.dumps(self.arguments(), indent=2) + "\n"

    def chosen(
        self,
        steps: int | None,
        guidance: float | None,
        interval: Sequence[float] | None = None,
        reuse: int | None = None,
        pool_keys: int | None = None,
    ) -> "Defaults":
        """With what was asked for in their place; noise levels are for as many steps as they are.

        Raises:
            InputError: `interval` is none, or `reuse` or `pool_keys` is less than 1.
        """
        _check_whole("reuse", reuse)
        return Defaults(
            self.steps if steps is None else steps,
            self.guidance if guidance is None else guidance,
            self.sigmas if steps in (None, self.steps) else None,
            None if interval is None else _interval(interval),
            reuse,
            squares(pool_keys),
        )


def squares(pool_keys: int | None) -> int | None:
    """The side of the squares of tokens that are pooled, None where each is a token.

    Raises:
        InputError: It is less than 1.
    """
    _check_whole("pool_keys", pool_keys)
    return None if pool_keys == 1 else pool_keys


def _check_whole(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise InputError(f"{name} is {value}; give at least 1, or leave it out")


def _interval(given: Sequence[float]) -> Interval:
    if len(given) != 2 or not 0 <= given[0] < given[1]:
        shown = " ".join(f"{level:g}" for level in given)
        raise InputError(f"guidance_interval is {shown}; give two noise levels, the lower first, such as 0.3 5")
    return given[0], given[1]


def _levels(given: Any, source: object) -> tuple[float, ...]:
    """Noise levels as a file has them."""
    if not isinstance(given, list) or not all(type(level) in (int, float) and 0 < level <= 1 for level in given):
        raise InputError(f"{source} has {_SIGMAS} {given!r}; write a list of numbers above 0, at most 1")
    if not given or any(level <= after for level, after in pairwise(given)):
        raise InputError(f"{source} has {_SIGMAS} {given!r}; write them falling, one for each step")
    return tuple(float(level) for level in given)


def as_files(own: Defaults | None) -> dict[str, str]:
    """The text files, name -> content, that tell what a model draws best with; none where that is not known."""
    return {} if own is None else {SAMPLING_FILE: own.text()}


def read_defaults(folder: Path, usual: Defaults | None = None) -> Defaults | None:
    """What the model in a folder draws best with, the usual where its file leaves a part out; None without a file.

    Raises:
        InputError: Its file cannot be read, or has what is not known here.
    """
    file = folder / SAMPLING_FILE
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); mend or remove it") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no object; mend or remove it")
    return Defaults.of(values, file, usual)
