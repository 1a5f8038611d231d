"""Z-Image: two blocks each refine picture and caption, then one stack of blocks takes both together."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Encoding
from torch import Tensor, nn

from bksdm.families.family import Denoiser, Shapes, Told
from bksdm.families.graph import Graph
from bksdm.families.originals import Joined
from bksdm.families.recipe import Config
from bksdm.families.stack.family import StackFamily
from bksdm.families.stack.graph import reader_graph
from bksdm.families.stack.structure import Stack
from bksdm.families.stack.texts import chat, has_no_data, hidden_states, marked
from bksdm.families.zimage.graph import zimage_graph
from bksdm.runtime.defaults import Defaults

_THINKS = "{%- set enable_thinking = true %}"


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
    adapters = ("LoRA", "ControlNet")
    controlnet = "ZImageControlNetModel"
    originals = {  # noqa: RUF012
        **{
            f"{stack}.{{n}}.attention.qkv": Joined(tuple(f"{stack}.{{n}}.attention.to_{name}" for name in "qkv"))
            for stack in ("layers", "noise_refiner", "context_refiner")
        },
        **{
            f"{stack}.{{n}}.attention.out": Joined((f"{stack}.{{n}}.attention.to_out.0",))
            for stack in ("layers", "noise_refiner", "context_refiner")
        },
        "x_embedder": Joined(("all_x_embedder.2-1",)),
        "final_layer.linear": Joined(("all_final_layer.2-1.linear",)),
        "final_layer.adaLN_modulation.1": Joined(("all_final_layer.2-1.adaLN_modulation.1",)),
    }
    original_others = {  # noqa: RUF012
        f"{stack}.{{n}}.attention.{name}_norm.weight": f"{stack}.{{n}}.attention.norm_{name}.weight"
        for stack in ("layers", "noise_refiner", "context_refiner")
        for name in "qk"
    }
    names_stay = True
    lora_sign = r"(^|[._])(layers|(noise|context)_refiner)[._]\d+[._](attention|feed_forward|adaLN)"
    unguided = 0.0
    usual = Defaults(50, 5.0)

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

    def picture_tokens(self, count: int) -> slice:
        return slice(count)

    def condition_shapes(self, config: Config, tokens: int) -> Shapes:
        return {"context": (tokens, self._structure.whole(config)["cap_feat_dim"]), "mask": (tokens,)}

    def caption_length(self, config: Config) -> int:
        return min(self.usual_tokens, int(config.get("max_position_embeddings", self.usual_tokens)))

    def token_lengths(self, tokenizers: Sequence[Any]) -> list[int]:
        """As many as its pipeline reads, which leaves padding out, or fewer where the tokenizer takes no more."""
        return [min(self.usual_tokens, tokenizer.model_max_length) for tokenizer in tokenizers]

    def prompted(self, tokenizer: Any, caption: str) -> str:
        return chat(tokenizer, caption, thinks=True)

    def tokenizer_for_readers(self, tokenizer: Any) -> Any:
        """openvino-genai asks its chat for no thoughts, as FLUX.2's; diffusers leaves room for them."""
        made = copy.deepcopy(tokenizer)
        made.chat_template = _THINKS + tokenizer.chat_template
        return made

    def tokens(self, encodings: Sequence[Encoding]) -> Tensor:
        return marked(encodings[0])

    def embedded(self, encoders: Sequence[nn.Module], input_ids: Tensor) -> Told:
        """The last hidden states but one, and 1 for each token that does not pad, exact in every number format."""
        found, mask = hidden_states(encoders[0], input_ids)
        return {"context": found[-2], "mask": mask.float()}

    def prompt(self, told: Told, negative: bool = False) -> dict[str, Any]:
        """Of every caption the tokens that do not pad."""
        kept = [one[mask.bool()] for one, mask in zip(told["context"], told["mask"], strict=True)]
        return {f"{'negative_' * negative}prompt_embeds": kept}

    def answer(self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        """It is told how far the picture is, and answers with what the way back is."""
        context = told["context"]
        lengths = [len(one) if has_no_data(one) else int(one.bool().sum()) for one in told["mask"]]
        output = denoiser(
            list(latents.unsqueeze(2).unbind()),
            (1000 - timesteps.expand(len(latents))) / 1000,
            [one[:length] for one, length in zip(context, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(output).squeeze(2)

    def graph(self, denoiser: Any, latents: Tensor, encoders: Sequence[Any]) -> Graph:  # noqa: ARG002
        return zimage_graph(denoiser, latents)

    def text_graphs(self, encoders: Sequence[Any], batch_size: int) -> list[Graph]:
        """The last hidden states but one, called the last as in optimum."""
        (reader,) = encoders
        return [reader_graph(reader, {"last_hidden_state": -2}, batch_size)]
