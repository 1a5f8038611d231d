"""Z-Image: two blocks each refine picture and caption, then one stack of blocks takes both together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Encoding
from torch import Tensor, nn

from bksdm.families.family import Denoiser, Shapes, Told
from bksdm.families.recipe import Config
from bksdm.families.stack.family import StackFamily
from bksdm.families.stack.structure import Stack
from bksdm.families.stack.texts import chat, hidden_states, marked


class ZImage(StackFamily):
    """Z-Image, as `ZImageTransformer2DModel`. The blocks that refine stay: there are two of each."""

    name = "Z-Image"
    tag = "z-image"
    pipeline = "ZImagePipeline"
    from_image = "ZImageImg2ImgPipeline"
    under_mask = "ZImageInpaintPipeline"
    networks = {  # noqa: RUF012
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "Qwen3Model",
    }
    stacks = (Stack("layers", "n_layers", "attention"),)
    signs = ("cap_feat_dim", "t_scale")
    inputs = ("in_channels", "cap_feat_dim", "all_patch_size")
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    text_outputs = (("last_hidden_state", "hidden_states"),)
    of_caption = ("context", "mask")
    unguided = 0.0

    def width(self, config: Config) -> int:
        return int(self._structure.whole(config)["dim"])

    def why_not(self, config: Config) -> str | None:
        if config.get("siglip_feat_dim"):
            return f"it takes pictures too (siglip_feat_dim is {config['siglip_feat_dim']})"
        return super().why_not(config)

    def misfit(self, configs: Mapping[str, Config]) -> str | None:
        gives, takes = configs["text_encoder"]["hidden_size"], configs["transformer"].get("cap_feat_dim", 2560)
        if gives != takes:
            return f"its text encoder gives embeddings of width {gives}, and its transformer takes {takes}"
        return None

    def condition_shapes(self, config: Config, tokens: int) -> Shapes:
        return {"context": (tokens, self._structure.whole(config)["cap_feat_dim"]), "mask": (tokens,)}

    def prompted(self, tokenizer: Any, caption: str) -> str:
        return chat(tokenizer, caption, thinks=True)

    def tokens(self, encodings: Sequence[Encoding]) -> Tensor:
        return marked(encodings[0])

    def embedded(self, encoders: Sequence[nn.Module], input_ids: Tensor) -> Told:
        """The last hidden states but one, and 1 for each token that does not pad, exact in every number format."""
        found, mask = hidden_states(encoders[0], input_ids)
        return {"context": found[-2], "mask": mask.float()}

    def answer(self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        """It is told how far the picture is, and answers with what the way back is."""
        context = told["context"]
        lengths = [len(one) if one.is_meta else int(one.bool().sum()) for one in told["mask"]]
        output = denoiser(
            list(latents.unsqueeze(2).unbind()),
            (1000 - timesteps.expand(len(latents))) / 1000,
            [one[:length] for one, length in zip(context, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(output).squeeze(2)
