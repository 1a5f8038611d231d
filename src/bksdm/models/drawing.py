"""How MODEL draws: as it says that it draws best, or as is usual for its family; nothing is loaded for that."""

import functools
from collections.abc import Mapping
from pathlib import Path

from bksdm.common.errors import InputError
from bksdm.common.hub import hub_errors
from bksdm.common.progress import say
from bksdm.models.configs import family_of_model, load_contents, local
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults, read_defaults
from bksdm.runtime.spared import NOTHING, Spared

# As good as a U-Net's usual 25 steps, in less than half of the time (benchmarks/results/quality_speed.md).
FAST_STEPS, FAST_SCHEDULER = 10, "DPMSolverMultistepScheduler"


def drawing_defaults(model: str | Path) -> Defaults | None:
    """What MODEL, or an exported folder, says that it draws best with; None where it does not tell.

    Raises:
        InputError: There is no such model, or what it says means nothing here.
    """
    path = local(model)
    if path is None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return read_defaults(Path(hf_hub_download(str(model), SAMPLING_FILE)).parent, _usual(model))
        except hub_errors(OSError) as error:
            if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, EntryNotFoundError):
                _say_unknown(str(model), type(error).__name__, _usual(model))
            return None
    own = read_defaults(path, _usual(model)) if path.is_dir() else load_contents(path).sampling
    if own and own.sigmas is not None and not family_of_model(model).by_flow:
        raise InputError(
            f"{path / SAMPLING_FILE} has sigmas, and models of {family_of_model(model).name} draw by timesteps; remove "
            f"them from it"
        )
    return own


@functools.cache  # so that it is said once
def _say_unknown(model: str, reason: str, usual: Defaults) -> None:
    say(
        f"whether {model} has a {SAMPLING_FILE} could not be asked ({reason}); it draws in {usual.steps} "
        f"steps with guidance {usual.guidance:g} unless --steps and --guidance say otherwise"
    )


def drawing(
    model: str | Path, steps: int | None = None, guidance: float | None = None, spared: Spared = NOTHING
) -> Defaults:
    """How MODEL draws: as is asked for, else as it draws best, else as is usual for its family.

    Raises:
        InputError: As `drawing_defaults` does.
    """
    return (drawing_defaults(model) or _usual(model)).chosen(steps, guidance, spared)


def _usual(model: str | Path) -> Defaults:
    """How models of the same family are drawn; what is none says so where it is loaded."""
    try:
        return family_of_model(model).usual
    except InputError:
        return Defaults()


def drawings(
    models: Mapping[str, str], steps: int | None, guidance: float | None, spared: Spared = NOTHING
) -> dict[str, Defaults]:
    """How each of several models draws, by name.

    Arguments:
        models: MODELs by name.
        steps, guidance, spared: For all of them, where they are asked for.

    Raises:
        InputError: As `drawing` does.
    """
    return {name: drawing(model, steps, guidance, spared) for name, model in models.items()}


def say_unlike(ways: Mapping[str, Defaults]) -> None:
    """A line where models, by name, do not draw alike."""
    if len(set(ways.values())) > 1:
        told = "; ".join(f"{name}: steps {how.steps}, guidance {how.guidance:g}" for name, how in ways.items())
        say(f"each model draws as it draws best ({told}); --steps and --guidance hold for all")
