"""What a denoiser consists of, layer by layer, as its config alone tells: its tensors, and how much they multiply.

A layer's matrix, or its kernel, is multiplied with what comes in at every place of its output, so that its
multiply-accumulates (MACs) are its numbers times its places.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

Shape = tuple[int, ...]
Shapes = dict[str, Shape]  # by name


@dataclass(frozen=True)
class Layer:
    """A layer, or what an attention multiplies besides its layers.

    Attributes:
        path: In the network.
        tensors: Shapes of its tensors, by their names in it.
        places: Places of its output, at batch 1; 0 where nothing is multiplied by its weight.
        products: MACs of the two matrix products of an attention.
    """

    path: str
    tensors: Mapping[str, Shape]
    places: int = 0
    products: int = 0

    @property
    def params(self) -> int:
        """Numbers in its tensors."""
        return sum(map(prod, self.tensors.values()))

    @property
    def macs(self) -> int:
        """MACs of its weight."""
        return self.places * prod(self.tensors["weight"]) if self.places else 0


def linear(path: str, takes: int, gives: int, places: int = 1, *, bias: bool = True) -> Layer:
    """A linear layer."""
    return Layer(path, {"weight": (gives, takes), **({"bias": (gives,)} if bias else {})}, places)


def convolution(path: str, takes: int, gives: int, places: int, side: int = 3) -> Layer:
    """A convolution by a square kernel."""
    return Layer(path, {"weight": (gives, takes, side, side), "bias": (gives,)}, places)


def norm(path: str, width: int, *, bias: bool = True) -> Layer:
    """What scales channels and, if it has a bias, moves them."""
    return Layer(path, {"weight": (width,), **({"bias": (width,)} if bias else {})})


def products(path: str, queries: int, keys: int, width: int) -> Layer:
    """Of queries and keys, and of their softmax and the values, each of so many channels in all heads."""
    return Layer(path, {}, products=2 * queries * keys * width)


def embedding(path: str, takes: int, gives: int, *, bias: bool = True) -> list[Layer]:
    """The two layers by which diffusers embeds a noise level, or what is told like one."""
    return [
        linear(f"{path}.linear_1", takes, gives, bias=bias),
        linear(f"{path}.linear_2", gives, gives, bias=bias),
    ]


def tensor_shapes(layers: Iterable[Layer]) -> Shapes:
    """Shapes of the tensors of layers, by their names in the network."""
    return {
        f"{layer.path}.{name}".removeprefix("."): shape for layer in layers for name, shape in layer.tensors.items()
    }


def said(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says, as diffusers reads it: without its notes, and what it marks as left out."""
    left_out = config.get("_use_default_values") or ()
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in left_out}


def are_sizes(*values: object) -> bool:
    """Whether these are whole numbers above 0."""
    return all(type(value) is int and value > 0 for value in values)
