"""The JSON files of an exported folder."""

import json
from pathlib import Path
from typing import Any

from bksdm.common.errors import InputError

MANIFEST = "manifest.json"  # of folders for the web, by which their page finds the files


def read_json(file: Path) -> dict[str, Any]:
    """The object in one of the files of an exported folder.

    Raises:
        InputError: It is missing, or holds none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing; export the model again") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); export the model again") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no object; export the model again")
    return values
