"""What the U-Net of a folder is told besides noisy latents and their timestep, as the configs there say.

All that the torch-free runtime knows of kinds of model is here; `bksdm.families` has the same in torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bksdm.common.errors import InputError
from bksdm.runtime.files import read_json
from bksdm.runtime.networks import Told

# What conditions are called as inputs of an exported network, where that is another name.
INPUTS = {"context": "encoder_hidden_states"}


@dataclass(frozen=True)
class Conditions:
    """How a U-Net comes to know caption and picture.

    Attributes:
        outputs: By text encoder, the output that is kept for a condition; what several keep for one is joined.
        tokenizers: In the order of the text encoders.
        has_size: Whether it is told the size of the picture and of what was cut out of it, in `time_ids`.
        embeds_empty: Whether guidance embeds the empty prompt; else it tells zeros.
    """

    outputs: Mapping[str, Mapping[str, str]] = field(
        default_factory=lambda: {"text_encoder": {"context": "last_hidden_state"}}
    )
    tokenizers: Sequence[str] = ("tokenizer",)
    has_size: bool = False
    embeds_empty: bool = True

    @classmethod
    def of(cls, folder: Path) -> "Conditions":
        """Those of an exported folder.

        Raises:
            InputError: A config is missing, or says what is not known here.
        """
        added = read_json(folder / "unet" / "config.json").get("addition_embed_type")
        if not added:
            return cls()
        if added != "text_time":
            raise InputError(f"{folder / 'unet'} has addition_embed_type {added!r}, which is not known here")
        first, second = (_last_but_one(folder / name) for name in ("text_encoder", "text_encoder_2"))
        index = read_json(folder / "model_index.json")
        return cls(
            {"text_encoder": {"context": first}, "text_encoder_2": {"context": second, "text_embeds": "text_embeds"}},
            ("tokenizer", "tokenizer_2"),
            has_size=True,
            embeds_empty=not index.get("force_zeros_for_empty_prompt", True),
        )

    def of_size(self, height: int, width: int, count: int) -> Told:
        """What is told of `count` pictures of this size in pixels, of which nothing was cut off."""
        numbers = np.array([[height, width, 0, 0, height, width]], dtype=np.float32)
        return {"time_ids": np.repeat(numbers, count, axis=0)} if self.has_size else {}


def _last_but_one(encoder: Path) -> str:
    """The output of a text encoder that holds its last hidden states but one."""
    layers = read_json(encoder / "config.json").get("num_hidden_layers")
    if not isinstance(layers, int):
        raise InputError(f"{encoder / 'config.json'} has num_hidden_layers {layers!r}; export the model again")
    return f"hidden_states.{layers - 1}"
