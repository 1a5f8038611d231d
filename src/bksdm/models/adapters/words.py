"""Words that were taught to text encoders (textual inversion, arXiv 2208.01618): vectors by their names.

A model of one text encoder has files in which a word is the name of its vectors, and may lie beside others. With
several, a file holds the vectors of one word for each of them, and the word is the name of the file.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.families import families_for
from bksdm.families.family import Family
from bksdm.models.adapters.kinds import WORD_FILE, read_tensors, write_tensors
from bksdm.models.pipelines import text_encoders, tokenizers

Vectors = tuple[Tensor, ...]  # (N, D) for each text encoder
Words = Mapping[str, Vectors]

_UNNAMED = "emb_params"  # AUTOMATIC1111's; the word is the file's name
_WORD_KEY = "word"  # in the header, where the file's name may have lost letters


def read_words(file: Path, family: Family) -> dict[str, Vectors]:
    """The words in a file and their vectors.

    Raises:
        InputError: It is damaged, a word has no vectors, or they are for another family.
    """
    tensors, header = read_tensors(file)
    if any(name in other.words for other in families_for("adapt") for name in tensors):
        word = header.get(_WORD_KEY, file.stem)
        return {word: vectors_for(family, word, tensors, file)}
    words = {file.stem if name == _UNNAMED else name: tensor for name, tensor in tensors.items()}
    return {word: vectors_for(family, word, {"": tensor}, file) for word, tensor in words.items()}


def vectors_for(family: Family, word: str, found: Mapping[str, Tensor], file: Path) -> Vectors:
    """A word's vectors for the text encoders of a family.

    Arguments:
        family: Of the model.
        word: The word.
        found: Its vectors by their names; "" where they are called as the word.
        file: Where they lie.

    Raises:
        InputError: There are none, or they are for another family.
    """
    if set(found) != set(family.words):
        made_for = next(
            (other.name for other in families_for("adapt") if set(other.words) == set(found)), "no family that is known"
        )
        raise InputError(
            f"textual inversion {word!r} in {file} is of {made_for}, and this model of {family.name}; give one of "
            f"{family.name}"
        )
    if not all(tensor.numel() for tensor in found.values()):
        raise InputError(f"textual inversion {file} has no vectors for {word}; remove it")
    return tuple(found[name].reshape(-1, found[name].shape[-1]) for name in family.words)


def write_words(words: Words, folder: Path, family: Family) -> None:
    """Write words so that stock diffusers loads them: it takes one from a file.

    A single one is `learned_embeds.safetensors`; of several, and of a family of several text encoders, each file has
    the letters of its word.
    """
    folder.mkdir(exist_ok=True)
    for number, (word, vectors) in enumerate(words.items()):
        letters = "".join(re.findall(r"[\w-]+", word)) or "word"
        own = family.words != ("",)
        single = f"{letters}.safetensors" if own else WORD_FILE
        name = single if len(words) == 1 else f"{number}-{letters}.safetensors"
        named = zip(family.words if own else (word,), vectors, strict=True)
        write_tensors(dict(named), folder / name, {"format": "pt"} | ({_WORD_KEY: word} if own else {}))


def check_widths(word: str, vectors: Vectors, widths: Sequence[int]) -> None:
    """Refuse vectors that text encoders of these widths do not take.

    Raises:
        InputError: Naming the word.
    """
    for own, width in zip(vectors, widths, strict=True):
        if own.shape[-1] != width:
            raise InputError(
                f"textual inversion {word!r} has vectors of {own.shape[-1]} numbers, and the text encoder takes "
                f"{width}; it is of another family"
            )


def load_words(pipeline: DiffusionPipeline, word: str, vectors: Vectors) -> None:
    """Teach a word to a pipeline: N vectors become the tokens WORD, WORD_1, ..., as in diffusers.

    Raises:
        InputError: The vectors are not of the text encoders' widths, or the word is known.
    """
    encoders, own = text_encoders(pipeline), tokenizers(pipeline)
    check_widths(word, vectors, [encoder.config.hidden_size for encoder in encoders])
    if any(word in tokenizer.get_vocab() for tokenizer in own):
        raise InputError(f"word {word!r} is known to the tokenizer already; give it another name")
    for tokenizer, encoder, taught in zip(own, encoders, vectors, strict=True):
        pipeline.load_textual_inversion({word: taught}, token=word, tokenizer=tokenizer, text_encoder=encoder)
