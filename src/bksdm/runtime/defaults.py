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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bksdm.common.errors import InputError
from bksdm.runtime.spared import NOTHING, Spared

SAMPLING_FILE = "sampling.json"
_STEPS, _GUIDANCE, _SIGMAS = "num_inference_steps", "guidance_scale", "sigmas"


@dataclass(frozen=True)
class Defaults:
    """How pictures are drawn where nothing is asked for.

    Attributes:
        steps: Denoising steps.
        guidance: Guidance scale; 1 for none.
        sigmas: The noise level that each step begins at, in (0, 1] and falling; None for those of pipeline and
            scheduler.
        spared: What is not computed; no file says.
    """

    steps: int = 25
    guidance: float = 7.5
    sigmas: tuple[float, ...] | None = None
    spared: Spared = NOTHING

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
        """For records: by the names used here, with those of what is spared among them."""
        values = asdict(self)
        values |= values.pop("spared")
        return {name: value for name, value in values.items() if value is not None}

    def text(self) -> str:
        """What the file holds."""
        return json.dumps(self.arguments(), indent=2) + "\n"

    def chosen(self, steps: int | None, guidance: float | None, spared: Spared = NOTHING) -> "Defaults":
        """With what was asked for in their place; noise levels are for as many steps as they are."""
        return Defaults(
            self.steps if steps is None else steps,
            self.guidance if guidance is None else guidance,
            self.sigmas if steps in (None, self.steps) else None,
            spared,
        )


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
