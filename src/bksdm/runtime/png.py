"""PNG files (W3C, Portable Network Graphics), 8 bits a channel, with texts inside; zlib is all they need."""

import struct
import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB, _DEPTH, _UP = 2, 8, 2


def encode(picture: NDArray[np.uint8], texts: Mapping[str, str] | None = None) -> bytes:
    """The file of a picture.

    Arguments:
        picture: With shape (H, W, 3).
        texts: By keyword, which is 1 to 79 Latin letters; the texts may be any.
    """
    height, width, _ = picture.shape
    rows = picture.reshape(height, width * 3)
    # Each row as its difference from the one above, which packs better.
    filtered = np.full((height, width * 3 + 1), _UP, dtype=np.uint8)
    filtered[:, 1:] = rows - np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    chunks = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, _DEPTH, _RGB, 0, 0, 0)),
        *(_text(keyword, text) for keyword, text in (texts or {}).items()),
        _chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9)),
        _chunk(b"IEND", b""),
    ]
    return _SIGNATURE + b"".join(chunks)


def _text(keyword: str, text: str) -> bytes:
    """In Latin-1 where that has the letters, which more programs read; else in UTF-8, uncompressed, of no language."""
    name = keyword.encode("latin-1")
    try:
        return _chunk(b"tEXt", name + b"\0" + text.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", name + b"\0\0\0\0\0" + text.encode("utf-8"))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
