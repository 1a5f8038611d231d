"""The networks of an OpenVINO folder, computed by openvino."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bksdm.runtime.networks import Array, Tokens

_FILE = "openvino_model.xml"


class OpenVinoNetworks:
    """Networks that are read and compiled when they are first asked for.

    Arguments:
        folder: What `bksdm export --to openvino` wrote.
        threads: Of the CPU; as many as OpenVINO likes by default.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        import openvino  # noqa: PLC0415

        self._folder, self._core = folder, openvino.Core()
        # Processors with half precision in hardware would else use it.
        self._settings = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = str(threads)
        self._compiled: dict[str, openvino.CompiledModel] = {}

    def encode(self, tokens: Tokens) -> Array:
        return self._computed("text_encoder", {"input_ids": tokens})

    def predict(self, latents: Array, timestep: float, context: Array) -> Array:
        given = {"sample": latents, "timestep": np.array([timestep], np.int64), "encoder_hidden_states": context}
        return self._computed("unet", given)

    def decode(self, latents: Array) -> Array:
        return self._computed("vae_decoder", {"latent_sample": latents})

    def moments(self, pixels: Array) -> Array:
        return self._computed("vae_encoder", {"sample": pixels})

    def _computed(self, name: str, inputs: Mapping[str, Array | Tokens]) -> Array:
        """The first output; a copy, for the next call writes over it."""
        if name not in self._compiled:
            self._compiled[name] = self._core.compile_model(self._folder / name / _FILE, "CPU", self._settings)
        return np.array(self._compiled[name](dict(inputs))[0])
