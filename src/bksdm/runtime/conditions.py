"""What the denoiser of a folder is told besides noisy latents and their timestep, as the configs there say.

All that the torch-free runtime knows of kinds of model is here, in `asks` and in `kinds`; `bksdm.families` has the same
in torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm.common.errors import InputError
from bksdm.runtime.asks import Asks, AsksFlux, AsksFlux2, AsksUNet, AsksZImage
from bksdm.runtime.files import read_json
from bksdm.runtime.networks import Tokens, Told

USUAL_GUIDANCE = 3.5  # of Flux.1
_READ = ("hidden_states.9", "hidden_states.18", "hidden_states.27")  # by FLUX.2 klein


@dataclass(frozen=True)
class Conditions:
    """How a denoiser comes to know caption and picture.

    Attributes:
        outputs: By text encoder, the outputs that are kept for a condition; what several keep for one is joined.
        tokenizers: In the order of the text encoders.
        has_size: Whether it is told the size of the picture and of what was cut out of it, in `time_ids`.
        embeds_empty: Whether guidance embeds the empty prompt; else it tells zeros.
        parts: Where tokens of all text encoders, side by side, part; they have as many each where nothing is said.
        marked: Whether tokens that pad are below zero, and text encoders are told which those are.
        tells_mask: Whether the denoiser is told too, in `mask`.
        asks: How it is asked.
    """

    outputs: Mapping[str, Mapping[str, Sequence[str]]] = field(
        default_factory=lambda: {"text_encoder": {"context": ("last_hidden_state",)}}
    )
    tokenizers: Sequence[str] = ("tokenizer",)
    has_size: bool = False
    embeds_empty: bool = True
    parts: Sequence[int] = ()
    marked: bool = False
    tells_mask: bool = False
    asks: Asks = field(default_factory=AsksUNet)

    @classmethod
    def of(cls, folder: Path) -> "Conditions":
        """Those of an exported folder.

        Raises:
            InputError: A config is missing, or says what is not known here.
        """
        return cls._of_transformer(folder) if (folder / "transformer").is_dir() else cls._of_unet(folder)

    @classmethod
    def _of_unet(cls, folder: Path) -> "Conditions":
        added = read_json(folder / "unet" / "config.json").get("addition_embed_type")
        if not added:
            return cls()
        if added != "text_time":
            raise InputError(f"{folder / 'unet'} has addition_embed_type {added!r}, which is not known here")
        first, second = (_last_but_one(folder / name) for name in ("text_encoder", "text_encoder_2"))
        index = read_json(folder / "model_index.json")
        outputs = {
            "text_encoder": {"context": (first,)},
            "text_encoder_2": {"context": (second,), "text_embeds": ("text_embeds",)},
        }
        embeds_empty = not index.get("force_zeros_for_empty_prompt", True)
        return cls(outputs, ("tokenizer", "tokenizer_2"), has_size=True, embeds_empty=embeds_empty)

    @classmethod
    def _of_transformer(cls, folder: Path) -> "Conditions":
        config = read_json(folder / "transformer" / "config.json")
        kind = config.get("_class_name")
        if kind == "FluxTransformer2DModel":
            outputs = {
                "text_encoder": {"text_embeds": ("pooler_output",)},
                "text_encoder_2": {"context": ("last_hidden_state",)},
            }
            length = read_json(folder / "text_encoder" / "config.json").get("max_position_embeddings", 77)
            asks = AsksFlux(USUAL_GUIDANCE if config.get("guidance_embeds") else None)
            return cls(outputs, ("tokenizer", "tokenizer_2"), parts=(length,), asks=asks)
        if kind == "Flux2Transformer2DModel" and not config.get("guidance_embeds", True):
            return cls({"text_encoder": {"context": _READ}}, marked=True, asks=AsksFlux2())
        if kind == "ZImageTransformer2DModel":
            return cls(marked=True, tells_mask=True, asks=AsksZImage())
        raise InputError(f"{folder / 'transformer'} is a {kind} that is not known here")

    def of_size(self, height: int, width: int, count: int) -> Told:
        """What is told of `count` pictures of this size in pixels, of which nothing was cut off."""
        numbers = np.array([[height, width, 0, 0, height, width]], dtype=np.float32)
        return {"time_ids": np.repeat(numbers, count, axis=0)} if self.has_size else {}

    def given(self, tokens: Tokens) -> Iterator[tuple[str, Mapping[str, Sequence[str]], dict[str, NDArray[Any]]]]:
        """Of every text encoder, its name, the outputs that are kept of it, and its inputs for tokens of B captions."""
        side_by_side = tokens.reshape(len(tokens), -1)
        parts = np.split(side_by_side, list(self.parts) or len(self.outputs), axis=1)
        for (name, outputs), own in zip(self.outputs.items(), parts, strict=True):
            ids = np.where(own >= 0, own, ~own)
            mask = {"attention_mask": (own >= 0).astype(np.int64)} if self.marked else {}
            yield name, outputs, {"input_ids": ids, **mask}

    def of_tokens(self, tokens: Tokens) -> Told:
        """What is told of the tokens themselves: 1 for each that does not pad."""
        return {"mask": (tokens >= 0).astype(np.float32)} if self.tells_mask else {}


def _last_but_one(encoder: Path) -> str:
    """The output of a text encoder that holds its last hidden states but one."""
    layers = read_json(encoder / "config.json").get("num_hidden_layers")
    if not isinstance(layers, int):
        raise InputError(f"{encoder / 'config.json'} has num_hidden_layers {layers!r}; export the model again")
    return f"hidden_states.{layers - 1}"
