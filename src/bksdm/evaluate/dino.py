"""Features of pictures alone, from a self-supervised vision transformer (DINO, arXiv 2104.14294)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel

from bksdm.common.hub import is_id, missing, not_loaded
from bksdm.evaluate.encoder import LOADING_ERRORS, colour_statistics, standardized

_BATCH = 32
_SIDE = 224


@dataclass(frozen=True)
class Dino:
    """A vision transformer whose first token stands for the picture, and the colours it was trained on."""

    network: nn.Module
    mean: Tensor
    std: Tensor
    side: int

    @classmethod
    def load(cls, source: str, device: torch.device) -> "Dino":
        """From a folder or a Hub id, in float32.

        Raises:
            InputError: There is no such network, or its weights are not safetensors.
        """
        if not Path(source).is_dir() and not is_id(source):
            raise missing("dino", source, "the folder of a vision transformer or a hub id (OWNER/NAME)")
        try:
            network = AutoModel.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
            )
            mean, std = colour_statistics(source)
            side = int(getattr(network.config, "image_size", _SIDE))
        except LOADING_ERRORS as error:
            raise not_loaded("dino", source, "is no folder or hub id of a vision transformer", error) from error
        return cls(network.eval().to(device), mean.to(device), std.to(device), side)

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features with shape (N, D), not normalised."""
        found = []
        for start in range(0, len(pictures), _BATCH):
            pixels = standardized(pictures[start : start + _BATCH], self.side, self.mean, self.std)
            found.append(self.network(pixel_values=pixels).last_hidden_state[:, 0])
        return torch.cat(found)
