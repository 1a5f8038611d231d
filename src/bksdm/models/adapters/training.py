"""LoRA matrices beside the attentions of a network that is trained (arXiv 2106.09685), by peft."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers.training_utils import cast_training_params
from torch import nn

from bksdm.common.errors import InputError
from bksdm.common.randomness import derived_seed
from bksdm.families.family import Family
from bksdm.families.recipe import Recipe
from bksdm.models.adapters.kinds import LORA_FILE
from bksdm.models.adapters.lora_files import LoraWeights
from bksdm.models.adapters.lora_out import write_lora
from bksdm.models.adapters.names import TEXT_PREFIX

_SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}


class Learnt(nn.Module):
    """Of networks that are frozen for the most part, what learns; the rest stays out of checkpoints."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for part, network in networks.items():
            for name, parameter in network.named_parameters():
                if parameter.requires_grad:
                    self.register_parameter(f"{part}/{name}".replace(".", "/"), parameter)


def check_peft() -> None:
    """Say what to install where peft is missing.

    Raises:
        InputError: Naming the command.
    """
    try:
        import peft  # noqa: F401, PLC0415
    except ImportError as error:
        raise InputError("a LoRA needs peft; run pip install 'bksdm[lora]'") from error


def every_layer(network: nn.Module) -> list[str]:
    """Paths of the linear layers and convolutions of a network."""
    return [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def add_lora(
    networks: Mapping[str, nn.Module], beside: Mapping[str, Sequence[str]], rank: int, seed: int, *, norms: bool = False
) -> Learnt:
    """Freeze networks and put matrices beside some of their layers, which change nothing yet.

    Arguments:
        networks: By their names: the denoiser, and the text encoders where they learn too.
        beside: Paths of layers of each, or ends of paths.
        rank: Of the matrices; their scale is 1.
        seed: Of the first of each two matrices; the second is zero.
        norms: Whether the weights of norms learn too.

    Raises:
        InputError: peft is not installed.
    """
    check_peft()
    from peft import LoraConfig  # noqa: PLC0415

    for part, network in networks.items():
        network.requires_grad_(False)
        targets = list(beside[part])
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "lora"))
            network.add_adapter(config)  # type: ignore[operator]
        if norms:
            for module in network.modules():
                if "Norm" in type(module).__name__:
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(True)
        cast_training_params(network, torch.float32)
    return Learnt(networks)


@torch.no_grad()
def merged_weights(network: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a network that `add_lora` has been at as if it had none, its matrices added, in `dtype`."""
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415

    found = {
        name.replace(".base_layer.", "."): tensor.to(dtype)
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name
    }
    for path, module in network.named_modules():
        if isinstance(module, LoraLayer):
            (adapter,) = module.active_adapters
            delta: torch.Tensor = module.get_delta_weight(adapter)  # type: ignore[attr-defined]
            weight = module.get_parameter("base_layer.weight").float() + delta.float()  # type: ignore[attr-defined]
            found[f"{path}.weight"] = weight.to(dtype)
    return found


def save_lora(networks: Mapping[str, nn.Module], folder: Path, family: Family, recipe: Recipe | None = None) -> None:
    """Write the matrices as `pytorch_lora_weights.safetensors` in kohya's names, which all programs read.

    Arguments:
        networks: As `add_lora` left them.
        folder: Where to.
        family: What they are of.
        recipe: Of the model, where it is a student.
    """
    from peft.utils import get_peft_model_state_dict  # noqa: PLC0415

    layers: dict[str, dict[str, torch.Tensor]] = {}
    for part, network in networks.items():
        for name, tensor in get_peft_model_state_dict(network).items():
            path, _, side = name.removesuffix(".weight").rpartition(".")
            layers.setdefault(f"{part}.{path.removeprefix(TEXT_PREFIX)}", {})[f"{_SIDES[side]}.weight"] = tensor
    write_lora(LoraWeights(layers), folder / LORA_FILE, family, recipe)
