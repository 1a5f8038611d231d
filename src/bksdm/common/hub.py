"""What a name stands for: a path on this machine, or an id on the Hugging Face Hub.

Its library takes a while to import, and a path does not need it.
"""

import difflib
import re
from pathlib import Path

from bksdm.common.errors import InputError, one_line

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_KEPT = ("model_index.json", "config.json")  # one of which every model has
_MOST_NEAR = 3


def hub_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What is raised where the Hub does not have something, or cannot be asked, and others to catch with it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    return HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, ConnectionError, *others


def is_id(name: str | Path) -> bool:
    """Whether a name that is nothing on this machine may be an id on the Hub, OWNER/NAME.

    Not where a folder OWNER is here: then it is a path with a slip in it, unless the Hub's cache has that very id.
    """
    if not _reads_as_id(name):
        return False
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(str(name), file) for file in _KEPT)
    return not Path(name).parent.is_dir() or any(isinstance(file, str) for file in cached)


def _reads_as_id(name: str | Path) -> bool:
    return isinstance(name, str) and _ID.fullmatch(name) is not None and not name.endswith(_FILES)


def fetched(name: str, file: str) -> Path | None:
    """A file of what lies on the Hub; None where there is no such file, or where it cannot be had now."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except hub_errors(OSError):
        return None


def missing(what: str, name: str | Path, give: str) -> InputError:
    """The refusal of a name that stands for nothing, with the paths that are spelled much like it.

    Arguments:
        what: What was to be named, such as "model".
        name: What was given.
        give: What could have been given.
    """
    path = f", and {Path(name).parent} is a folder here, so that it is no hub id" if _reads_as_id(name) else ""
    return InputError(f"{what} {name} does not exist{_spelled_alike(name)}{path}; give {give}")


def not_on_hub(what: str, name: str, error: BaseException) -> InputError:
    """The refusal of an id that the Hub does not know, or that cannot be asked for."""
    return InputError(
        f"{what} {name} is no folder here{_spelled_alike(name)} and not on the hub: {one_line(error, 300)}"
    )


def not_loaded(what: str, name: str | Path, is_none: str, error: Exception) -> InputError:
    """The refusal of a folder or an id whose network could not be loaded: it cannot be had, or it is no such network.

    Arguments:
        what: What was to be named, such as "encoder".
        name: What was given.
        is_none: What it then is not, such as "is not a CLIP".
        error: What the library said.
    """
    if not Path(name).is_dir() and fetched(str(name), "config.json") is None:
        return InputError(
            f"{what} {name} is not in the hub's cache here, and the hub does not have it or cannot be reached; "
            f"give --{what} a folder"
        )
    return InputError(f"{what} {name} {is_none}: {one_line(error)}")


def _spelled_alike(name: str | Path) -> str:
    near = nearest(Path(name).expanduser())
    return f" (near it: {', '.join(map(str, near))})" if near else ""


def nearest(path: Path) -> list[Path]:
    """Paths that exist and are spelled much like `path`, part by part."""
    found = [Path(path.anchor)]
    for part in path.parts[1:] if path.anchor else path.parts:
        found = [near for folder in found for near in _children_like(folder, part)][:_MOST_NEAR]
    return found


def _children_like(folder: Path, name: str) -> list[Path]:
    if (folder / name).exists():
        return [folder / name]
    try:
        names = [child.name for child in folder.iterdir() if not child.name.startswith(".")]
    except OSError:
        return []
    return [folder / near for near in difflib.get_close_matches(name, names, _MOST_NEAR)]
