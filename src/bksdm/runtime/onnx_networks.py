"""The networks of an ONNX folder, computed by onnxruntime."""

from pathlib import Path

import numpy as np

from bksdm.runtime.networks import Array, Tokens


class OnnxNetworks:
    """Placeholder until the runtime package is merged: sessions by folder."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime as ort

        o = ort.SessionOptions()
        o.add_session_config_entry("session.disable_quant_qdq", "1")
        self._s = {
            n: ort.InferenceSession(str(folder / n / "model.onnx"), o)
            for n in ("text_encoder", "unet", "vae_decoder", "vae_encoder")
        }

    def encode(self, tokens: Tokens) -> Array:
        return self._s["text_encoder"].run(None, {"input_ids": tokens})[0]

    def predict(self, latents: Array, timestep: float, context: Array) -> Array:
        return self._s["unet"].run(
            None, {"sample": latents, "timestep": np.array([timestep], np.int64), "encoder_hidden_states": context}
        )[0]

    def decode(self, latents: Array) -> Array:
        return self._s["vae_decoder"].run(None, {"latent_sample": latents})[0]

    def moments(self, pixels: Array) -> Array:
        return self._s["vae_encoder"].run(None, {"sample": pixels})[0]
