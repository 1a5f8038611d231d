"""What Flux.1 and FLUX.2 answer alike: two stacks, and guidance that some of them were taught."""

from typing import ClassVar

import torch
from torch import Tensor

from bksdm.families.family import Denoiser
from bksdm.families.stack.family import StackFamily
from bksdm.families.stack.structure import Stack


class TwoStacks(StackFamily):
    """A family with double-stream blocks, for picture and caption apart, before single-stream blocks for both.

    Attributes:
        usual_guidance: What models that were taught guidance are told: that of diffusers' pipeline.
    """

    stacks = (Stack("transformer_blocks", "num_layers"), Stack("single_transformer_blocks", "num_single_layers"))
    usual_guidance: ClassVar[float]

    def guidance(self, denoiser: Denoiser, latents: Tensor) -> Tensor | None:
        """What a denoiser is told of guidance, with shape (B,); None where it was not taught any."""
        taught = getattr(denoiser, "config", {}).get("guidance_embeds")
        return torch.full((len(latents),), self.usual_guidance, device=latents.device) if taught else None
