"""What looks at the pictures: one network for distances between distributions, and a CLIP for captions.

In the protocol of the paper these are the Inception network of the FID literature and CLIP ViT-g/14;
in the domain of the embedded model, its own dual encoder is both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.common.runs import digest
from bksdm.evaluate.encoder import DualEncoder
from bksdm.evaluate.inception import FEATURES as INCEPTION_FEATURES
from bksdm.evaluate.inception import Inception
from bksdm.models.digests import network_digest

_BATCH = 32

# What the features of a picture are called in the blocks on the disk.
FEATURES, LOGITS, IMAGE, TEXT, PLAIN = "features", "logits", "image", "text", "plain"


@dataclass(frozen=True)
class Networks:
    """The networks of an evaluation, on their device.

    Attributes:
        device: Where they are.
        encoder: Gives features of pictures and captions in one space, or None where captions are not compared.
        inception: Gives the features that distances compare; without it, the encoder does.
        logits: Whether the Inception Score is wanted too, which resizes another way and so takes a second pass.
    """

    device: torch.device
    encoder: DualEncoder | None
    inception: Inception | None = None
    logits: bool = False

    @property
    def size(self) -> int:
        """Length D of the features that distances compare."""
        return INCEPTION_FEATURES if self.inception else self._needed.size

    @cached_property
    def digest(self) -> str:
        """A short name for what the networks compute."""
        encoder = self.encoder and network_digest(self.encoder.clip)
        return digest([encoder, self.inception and self.inception.digest, self.logits])

    def look(self, pictures: Sequence[Image.Image], captions: Sequence[str] | None) -> Mapping[str, Tensor]:
        """Features of N pictures, and of their captions where there are any.

        Returns:
            `features` with shape (N, D), `logits` (N, 1008), `image` (N, C) and `text` (N, C), where they are wanted;
            and `plain` (N,), 1 for a picture of one colour. All in float32 on the CPU.
        """
        found: dict[str, Tensor] = {PLAIN: torch.tensor([_is_plain(picture) for picture in pictures])}
        if self.inception:
            found[FEATURES] = self._inception(pictures, "pytorch-fid", "features")
            if self.logits:
                found[LOGITS] = self._inception(pictures, "torch-fidelity", "logits")
        if self.encoder:
            found[IMAGE] = self.encoder.image_features(pictures)
            if captions is not None:
                found[TEXT] = self.encoder.text_features(captions)
            if not self.inception:
                found[FEATURES] = found[IMAGE].clone()
        return {name: values.float().cpu().contiguous() for name, values in found.items()}

    @property
    def _needed(self) -> DualEncoder:
        assert self.encoder, "distances need a network"
        return self.encoder

    @torch.no_grad()
    def _inception(self, pictures: Sequence[Image.Image], resize: str, output: str) -> Tensor:
        assert self.inception
        sizes = {picture.size for picture in pictures}
        if len(sizes) > 1:
            raise InputError(f"the pictures have mixed sizes, such as {_sizes(sizes)}; give pictures of one size")
        found = []
        for start in range(0, len(pictures), _BATCH):
            pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures[start : start + _BATCH]])
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(self.device)
            found.append(getattr(self.inception(batch, resize), output))
        return torch.cat(found)


def _is_plain(picture: Image.Image) -> bool:
    bands = picture.convert("RGB").split()
    return all(low == high for low, high in (band.getextrema() for band in bands))


def _sizes(sizes: set[tuple[int, int]]) -> str:
    first, second, *_ = sorted(sizes)
    return f"{first[0]}x{first[1]} and {second[0]}x{second[1]}"
