"""Networks that lie in a folder, one below each of the names that optimum gave them.

A network is loaded when it is first asked for. All then stay, so that a second batch waits for nothing; with
`low_memory` only one is held at a time, and the peak is that of the largest alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm.common.errors import InputError
from bksdm.runtime.conditions import Conditions
from bksdm.runtime.files import MANIFEST
from bksdm.runtime.networks import DEEP, Array, Part, Tokens, Told


@dataclass(frozen=True)
class Input:
    """What a network says about one of its inputs.

    Attributes:
        dtype: Its number format.
        shape: Its dimensions; None where one may vary.
    """

    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class Network(ABC):
    """A network that a runtime has loaded."""

    inputs: Mapping[str, Input]

    @abstractmethod
    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """The outputs of these names."""


class FolderNetworks(ABC):
    """The networks of a folder; a runtime says how one of them is loaded."""

    file: str

    def __init__(self, folder: Path, *, low_memory: bool = False) -> None:
        """Take the networks of `folder`; none is loaded yet.

        Arguments:
            folder: With a folder for each network.
            low_memory: Whether a network leaves the memory when another is loaded.
        """
        self._folder = folder
        self._low_memory = low_memory
        self._held: dict[tuple[str, Part], Network] = {}

    @abstractmethod
    def load(self, file: Path, part: Part = "whole") -> Network:
        """A network, or a part of it, from its file.

        Raises:
            InputError: The file cannot be read.
        """

    @abstractmethod
    def is_parted(self, file: Path) -> bool:
        """Whether a network can be loaded in parts."""

    @cached_property
    def _conditions(self) -> Conditions:
        return Conditions.of(self._folder)

    def encode(self, tokens: Tokens) -> Told:
        found: dict[str, list[Array]] = {}
        for name, outputs, given in self._conditions.given(tokens):
            kept = [(condition, output) for condition, several in outputs.items() for output in several]
            made = self._run(name, given, [output for _, output in kept])
            for (condition, _), value in zip(kept, made, strict=True):
                found.setdefault(condition, []).append(value)
        joined = {condition: np.concatenate(values, axis=-1) for condition, values in found.items()}
        return joined | self._conditions.of_tokens(tokens)

    def predict(self, latents: Array, timestep: float, told: Told) -> Array:
        asks = self._conditions.asks
        (output,) = self._run(asks.denoiser, asks.inputs(latents, timestep, told), (asks.output,))
        return asks.answer(output, latents)

    def check_parted(self) -> None:
        folder = self._folder / self._conditions.asks.denoiser
        if not self.is_parted(folder / self.file):
            if (self._folder / MANIFEST).is_file():
                raise InputError(
                    f"{self._folder} is for the web, where nothing is reused; export to onnx for that, or leave it out"
                )
            raise InputError(f"{folder} was exported without what reuse needs; export the model again, or leave it out")

    def keeping(self, latents: Array, timestep: float, told: Told) -> tuple[Array, Array]:
        asks = self._conditions.asks
        given = asks.inputs(latents, timestep, told)
        output, deep = self._run(asks.denoiser, given, (asks.output, DEEP), "keeping")
        return asks.answer(output, latents), deep

    def outer(self, latents: Array, timestep: float, told: Told, deep: Array) -> Array:
        asks = self._conditions.asks
        given = {**asks.inputs(latents, timestep, told), DEEP: deep}
        (output,) = self._run(asks.denoiser, given, (asks.output,), "outer")
        return asks.answer(output, latents)

    def decode(self, latents: Array) -> Array:
        return self._run("vae_decoder", {"latent_sample": latents}, ("sample",))[0]

    def moments(self, pixels: Array) -> Array:
        return self._run("vae_encoder", {"sample": pixels}, ("latent_parameters",))[0]

    def _run(
        self, name: str, given: Mapping[str, NDArray[Any]], outputs: Sequence[str], part: Part = "whole"
    ) -> list[Array]:
        network = self._network(name, part)
        lacking = sorted(given.keys() - network.inputs.keys())
        if lacking:
            raise InputError(f"{self._folder / name} has no input {lacking[0]}; export the model again")
        cast = {key: _as_declared(key, value, network.inputs[key]) for key, value in given.items()}
        return [np.asarray(found, dtype=np.float32) for found in network.run(cast, outputs)]

    def _network(self, name: str, part: Part) -> Network:
        if (name, part) not in self._held:
            file = self._folder / name / self.file
            if not file.is_file():
                raise InputError(f"{file} is missing; export the model again")
            if self._low_memory:  # whose parts are of one network
                self._held = {key: held for key, held in self._held.items() if key[0] == name}
            self._held[name, part] = self.load(file, part)
        return self._held[name, part]


def _as_declared(name: str, value: NDArray[Any], declared: Input) -> NDArray[Any]:
    """A value in the number format and, for a timestep, the shape that a network declares."""
    if name == "timestep" and value.ndim == 0:
        number = float(value)
        if declared.dtype.kind in "iu" and not number.is_integer():
            raise InputError(
                f"this scheduler asks for timestep {number}, and the exported U-Net takes whole ones; "
                f"export the model again, or give --scheduler DDIMScheduler"
            )
        value = np.full([size or 1 for size in declared.shape], number)
    return np.ascontiguousarray(value, dtype=declared.dtype)
