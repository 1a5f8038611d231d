"""Layers that transformers have in common, and what lets them run."""

from collections.abc import Iterator, Sequence
from typing import TypeGuard

from bksdm.families.layers import Layer, are_sizes, linear, norm, products
from bksdm.families.recipe import Config


def joint_attention(
    path: str, width: int, head: int, picture: int, caption: int, *, bias: bool = True
) -> Iterator[Layer]:
    """The attention of a block for picture and caption apart, both of which look at both.

    Arguments:
        path: Of the attention.
        width: Channels of the hidden states.
        head: Channels of a head.
        picture, caption: Tokens of each.
        bias: Whether its layers have one.
    """
    both = picture + caption
    for name in "qkv":
        yield linear(f"{path}.to_{name}", width, width, picture, bias=bias)
        yield linear(f"{path}.add_{name}_proj", width, width, caption, bias=bias)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield norm(f"{path}.{name}", head, bias=False)
    yield products(path, both, both, width)
    yield linear(f"{path}.to_out.0", width, width, picture, bias=bias)
    yield linear(f"{path}.to_add_out", width, width, caption, bias=bias)


def of_two_stacks(whole: Config, *sizes: str, axes: int) -> bool:
    """Whether the config of a transformer with two stacks makes one that runs, as far as is known here.

    Arguments:
        whole: The config.
        sizes: Entries that are numbers of channels, besides those that all have.
        axes: How many numbers tell the place of a token.
    """
    every = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", *sizes)
    return (
        are_sizes(*(whole[name] for name in every))
        and whole["patch_size"] == 1
        and whole["out_channels"] in (None, whole["in_channels"])
        and isinstance(whole["guidance_embeds"], bool)
        and turns(whole["axes_dims_rope"], axes, whole["attention_head_dim"])
    )


def turns(dims: object, axes: int, head: int) -> bool:
    """Whether rotary embeddings of `dims` channels for each of so many axes fill a head of so many channels."""
    return has_sizes(dims, axes) and sum(dims) == head and all(dim % 2 == 0 for dim in dims)


def has_sizes(value: object, count: int) -> TypeGuard[Sequence[int]]:
    """Whether an entry lists so many whole numbers above 0."""
    return isinstance(value, (list, tuple)) and len(value) == count and are_sizes(*value)


def are_numbers(*values: object) -> bool:
    """Whether these are numbers above 0."""
    return all(type(value) in (int, float) and value > 0 for value in values)  # type: ignore[operator]
