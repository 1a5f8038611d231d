"""LoRA matrices beside a pipeline's attention (arXiv 2106.09685), by peft, in the file that diffusers loads."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from bksdm.errors import InputError
from bksdm.randomness import derived_seed
from bksdm.recipe import Pruning
from bksdm.runs import files_digest

LORA_FILE = "pytorch_lora_weights.safetensors"
_TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
_TEXTS, _PREFIX = "text_encoder.", "text_model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.\w+)?\.weight")


@dataclass(frozen=True)
class Lora:
    """A LoRA and how strongly it counts.

    Attributes:
        source: A `.safetensors` file, or a folder with `pytorch_lora_weights.safetensors`.
        scale: 1 as it was made, 0 not at all.
    """

    source: str
    scale: float = 1.0


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


def add_lora(networks: Mapping[str, nn.Module], rank: int, seed: int) -> Learnt:
    """Freeze networks and put matrices beside the projections of their attentions, which change nothing yet.

    Arguments:
        networks: `unet`, and `text_encoder` where it learns too.
        rank: Of the matrices; their scale is 1.
        seed: Of the first of each two matrices; the second is zero.

    Raises:
        InputError: peft is not installed.
    """
    check_peft()
    from peft import LoraConfig  # noqa: PLC0415

    for part, network in networks.items():
        network.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=_TARGETS[part])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "lora"))
            network.add_adapter(config)  # type: ignore[operator]
        cast_training_params(network, torch.float32)
    return Learnt(networks)


def save_lora(networks: Mapping[str, nn.Module], folder: Path) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `load_lora_weights` of a diffusers pipeline takes."""
    from peft.utils import get_peft_model_state_dict  # noqa: PLC0415

    state = {
        f"{part}.{name}": tensor
        for part, network in networks.items()
        for name, tensor in get_peft_model_state_dict(network).items()
    }
    write_lora(state, folder / LORA_FILE)


def merge_lora(pipeline: StableDiffusionPipeline, lora: str | Path, scale: float = 1.0) -> StableDiffusionPipeline:
    """Add a LoRA to a pipeline's weights, so that nothing is slower for it.

    Arguments:
        pipeline: Changed in place.
        lora: A `.safetensors` file, or a folder with `pytorch_lora_weights.safetensors`.
        scale: How strongly it counts.

    Raises:
        InputError: There is no such LoRA, or it was not made for this model; stock loading would leave out the layers
            that it does not find, and put others in the wrong places, without a word.
    """
    state = read_lora(lora_file(lora))
    check_fits(state, {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}, lora)
    pipeline.load_lora_weights(dict(state))
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    return pipeline


def lora_fingerprint(lora: str | None) -> str | None:
    """A digest of a LoRA's file; None for none.

    Raises:
        InputError: There is no such LoRA.
    """
    return None if lora is None else files_digest([lora_file(lora)])


def lora_file(lora: str | Path) -> Path:
    """The file of a LoRA.

    Raises:
        InputError: There is none, or it is no safetensors file.
    """
    path = Path(lora).expanduser()
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"lora {lora} does not exist; give a .safetensors file, or a folder with {LORA_FILE}")
    if file.suffix != ".safetensors":
        raise InputError(f"lora {lora} is not a .safetensors file; others are not loaded")
    return file


def read_lora(file: Path) -> dict[str, Tensor]:
    r"""The matrices of a LoRA in peft's names, `unet.MODULE.lora_A.weight` (A) and `lora_B` (B), at scale 1.

    What $\alpha / r$ a file gives is multiplied into B, so that the weights' change is B A.

    Arguments:
        file: In the names of diffusers, of peft or of kohya's scripts.

    Raises:
        InputError: It is damaged, or no LoRA.
    """
    check_peft()
    try:
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            file.parent, weight_name=file.name, use_safetensors=True, local_files_only=True, return_lora_metadata=True
        )
        matrices = {name: tensor for name, tensor in _in_pefts_names(state).items() if _MATRIX.fullmatch(name)}
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"lora {file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not matrices:
        raise InputError(f"lora {file} has no matrices of a LoRA; give the file of one")
    scales = _scales(matrices, alphas or {}, metadata or {})
    return {
        name: tensor * scales[match["module"]]
        if (match := _MATRIX.fullmatch(name)) and match["side"] == "B"
        else tensor
        for name, tensor in matrices.items()
    }


