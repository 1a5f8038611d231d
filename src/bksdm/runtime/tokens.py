"""Prompts to tokens as CLIP's text encoder takes them, by the tokenizers library alone."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bksdm.errors import InputError
from bksdm.runtime.networks import Tokens

_CLIP_PAD = "<|endoftext|>"


class Tokenizer:
    """What `CLIPTokenizer(prompts, padding="max_length", truncation=True)` gives."""

    def __init__(self, folder: Path, length: int) -> None:
        """Read `tokenizer.json` and `tokenizer_config.json`.

        Arguments:
            folder: Where they are.
            length: Tokens that the text encoder takes, with those at start and end.

        Raises:
            InputError: The library or a file is missing, or a file cannot be read.
        """
        try:
            import tokenizers  # noqa: PLC0415
        except ImportError as error:
            raise InputError("prompts need the tokenizers library; pip install tokenizers") from error
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{file} is missing; export the model again")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower kind
            raise InputError(f"{file} cannot be read ({error}); export the model again") from error
        pad = _pad_token(folder / "tokenizer_config.json")
        number = self._tokenizer.token_to_id(pad)
        if number is None:
            raise InputError(f"{file} has no token {pad!r} to fill up with; export the model again")
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=number, pad_token=pad)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Tokens with shape (B, L) of B prompts."""
        return np.array([encoded.ids for encoded in self._tokenizer.encode_batch(list(prompts))], dtype=np.int64)


def _pad_token(file: Path) -> str:
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        token = config.get("pad_token") or _CLIP_PAD
        return str(token["content"] if isinstance(token, dict) else token)
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{file} cannot be read ({error}); export the model again") from error
