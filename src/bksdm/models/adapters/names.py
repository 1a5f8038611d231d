"""The layers of a pipeline by the names that files of others give them.

Trainers write a layer's path with dots (diffusers, peft) or with underscores in their place (kohya's scripts, LyCORIS),
in the numbering of diffusers or in that of the original checkpoints, behind a prefix of their own.
"""

import re
from collections.abc import Mapping

from torch import nn

from bksdm.common.errors import InputError
from bksdm.families.unet.names import UNET, unet_places

TEXT_PREFIX, PEFT_PREFIX = "text_model.", "base_model.model."
_PREFIXES = (
    ("lora_unet_", "unet"),
    ("unet.", "unet"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te_", "text_encoder"),
    ("text_encoder.", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("text_encoder_2.", "text_encoder_2"),
    ("lycoris_", None),
    (PEFT_PREFIX, None),
    ("", None),
)
# Attentions had processors of their own once, and the text encoder's projections the names of the U-Net's.
_OLDER = (
    (re.compile(r"\.processor\.to_(q|k|v)_lora$"), r".to_\1"),
    (re.compile(r"\.processor\.to_out_lora$"), r".to_out.0"),
    (re.compile(r"(self_attn)\.to_(q|k|v|out)(_lora)?$"), r"\1.\2_proj"),
)


class Names:
    """What finds a layer by the name that a file gives it.

    Arguments:
        networks: By their names in a pipeline: `unet`, `text_encoder`; on any device.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.parts = tuple(networks)
        self._paths = {part: _paths(part, network) for part, network in networks.items()}

    def find(self, name: str) -> str | None:
        """The layer as `unet.PATH` or, without `text_model.`, `text_encoder.PATH`; None where there is none."""
        for old, new in _OLDER:
            name = old.sub(new, name)
        prefix, part = next(pair for pair in _PREFIXES if name.startswith(pair[0]))
        flat = _flat(name.removeprefix(prefix)).removeprefix(_flat(TEXT_PREFIX))
        for known in self._paths if part is None else (part,):
            if path := self._paths.get(known, {}).get(flat):
                return f"{known}.{path}"
        return None


def layer_module(networks: Mapping[str, nn.Module], layer: str) -> nn.Module:
    """The module of a layer, `unet.PATH` or `text_encoder.PATH`."""
    part, _, path = layer.partition(".")
    network = networks[part]
    try:
        return network.get_submodule(path)
    except AttributeError:
        return network.get_submodule(TEXT_PREFIX + path)


def kohyas_name(layer: str) -> str:
    """The name of a layer, `unet.PATH` or `text_encoder.PATH`, in kohya's scripts, which all programs read."""
    part, _, path = layer.partition(".")
    return f"lora_unet_{_flat(path)}" if part == "unet" else f"lora_te_{_flat(TEXT_PREFIX + path)}"


def diffusers_name(layer: str) -> str:
    """The same as diffusers and older transformers write it."""
    part, _, path = layer.partition(".")
    return layer if part == "unet" else f"{part}.{TEXT_PREFIX}{path}"


def _paths(part: str, network: nn.Module) -> dict[str, str]:
    """The paths of a network's layers by their names without dots."""
    weights = [name.removesuffix(".weight") for name, _ in network.named_parameters() if name.endswith(".weight")]
    paths = {_flat(path): path for path in (name.removeprefix(TEXT_PREFIX) for name in weights)}
    assert len(paths) == len(weights)
    if part == "unet":
        paths |= {_flat(name): path for path, name in _original_names(weights) if _flat(name) not in paths}
    return paths


def _original_names(paths: list[str]) -> list[tuple[str, str]]:
    """Pairs of a layer of a U-Net and its name in original checkpoints, where that layout has names for it."""
    try:
        places = unet_places(f"{path}.weight" for path in paths)
    except InputError:
        return []
    return [
        (key.removesuffix(".weight"), p.name.removeprefix(UNET).removesuffix(".weight")) for key, p in places.items()
    ]


def _flat(path: str) -> str:
    return path.replace(".", "_")