def carried(state: Mapping[str, Tensor], pruning: Pruning) -> tuple[dict[str, Tensor], list[str]]:
    """A LoRA of a teacher as one of its student, and the modules that it changed and the student has not.

    Arguments:
        state: As `read_lora` gives it.
        pruning: Which layer of the student is which of the teacher.
    """
    kept: dict[str, Tensor] = {}
    gone: dict[str, None] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        key = pruning.student_key(rest) if part == "unet" else rest
        if key is None:
            gone[name.partition(".lora_")[0]] = None
        else:
            kept[f"{part}.{key}"] = tensor
    return kept, list(gone)


def write_lora(state: Mapping[str, Tensor], file: Path) -> None:
    """Write matrices in peft's names as a file that `load_lora_weights` of a diffusers pipeline takes.

    Names of the text encoder get the prefix that transformers 5 has dropped: older tools look for it.
    """
    named = {
        f"{_TEXTS}{_PREFIX}{name.removeprefix(_TEXTS).removeprefix(_PREFIX)}"
        if name.startswith(_TEXTS)
        else name: tensor
        for name, tensor in state.items()
    }
    save_file({name: t.detach().cpu().contiguous() for name, t in named.items()}, file, metadata={"format": "pt"})


def widths(state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Of every module that a LoRA changes, `unet.MODULE` or `text_encoder.MODULE`, what it takes and what it gives."""
    found: dict[str, dict[str, int]] = {}
    for name, tensor in state.items():
        if match := _MATRIX.fullmatch(name):
            size = tensor.shape[1] if match["side"] == "A" else tensor.shape[0]
            found.setdefault(match["module"], {})[match["side"]] = size
    return {module: (sides.get("A", 0), sides.get("B", 0)) for module, sides in found.items()}


def check_fits(state: Mapping[str, Tensor], networks: Mapping[str, nn.Module], lora: str | Path) -> None:
    """Refuse a LoRA that changes layers which a model does not have, or has with other widths.

    Arguments:
        state: As `read_lora` gives it.
        networks: By their names; modules of others are not looked at.
        lora: What to call it.

    Raises:
        InputError: Naming the first such layer.
    """
    own = {
        f"{part}.{name.removeprefix(_PREFIX)}": module
        for part, network in networks.items()
        for name, module in network.named_modules()
    }
    wanted = {name: sizes for name, sizes in widths(state).items() if name.partition(".")[0] in networks}
    lacking = [name for name in wanted if name not in own]
    if lacking:
        raise InputError(
            f"lora {lora} changes {len(lacking)} of {len(wanted)} layers that this model does not have, first "
            f"{lacking[0]}; if it was made for the teacher of this student, carry it over with bksdm adapt"
        )
    for name, (takes, gives) in wanted.items():
        weight = getattr(own[name], "weight", None)
        if weight is None or (weight.shape[1], weight.shape[0]) != (takes, gives):
            there = "no weights" if weight is None else f"{weight.shape[1]} to {weight.shape[0]}"
            raise InputError(
                f"lora {lora} is of another family: its {name} is {takes} to {gives}, and the model's {there}"
            )


def _in_pefts_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of files of before peft too; each network's names have their own history."""
    unet = {name: tensor for name, tensor in state.items() if not name.startswith(_TEXTS)}
    texts = {name.replace(f"{_TEXTS}{_PREFIX}", _TEXTS): state[name] for name in state if name not in unet}
    named = convert_unet_state_dict_to_peft(unet)
    prefixed = {name if name.startswith("unet.") else f"unet.{name}": tensor for name, tensor in named.items()}
    return prefixed | (convert_state_dict_to_peft(convert_state_dict_to_diffusers(texts)) if texts else {})


def _scales(
    matrices: Mapping[str, Tensor], alphas: Mapping[str, float], metadata: Mapping[str, Any]
) -> dict[str, float]:
    """Alpha over rank of every module: of kohya's files one each, of others in the file's metadata, else 1."""
    named = _in_pefts_names({name.removesuffix(".alpha"): torch.tensor(alpha) for name, alpha in alphas.items()})
    given = {match["module"]: float(alpha) for name, alpha in named.items() if (match := _MATRIX.fullmatch(name))}
    found = {}
    for name, tensor in matrices.items():
        match = _MATRIX.fullmatch(name)
        if match and match["side"] == "A":
            module, rank = match["module"], tensor.shape[0]
            part, _, rest = module.partition(".")
            patterns = metadata.get(f"{part}.alpha_pattern") or {}
            alpha = given.get(module, patterns.get(rest, metadata.get(f"{part}.lora_alpha", rank)))
            found[module] = float(alpha) / rank
    return found
