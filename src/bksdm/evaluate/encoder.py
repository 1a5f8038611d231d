"""Features of pictures and captions, from a CLIP model of any size.

The embedded encoder is a small one, trained on the embedded art; a full-size CLIP takes the same
way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from bksdm.common.assets import ART, asset
from bksdm.common.hub import hub_errors, is_id, missing, not_loaded
from bksdm.data.pictures import to_pixels

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

_BATCH = 64
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
LOADING_ERRORS = hub_errors(SafetensorError, OSError, ValueError, KeyError, RuntimeError)


@dataclass(frozen=True)
class DualEncoder:
    """A CLIP model with its tokenizer and the colour statistics it was trained with."""

    clip: CLIPModel
    tokenizer: CLIPTokenizer
    mean: Tensor
    std: Tensor

    @classmethod
    def load(cls, source: str | Path) -> DualEncoder:
        """From the name of an embedded encoder, a folder, or a Hub id.

        Raises:
            InputError: There is no such model, or it is no CLIP.
        """
        folder = asset(ART, "encoder") if str(source) == ART else Path(source)
        where = str(folder) if folder.is_dir() else str(source)
        if not folder.is_dir() and not is_id(source):
            raise missing("encoder", source, "the folder of a CLIP, a hub id (OWNER/NAME) or 'emoji'")
        from transformers import CLIPModel, CLIPTokenizer

        try:
            clip = CLIPModel.from_pretrained(where, use_safetensors=True, dtype=torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(where)
            statistics = colour_statistics(where)
        except LOADING_ERRORS as error:
            raise not_loaded("encoder", where, "is not a CLIP folder or hub id", error) from error
        return cls(clip.eval(), tokenizer, *statistics)

    @property
    def size(self) -> int:
        """Length D of the features."""
        return int(self.clip.config.projection_dim)

    def to(self, device: torch.device) -> DualEncoder:
        """The same encoder on a device."""
        return DualEncoder(self.clip.to(device), self.tokenizer, self.mean.to(device), self.std.to(device))

    @torch.no_grad()
    def image_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Projected features with shape (N, D), not normalised."""
        size = self.clip.config.vision_config.image_size
        features = []
        for start in range(0, len(pictures), _BATCH):
            pixels = standardized(pictures[start : start + _BATCH], size, self.mean, self.std)
            pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
            features.append(self.clip.visual_projection(pooled))
        return torch.cat(features)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Projected features with shape (N, D), not normalised."""
        from bksdm.models.pipelines import tokenizing

        tokenize = tokenizing(self.tokenizer)
        features = []
        for start in range(0, len(captions), _BATCH):
            ids = torch.stack([tokenize(caption) for caption in captions[start : start + _BATCH]]).to(self.mean.device)
            features.append(self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output))
        return torch.cat(features)


def colour_statistics(source: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the colours that a network in a folder or at a Hub id saw, with shape (1, 3, 1, 1).

    They are in `preprocessor_config.json`, or, as transformers 5 writes them, in `processor_config.json`.

    Raises:
        OSError: It has neither.
    """
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in _PROCESSORS):
        raise OSError(f"it has neither {' nor '.join(_PROCESSORS)}")
    from transformers.image_processing_base import ImageProcessingMixin

    colours, _ = ImageProcessingMixin.get_image_processor_dict(source)
    mean, std = (torch.tensor(colours[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    return mean, std


def standardized(pictures: Sequence[Image.Image], side: int, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels of the centre squares with shape (N, 3, side, side), by the statistics and on their device."""
    pixels = torch.stack([to_pixels(picture, side) for picture in pictures])
    return ((pixels.to(mean.device) + 1) / 2 - mean) / std


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities with shape (N, M) of features (N, D) and (M, D)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
