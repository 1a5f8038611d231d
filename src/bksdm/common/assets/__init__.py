"""Data that ships with the package: recipes, templates, the embedded models, and the art that they draw.

Attributes:
    EMBEDDED: The embedded models.
    ART: The one that has art, an encoder of pictures and captions, and a small decoder beside it.
"""

from pathlib import Path

ART = "emoji"
EMBEDDED = (ART, "emoji-flow")
_HERE = Path(__file__).parent


def asset(*parts: str) -> Path:
    """The path of a shipped file or folder."""
    return _HERE.joinpath(*parts)
