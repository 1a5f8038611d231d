"""Features of pictures alone, from a self-supervised vision transformer (DINO, arXiv 2104.14294)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel

from bksdm.data.pictures import to_pixels
from bksdm.errors import InputError

_BATCH = 32
_SIDE = 224
_ERRORS = (
    SafetensorError,
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)


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
        try:
            network = AutoModel.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
            )
            local = Path(source) / "preprocessor_config.json"
            file = local if Path(source).is_dir() else Path(hf_hub_download(source, local.name))
            colours = json.loads(file.read_text())
            mean, std = (torch.tensor(colours[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
            side = int(getattr(network.config, "image_size", _SIDE))
        except _ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"dino {source} is no folder or hub id of a vision transformer: {reason}") from error
        return cls(network.eval().to(device), mean.to(device), std.to(device), side)

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features with shape (N, D), not normalised."""
        found = []
        for start in range(0, len(pictures), _BATCH):
            pixels = torch.stack([to_pixels(picture, self.side) for picture in pictures[start : start + _BATCH]])
            pixels = ((pixels.to(self.mean.device) + 1) / 2 - self.mean) / self.std
            found.append(self.network(pixel_values=pixels).last_hidden_state[:, 0])
        return torch.cat(found)
