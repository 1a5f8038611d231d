"""Prompts and captions that are longer than a text encoder reads: it is said that they are cut, and what they lose."""

from collections.abc import Callable, Iterable

from bksdm.common.progress import say

_MOST_LINES = 5
_SHOWN = 120

CutOff = Callable[[str], str]


def say_cut(prompts: Iterable[str], cut_off: CutOff) -> None:
    """A line for each prompt that is cut; of more than a few, for the first few and for how many they are.

    Arguments:
        prompts: What is to be drawn.
        cut_off: The end of a text that is not read; nothing where all of it is.
    """
    lost = _lost(prompts, cut_off)
    for prompt, end in list(lost.items())[:_MOST_LINES]:
        say(f"the prompt {_shown(prompt)} is longer than the text encoder reads; cut off: {_shown(end)}")
    if len(lost) > _MOST_LINES:
        say(f"{len(lost)} prompts in all are cut")


def cut_line(texts: Iterable[str], cut_off: CutOff, what: str) -> str | None:
    """How many texts are cut and what the first loses, in a line; None where none are.

    Arguments:
        texts: The texts; equal ones count once.
        cut_off: As for `say_cut`.
        what: What they are.
    """
    different = dict.fromkeys(texts)
    lost = _lost(different, cut_off)
    if not lost:
        return None
    prompt, end = next(iter(lost.items()))
    return (
        f"{len(lost)} of {len(different)} {what} are longer than the text encoder reads, and are cut; the first, "
        f"{_shown(prompt)}, loses {_shown(end)}"
    )


def _lost(texts: Iterable[str], cut_off: CutOff) -> dict[str, str]:
    return {text: end for text in dict.fromkeys(texts) if (end := cut_off(text))}


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
