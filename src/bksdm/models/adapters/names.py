"""The layers of a pipeline by the names that files of others give them.

Trainers write a layer's path with dots (diffusers, peft) or with underscores in their place (kohya's scripts, LyCORIS),
in the numbering of diffusers or in that of the original checkpoints, behind a prefix of their own.
"""

import re
from collections.abc import Mapping

from torch import nn

from bksdm.families.family import Family
from bksdm.families.originals import Joined

TEXT_PREFIX, PEFT_PREFIX = "text_model.", "base_model.model."
_ORIGINAL = ("model.diffusion_model.", "diffusion_model.")
_OF_ANY = ("lycoris_", PEFT_PREFIX, "")
_OUTSIDE = ("text_projection",)  # layers of a text encoder that are not in `text_model`
# Attentions had processors of their own once, and the text encoder's projections the names of the U-Net's.
_OLDER = (
    (re.compile(r"\.processor\.to_(q|k|v)_lora$"), r".to_\1"),
    (re.compile(r"\.processor\.to_out_lora$"), r".to_out.0"),
    (re.compile(r"(self_attn)\.to_(q|k|v|out)(_lora)?$"), r"\1.\2_proj"),
)


class Names:
    """What finds a layer by the name that a file gives it.

    Arguments:
        networks: By their names in a pipeline, such as `unet` and `text_encoder`; on any device.
        family: Of the pipeline.
    """

    def __init__(self, networks: Mapping[str, nn.Module], family: Family) -> None:
        self._prefixes = [*prefixes(family), *((prefix, None) for prefix in _OF_ANY)]
        self._paths = {part: _paths(network) for part, network in networks.items()}
        known = self._paths[family.denoiser]
        original = family.original_paths(known.values())
        known |= {_flat(name): path for path, name in original.items() if _flat(name) not in known}
        self._denoiser = family.denoiser
        self._joined = {_flat(name): joined for name, joined in family.joined(set(known.values())).items()}

    def joined(self, name: str) -> Joined | None:
        """What `Family.joined` knows of this name, with parts as `find` has them."""
        part, flat = self._parted(name)
        found = self._joined.get(flat) if part in (None, self._denoiser) else None
        return found and Joined(tuple(f"{self._denoiser}.{path}" for path in found.parts), found.turned)

    def find(self, name: str) -> str | None:
        """The layer as `unet.PATH` or, without `text_model.`, `text_encoder.PATH`; None where there is none."""
        for old, new in _OLDER:
            name = old.sub(new, name)
        part, flat = self._parted(name)
        flat = flat.removeprefix(_flat(TEXT_PREFIX))
        for known in self._paths if part is None else (part,):
            if path := self._paths.get(known, {}).get(flat):
                return f"{known}.{path}"
        return None

    def _parted(self, name: str) -> tuple[str | None, str]:
        """The network that a name tells, if any, and the layer in it, without dots."""
        prefix, part = next(pair for pair in self._prefixes if name.startswith(pair[0]))
        return part, _flat(name.removeprefix(prefix))


def prefixes(family: Family) -> list[tuple[str, str]]:
    """What names of layers begin with where they tell the network, and that network."""
    parts = (family.denoiser, *family.encoders)
    kohyas = [(prefix, part) for part in parts for prefix in family.lora_prefixes[part]]
    return [*kohyas, *((f"{part}.", part) for part in parts), *((prefix, family.denoiser) for prefix in _ORIGINAL)]


def layer_module(networks: Mapping[str, nn.Module], layer: str) -> nn.Module:
    """The module of a layer, `unet.PATH` or `text_encoder.PATH`."""
    part, _, path = layer.partition(".")
    network = networks[part]
    try:
        return network.get_submodule(path)
    except AttributeError:
        return network.get_submodule(TEXT_PREFIX + path)


def kohyas_name(layer: str, family: Family) -> str:
    """The name of a layer, `unet.PATH` or `text_encoder.PATH`, in kohya's scripts, which all programs read."""
    part, _, path = diffusers_name(layer, family).partition(".")
    return f"{family.lora_prefixes[part][0]}{_flat(path)}"


def diffusers_name(layer: str, family: Family) -> str:
    """The same as diffusers and older transformers write it."""
    part, _, path = layer.partition(".")
    inside = part != family.denoiser and not path.startswith(_OUTSIDE)
    return f"{part}.{TEXT_PREFIX}{path}" if inside else layer


def _paths(network: nn.Module) -> dict[str, str]:
    """The paths of a network's layers by their names without dots."""
    weights = [name.removesuffix(".weight") for name, _ in network.named_parameters() if name.endswith(".weight")]
    paths = {_flat(path): path for path in (name.removeprefix(TEXT_PREFIX) for name in weights)}
    assert len(paths) == len(weights)
    return paths


def _flat(path: str) -> str:
    return path.replace(".", "_")
