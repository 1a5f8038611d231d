"""Data that ships with the package: recipes, templates, and the embedded model with its art."""

from pathlib import Path

_HERE = Path(__file__).parent


def asset(*parts: str) -> Path:
    """The path of a shipped file or folder."""
    return _HERE.joinpath(*parts)
