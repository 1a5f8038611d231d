"""Prompts to tokens as text encoders take them, by the tokenizers library alone."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bksdm.common.errors import InputError
from bksdm.runtime.networks import Tokens

if TYPE_CHECKING:
    from tokenizers import Encoding

_CLIP_PAD = "<|endoftext|>"


def saved_words(added: Collection[str]) -> dict[str, str]:
    """Words of several vectors (textual inversion, arXiv 2208.01618), and what is written for all of their vectors.

    `<thing>` with `<thing>_1` and `<thing>_2` beside it becomes `<thing> <thing>_1 <thing>_2`, as diffusers has it.

    Arguments:
        added: The tokens that were added to a tokenizer.
    """
    found = {}
    for word in added:
        vectors = [word]
        while (further := f"{word}_{len(vectors)}") in added:
            vectors.append(further)
        if len(vectors) > 1:
            found[word] = " ".join(vectors)
    return found


def hidden_words(words: Iterable[str], tokens: Callable[[str], Sequence[str]]) -> list[str]:
    """Saved words of several vectors that diffusers, and we with it, reads as their first vector.

    Their names have capital letters, and their tokens small ones, by which diffusers does not find them.

    Arguments:
        words: Of `saved_words`.
        tokens: What a tokenizer makes of a text.
    """
    return [word for word in words if word not in tokens(word)]


def encoded(prompt: str, encode: Callable[[str], "Encoding"], words: Mapping[str, str]) -> tuple[str, "Encoding"]:
    """A prompt with its saved words written out, and what is made of that.

    Arguments:
        prompt: The prompt.
        encode: Pads or cuts to the text encoder's length.
        words: Of `saved_words`.
    """
    found = encode(prompt)
    tokens = dict.fromkeys(token for part in (found, *found.overflowing) for token in part.tokens)
    written = prompt
    for word in (token for token in tokens if token in words):
        written = written.replace(word, words[word])
    return (prompt, found) if written == prompt else (written, encode(written))


def beyond(prompt: str, found: "Encoding") -> str:
    """The end of a prompt that was cut off; nothing where all of it fitted."""
    return prompt[max(end for _, end in found.offsets) :].strip() if found.overflowing else ""


class Tokenizer:
    """What a tokenizer of transformers gives for `(prompts, padding="max_length", truncation=True)`."""

    def __init__(self, folder: Path, length: int, around: tuple[str, str] = ("", ""), *, marks: bool = False) -> None:
        """Read `tokenizer.json` and `tokenizer_config.json`.

        Arguments:
            folder: Where they are.
            length: Tokens that the text encoder takes, with those at start and end.
            around: What is written before and behind a prompt.
            marks: Whether tokens that pad are below zero: n is -1 - n there.

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
        self._around, self._marks = around, marks
        self._words = saved_words([token.content for token in self._tokenizer.get_added_tokens_decoder().values()])

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Tokens with shape (B, L) of B prompts."""
        found = [self._encoded(prompt)[1] for prompt in prompts]
        ids = np.array([one.ids for one in found], dtype=np.int64)
        return np.where(np.array([one.attention_mask for one in found]) == 1, ids, ~ids) if self._marks else ids

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that the text encoder does not see; nothing where it sees all."""
        return beyond(*self._encoded(prompt))

    def hidden_words(self) -> list[str]:
        """Saved words of which the first vector counts alone."""
        return hidden_words(self._words, lambda word: self._tokenizer.encode(word).tokens)

    def _encoded(self, prompt: str) -> tuple[str, "Encoding"]:
        before, after = self._around
        return encoded(before + prompt + after, self._tokenizer.encode, self._words)


class Tokenizers:
    """Those of all text encoders of a model, whose tokens lie side by side: (B, L)."""

    def __init__(self, each: Sequence[Tokenizer]) -> None:
        self._each = each

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Tokens of B prompts."""
        return np.concatenate([tokenizer(prompts) for tokenizer in self._each], axis=1)

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that a text encoder does not see, at most; nothing where they see all."""
        return max((tokenizer.cut_off(prompt) for tokenizer in self._each), key=len)

    def hidden_words(self) -> list[str]:
        """Saved words of which the first vector counts alone."""
        return list(dict.fromkeys(word for tokenizer in self._each for word in tokenizer.hidden_words()))


def _pad_token(file: Path) -> str:
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        token = config.get("pad_token") or _CLIP_PAD
        return str(token["content"] if isinstance(token, dict) else token)
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{file} cannot be read ({error}); export the model again") from error
