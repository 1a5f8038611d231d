"""What Flux.1 and FLUX.2 answer alike: two stacks, and guidance that some of them were taught."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bksdm.families.family import Denoiser, Told
from bksdm.families.originals import Joined
from bksdm.families.recipe import Config
from bksdm.families.stack.family import StackFamily
from bksdm.families.stack.structure import Stack

if TYPE_CHECKING:
    from torch import Tensor

    from bksdm.families.graph import Graph

_ONE_STREAM = {
    "img": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_DOUBLE, _SINGLE = "double_blocks.{n}.", "single_blocks.{n}."


def original_names(
    double: Mapping[str, str], single: Mapping[str, Sequence[str]], ends: Mapping[str, str]
) -> dict[str, Joined]:
    """The layers of either by their original names.

    Arguments:
        double: Of a double-stream block, besides those before attention.
        single: Of a single-stream block.
        ends: What is in no block.
    """
    before = {f"{_DOUBLE}{stream}_attn.qkv": parts for stream, parts in _ONE_STREAM.items()}
    of_double = {f"{_DOUBLE}{name}": (path,) for name, path in double.items()}
    of_single = {f"{_SINGLE}{name}": paths for name, paths in single.items()}
    return {
        **{
            name: Joined(tuple(f"transformer_blocks.{{n}}.{path}" for path in paths))
            for name, paths in (before | of_double).items()
        },
        **{
            name: Joined(tuple(f"single_transformer_blocks.{{n}}.{path}" for path in paths))
            for name, paths in of_single.items()
        },
        **{name: Joined((path,)) for name, path in ends.items()},
        "final_layer.adaLN_modulation.1": Joined(("norm_out.linear",), turned=True),
    }


ORIGINAL_NORMS = {
    **{
        f"double_blocks.{{n}}.{stream}_attn.norm.{name}_norm.scale": f"transformer_blocks.{{n}}.attn.{path}.weight"
        for stream, paths in (("img", ("norm_q", "norm_k")), ("txt", ("norm_added_q", "norm_added_k")))
        for name, path in zip(("query", "key"), paths, strict=True)
    },
    **{
        f"single_blocks.{{n}}.norm.{name}_norm.scale": f"single_transformer_blocks.{{n}}.attn.{path}.weight"
        for name, path in (("query", "norm_q"), ("key", "norm_k"))
    },
}


class TwoStacks(StackFamily):
    """A family with double-stream blocks, for picture and caption apart, before single-stream blocks for both."""

    original_others = ORIGINAL_NORMS
    stacks = (
        Stack("transformer_blocks", "num_layers", (("ff.net.2",), ("ff_context.net.2",))),
        Stack("single_transformer_blocks", "num_single_layers", (("proj_out",),)),
    )
    lora_sign = r"(^|[._])((double|single)_blocks|single_transformer_blocks|transformer_blocks[._]\d+[._]attn[._])"

    def taught_guidance(self, config: Config) -> bool:
        return bool(self._structure.whole(config)["guidance_embeds"])

    def guidance(self, denoiser: Denoiser, latents: Tensor) -> dict[str, Tensor]:
        """What a denoiser is told of guidance, with shape (B,): the usual; nothing where it was not taught any."""
        if not self.taught_guidance(denoiser.config):
            return {}
        import torch

        return {"guidance": torch.full((len(latents),), self.usual.guidance, device=latents.device)}

    @abstractmethod
    def asked(self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, told: Told) -> dict[str, Tensor]:
        """What a denoiser is called with, by name, to answer for latents (B, C, h, w)."""

    @abstractmethod
    def answered(self, output: Tensor, latents: Tensor) -> Tensor:
        """The answer for latents (B, C, h, w), with their shape, from the denoiser's tokens."""

    def answer(self, denoiser: Denoiser, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        given = self.asked(denoiser, latents, timesteps, told)
        return self.answered(denoiser(**{"guidance": None, **given}, return_dict=False)[0], latents)

    def graph(self, denoiser: Any, latents: Tensor, encoders: Sequence[Any]) -> Graph:  # noqa: ARG002
        import torch

        from bksdm.families.stack.graph import TOKENS, token_graph

        shapes = self.condition_shapes(denoiser.config, TOKENS)
        told = {name: torch.zeros(len(latents), *shape) for name, shape in shapes.items()}
        return token_graph(denoiser, self.asked(denoiser, latents, torch.zeros(len(latents)), told))
