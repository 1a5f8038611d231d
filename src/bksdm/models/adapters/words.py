"""Words that were taught to a text encoder (textual inversion, arXiv 2208.01618): vectors by their names."""

import re
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.models.adapters.kinds import WORD_FILE, read_tensors, write_tensors

_UNNAMED = "emb_params"  # AUTOMATIC1111's; the word is the file's name


def read_words(file: Path) -> dict[str, Tensor]:
    """The words in a file and their vectors, each with shape (N, D).

    Raises:
        InputError: It is damaged, or a word has no vectors.
    """
    words = {}
    for name, tensor in read_tensors(file)[0].items():
        if not tensor.numel():
            raise InputError(f"textual inversion {file} has no vectors for {name}; remove it")
        words[file.stem if name == _UNNAMED else name] = tensor.reshape(-1, tensor.shape[-1])
    return words


def write_words(words: Mapping[str, Tensor], folder: Path) -> None:
    """Write words so that stock diffusers loads them: it takes one from a file.

    A single one is `learned_embeds.safetensors`; of several, each file has the letters of its word.
    """
    folder.mkdir(exist_ok=True)
    for number, (word, vectors) in enumerate(words.items()):
        letters = "".join(re.findall(r"[\w-]+", word)) or "word"
        name = WORD_FILE if len(words) == 1 else f"{number}-{letters}.safetensors"
        write_tensors({word: vectors}, folder / name, {"format": "pt"})


def check_width(word: str, vectors: Tensor, width: int) -> None:
    """Refuse vectors that a text encoder of this width does not take.

    Raises:
        InputError: Naming the word.
    """
    if vectors.shape[-1] != width:
        raise InputError(
            f"textual inversion {word!r} has vectors of {vectors.shape[-1]} numbers, and the text encoder takes "
            f"{width}; it is of another family"
        )


def load_words(pipeline: DiffusionPipeline, word: str, vectors: Tensor) -> None:
    """Teach a word to a pipeline: N vectors become the tokens WORD, WORD_1, ..., as in diffusers.

    Raises:
        InputError: The vectors are not of the text encoder's width, or the word is known.
    """
    check_width(word, vectors, pipeline.text_encoder.config.hidden_size)
    if word in pipeline.tokenizer.get_vocab():
        raise InputError(f"word {word!r} is known to the tokenizer already; give it another name")
    pipeline.load_textual_inversion({word: vectors}, token=word)
