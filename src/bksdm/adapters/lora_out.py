"""LoRAs as files for the programs of others.

Kohya's names with an alpha beside them are what diffusers, ComfyUI, InvokeAI and openvino-genai all read.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bksdm.adapters.layers import layout_of, rank_of, scale_of
from bksdm.adapters.lora_files import WORDS_FOLDER, Layers, LoraWeights
from bksdm.adapters.names import diffusers_name, kohyas_name
from bksdm.adapters.words import write_words

KOHYA_FILE = "lora_kohya.safetensors"


def write_lora(weights: LoraWeights, file: Path) -> None:
    """Write a LoRA in kohya's names, which diffusers, ComfyUI, InvokeAI and openvino-genai read.

    Where diffusers would leave out magnitudes of DoRA or biases under these names, `file` has those of diffusers, and
    `lora_kohya.safetensors` beside it has kohya's for the others. Words that came with it go to files of their own.
    """
    layers = weights.layers
    if layers and _for_diffusers(layers):
        _save(dict(_in_diffusers_names(layers)), file, {"format": "pt"})
        file = file.with_name(KOHYA_FILE)
    if layers:
        named = {f"{kohyas_name(layer)}.{name}": t for layer in layers for name, t in _alphas(layers[layer]).items()}
        _save(named, file, _header(weights))
    if weights.words:
        write_words(weights.words, file.parent / WORDS_FOLDER)


def _alphas(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors with an alpha in all cases: programs do not agree on what none means."""
    rank = rank_of(own)
    return {**own, "alpha": torch.tensor(scale_of(own) * rank)} if rank else dict(own)


def _for_diffusers(layers: Layers) -> bool:
    """Whether stock diffusers reads these matrices, but not under kohya's names."""
    plain = all("lora_down.weight" in own and "lora_mid.weight" not in own for own in layers.values())
    dora = ["dora_scale" in own and own["dora_scale"].shape[0] != 1 for own in layers.values()]
    biased = any("diff_b" in own for own in layers.values())
    return plain and (all(dora) or (biased and not any(dora)))


def _in_diffusers_names(layers: Layers) -> Iterable[tuple[str, Tensor]]:
    """Matrices in the names of diffusers, whose product is the change."""
    for layer, own in layers.items():
        name, down = diffusers_name(layer), own["lora_down.weight"]
        yield f"{name}.lora_A.weight", down
        yield f"{name}.lora_B.weight", (own["lora_up.weight"].float() * scale_of(own)).to(down.dtype)
        if "diff_b" in own:
            yield f"{name}.lora_B.bias", own["diff_b"].to(down.dtype)
        if "dora_scale" in own:
            yield f"{name}.lora_magnitude_vector", _as_pefts(own["dora_scale"], down)


def _as_pefts(magnitude: Tensor, down: Tensor) -> Tensor:
    """Magnitudes by output as peft has them: (N,) for a matrix, (1, N, 1, 1) for a convolution."""
    return magnitude.flatten() if down.ndim == 2 else magnitude.reshape(1, -1, 1, 1)


def _header(weights: LoraWeights) -> dict[str, str]:
    """What kohya's scripts write into a header, as far as it is known; what the source said stays."""
    ranks = {own["lora_down.weight"].shape[0] for own in weights.layers.values() if "lora_down.weight" in own}
    alphas = {float(_alphas(own)["alpha"]) for own in weights.layers.values() if "lora_down.weight" in own}
    plain = all(layout_of(own).name == "LoRA" for own in weights.layers.values())
    made = {
        "format": "pt",
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
        **_version(weights.layers),
    }
    said = {key: value for key, value in weights.header.items() if key.startswith(("ss_", "modelspec."))}
    return made | said


def _version(layers: Layers) -> dict[str, str]:
    """Which Stable Diffusion the layers are of, by the width of the captions that they take."""
    width = next(
        (
            own["lora_down.weight"].shape[1]
            for name, own in layers.items()
            if name.endswith("attn2.to_k") and "lora_down.weight" in own
        ),
        0,
    )
    if width not in (768, 1024):
        return {}
    number = {768: "1", 1024: "2"}[width]
    return {
        "ss_base_model_version": f"sd_v{number}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-v{number}/lora",
    }


def _save(tensors: Mapping[str, Tensor], file: Path, header: Mapping[str, str]) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file, metadata=dict(header))
