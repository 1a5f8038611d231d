"""Z-Image: two blocks each refine picture and caption, then one stack of blocks takes both together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bksdm.families.family import Denoiser, Told
from bksdm.families.layers import Layer, Shapes, are_sizes, linear, norm, products
from bksdm.families.originals import Joined
from bksdm.families.recipe import Config
from bksdm.families.stack.family import StackFamily
from bksdm.families.stack.layers import are_numbers, has_sizes, turns
from bksdm.families.stack.structure import Stack
from bksdm.families.stack.texts import chat, has_no_data, hidden_states, marked
from bksdm.runtime.defaults import Defaults

if TYPE_CHECKING:
    from tokenizers import Encoding
    from torch import Tensor, nn

    from bksdm.families.graph import Graph


_TIME_CHANNELS, _TIME_INNER = 256, 1024  # of the embedding of noise levels
_MULTIPLE = 32  # of tokens
_AXES = 3  # by which the place of a token is told
_ADDING = (("ffn_norm2",), ("feed_forward.w2",), ("ffn_norm2",))  # a norm keeps its size whatever comes before it
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
    stacks = (Stack("layers", "n_layers", _ADDING, "attention"),)
    out = "all_final_layer.2-1.linear"
    defaults = {  # noqa: RUF012
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": 2560,
        "siglip_feat_dim": None,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1024, 512, 512],
    }
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

    def runs(self, whole: Config, size: tuple[int, int]) -> bool:
        return (
            are_sizes(*(whole[name] for name in ("in_channels", "dim", "n_heads", "cap_feat_dim")))
            and are_numbers(*(whole[name] for name in ("norm_eps", "rope_theta", "t_scale")))
            and type(whole["n_refiner_layers"]) is int
            and [whole["all_patch_size"], whole["all_f_patch_size"]] in ([[2], [1]], [(2,), (1,)])
            and whole["qk_norm"] is True
            and whole["dim"] % whole["n_heads"] == 0
            and turns(whole["axes_dims"], _AXES, whole["dim"] // whole["n_heads"])
            and has_sizes(whole["axes_lens"], _AXES)
            and all(side % 2 == 0 for side in size)
        )

    def consists_of(self, whole: Config, size: tuple[int, int], tokens: int) -> Iterator[Layer]:
        """Picture and caption are filled up to a multiple of tokens each."""
        width, told = whole["dim"], min(whole["dim"], _TIME_CHANNELS)
        picture, caption = (-(-count // _MULTIPLE) * _MULTIPLE for count in (size[0] * size[1] // 4, tokens))
        squares = 4 * whole["in_channels"]
        yield Layer("", {"x_pad_token": (1, width), "cap_pad_token": (1, width)})
        yield linear("all_x_embedder.2-1", squares, width, picture)
        yield norm("cap_embedder.0", whole["cap_feat_dim"], bias=False)
        yield linear("cap_embedder.1", whole["cap_feat_dim"], width, caption)
        yield linear("t_embedder.mlp.0", _TIME_CHANNELS, _TIME_INNER)
        yield linear("t_embedder.mlp.2", _TIME_INNER, told)
        for stack, count, places in (
            ("noise_refiner", whole["n_refiner_layers"], picture),
            ("context_refiner", whole["n_refiner_layers"], caption),
            ("layers", whole["n_layers"], picture + caption),
        ):
            for number in range(count):
                block = f"{stack}.{number}"
                yield from _block(block, width, width // whole["n_heads"], places)
                if stack != "context_refiner":
                    yield linear(f"{block}.adaLN_modulation.0", told, 4 * width)
        yield linear("all_final_layer.2-1.adaLN_modulation.1", told, width)
        yield linear("all_final_layer.2-1.linear", width, squares, picture + caption)

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
        import torch

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
        from bksdm.families.zimage.graph import zimage_graph

        return zimage_graph(denoiser, latents)

    def text_graphs(self, encoders: Sequence[Any], batch_size: int) -> list[Graph]:
        """The last hidden states but one, called the last as in optimum."""
        from bksdm.families.stack.graph import reader_graph

        (reader,) = encoders
        return [reader_graph(reader, {"last_hidden_state": -2}, batch_size)]


def _block(block: str, width: int, head: int, places: int) -> Iterator[Layer]:
    """A block without what tells it the noise level."""
    attention, inner = f"{block}.attention", int(width / 3 * 8)
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield norm(f"{block}.{name}", width, bias=False)
    for name in "qk":
        yield norm(f"{attention}.norm_{name}", head, bias=False)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield linear(f"{attention}.{name}", width, width, places, bias=False)
    yield products(attention, places, places, width)
    for name, takes, gives in (("w1", width, inner), ("w2", inner, width), ("w3", width, inner)):
        yield linear(f"{block}.feed_forward.{name}", takes, gives, places, bias=False)
