"""What a model draws best with, which belongs to its folder as `sampling.json`.

The file holds arguments that diffusers' pipelines are called with, so that `pipeline(prompt, **json.load(file))` draws
with them:

    {"num_inference_steps": 25, "guidance_scale": 2.5}
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bksdm.common.errors import InputError

SAMPLING_FILE = "sampling.json"
_STEPS, _GUIDANCE = "num_inference_steps", "guidance_scale"


@dataclass(frozen=True)
class Defaults:
    """How pictures are drawn where nothing is asked for.

    Attributes:
        steps: Denoising steps.
        guidance: Guidance scale; 1 for none.
    """

    steps: int = 25
    guidance: float = 7.5

    @classmethod
    def of(cls, values: Mapping[str, Any], source: object) -> "Defaults":
        """Those that a file names, and the usual ones for the rest.

        Arguments:
            values: Of the file.
            source: What to call it.

        Raises:
            InputError: A key or its value means nothing here.
        """
        unknown = sorted(values.keys() - {_STEPS, _GUIDANCE})
        if unknown:
            raise InputError(f"{source} has {unknown[0]}, which is not known here; it may have {_STEPS}, {_GUIDANCE}")
        steps, guidance = values.get(_STEPS, cls.steps), values.get(_GUIDANCE, cls.guidance)
        if type(steps) is not int or steps < 1:
            raise InputError(f"{source} has {_STEPS} {steps!r}; write a whole number of at least 1")
        if type(guidance) not in (int, float) or not 0 <= guidance < math.inf:
            raise InputError(f"{source} has {_GUIDANCE} {guidance!r}; write a number, 1 for none")
        return cls(steps, float(guidance))

    def text(self) -> str:
        """What the file holds."""
        return json.dumps({_STEPS: self.steps, _GUIDANCE: self.guidance}, indent=2) + "\n"

    def call(self) -> str:
        """What a call of the pipeline needs besides the prompt, as Python."""
        return f", {_STEPS}={self.steps}, {_GUIDANCE}={self.guidance}"

    def chosen(self, steps: int | None, guidance: float | None) -> "Defaults":
        """With what was asked for in their place."""
        return Defaults(self.steps if steps is None else steps, self.guidance if guidance is None else guidance)


def as_files(own: Defaults | None) -> dict[str, str]:
    """The text files, name -> content, that tell what a model draws best with; none where that is not known."""
    return {} if own is None else {SAMPLING_FILE: own.text()}


def read_defaults(folder: Path) -> Defaults | None:
    """What the model in a folder draws best with; None where it does not tell.

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
    return Defaults.of(values, file)
