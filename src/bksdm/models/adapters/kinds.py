"""What kind of adapter a file or a folder holds, by the names of its tensors or by its config."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bksdm.common.errors import InputError, one_line
from bksdm.families import families_for
from bksdm.models.parts import find_weights

Choice = TypeVar("Choice")
LORA, WORDS = "LoRA", "textual inversion"
CONTROLNET, T2I_ADAPTER, IP_ADAPTER, MOTION = "ControlNet", "T2I-Adapter", "IP-Adapter", "motion module"
_CHECKPOINT, _CONTROL_LORA = "whole checkpoint", "Control-LoRA"
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
WORD_FILE = "learned_embeds.safetensors"
_CONTROLNETS = [family.controlnet for family in families_for("adapt") if family.controlnet]
_CONFIGS = {**dict.fromkeys(_CONTROLNETS, CONTROLNET), "T2IAdapter": T2I_ADAPTER, "MotionAdapter": MOTION}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# The first that any name of a tensor has.
_MARKS = (
    (re.compile(r"^lora_controlnet$"), _CONTROL_LORA),
    (re.compile(r"^ip_adapter\."), IP_ADAPTER),
    (re.compile(r"\bmotion_modules\."), MOTION),
    (re.compile(r"^(control_model\.)?(input_hint_block|zero_convs)\.|^controlnet_cond_embedding\."), CONTROLNET),
    (re.compile(r"^(adapter\.)?body\.\d+\."), T2I_ADAPTER),
    (re.compile(r"^model\.diffusion_model\.input_blocks\.0\.0\.weight$|^conv_in\.weight$"), _CHECKPOINT),
    (re.compile("|".join(f"^{name}$" for family in families_for("adapt") for name in family.words if name)), WORDS),
    (
        re.compile(r"[._](lora|hada|lokr|ia3)[._]|\.(diff|diff_b|w_norm|on_input|oft_blocks|alpha)$|^bundle_emb\."),
        LORA,
    ),
)


def kind_of(source: Path) -> str:
    """What a file or folder is.

    Raises:
        InputError: There is none, it is damaged, or it is nothing that is known.
    """
    name = class_name(source)
    if name is not None:
        if name not in _CONFIGS:
            raise InputError(f"adapter {source} is a folder of {name}; give one of {', '.join(_CONFIGS)}, or a LoRA")
        return _CONFIGS[name]
    if (source / PEFT_CONFIG).is_file():
        return LORA
    file = adapter_file(source)
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"adapter {file} cannot be read: {one_line(error)}") from error
    return _by_names(file, shapes)


def named(kind: str) -> str:
    """A kind with its article."""
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def adapter_file(source: str | Path) -> Path:
    """The file of an adapter that is one file, or a folder with one.

    Raises:
        InputError: There is none, or it is no safetensors file.
    """
    path = Path(source).expanduser()
    file = path
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if class_name(path) is not None and (weights := find_weights(path)):
            found = list(weights.files)
        named = [path / name for name in (LORA_FILE, PEFT_FILE, WORD_FILE) if (path / name) in found]
        pickled = sorted(file for file in path.iterdir() if file.suffix in _PICKLES)
        if not found and pickled:
            file = pickled[0]
        elif len(named) != 1 and len(found) != 1:
            what = f"several files, such as {found[0].name} and {found[1].name}" if found else "no .safetensors file"
            raise InputError(f"adapter {source} is a folder with {what}; give the file")
        else:
            file = (named or found)[0]
    if not file.is_file():
        raise InputError(f"adapter {source} does not exist; give a .safetensors file, or a folder with one")
    if file.suffix in _PICKLES:
        raise InputError(f"adapter {file} is a pickle, which is never loaded; give its .safetensors")
    if file.suffix.lower() != ".safetensors":
        raise InputError(f"adapter {file} is not a .safetensors file; others are not loaded")
    return file


def peft_config_beside(file: Path) -> Path | None:
    """peft's config of a file of matrices: in its folder, where there is no doubt that it is this one's."""
    config = file.with_name(PEFT_CONFIG)
    alone = file.name == PEFT_FILE or len(list(file.parent.glob("*.safetensors"))) == 1
    return config if alone and config.is_file() else None


def read_header(file: Path) -> dict[str, str]:
    """What the header of a file says besides names and shapes.

    Raises:
        InputError: It is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(f"adapter {file} cannot be read: {one_line(error)}") from error


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and what its header says besides.

    Eight-bit floats become half floats, which hold the same numbers.

    Raises:
        InputError: It is damaged, or has tensors that are no finite floats.
    """
    header = read_header(file)
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"adapter {file} cannot be read: {one_line(error)}") from error
    for name, tensor in tensors.items():
        whole = not tensor.is_floating_point()
        if whole and tensor.numel() > 1:
            raise InputError(f"adapter {file} has {name} in {str(tensor.dtype).removeprefix('torch.')}; give floats")
        tensors[name] = tensor if whole or tensor.dtype.itemsize > 1 else tensor.to(torch.float16)
        if not whole and not tensors[name].isfinite().all():
            raise InputError(f"adapter {file} is damaged: {name} has numbers that are not finite")
    return tensors, header


def read_choice(file: Path, of: Callable[[Any], Choice]) -> Choice:
    """What `bksdm adapt` wrote beside an adapter.

    Arguments:
        file: As JSON.
        of: What makes it of the values.

    Raises:
        InputError: It is damaged.
    """
    try:
        return of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error}); run bksdm adapt again") from error


def write_tensors(tensors: Mapping[str, Tensor], file: Path, header: Mapping[str, str]) -> None:
    """Write what `read_tensors` reads."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, file, metadata=dict(header) or None)


def _by_names(file: Path, shapes: Mapping[str, list[int]]) -> str:
    for mark, kind in _MARKS:
        if any(mark.search(name) for name in shapes):
            if kind in (_CHECKPOINT, _CONTROL_LORA):
                raise InputError(
                    f"adapter {file} is {named(kind)}, which cannot be carried to another model; give an adapter"
                )
            return kind
    if shapes and all(len(shape) in (1, 2) and ("." not in name or name[0] == "<") for name, shape in shapes.items()):
        return WORDS
    first = next(iter(shapes), "no tensor")
    raise InputError(f"adapter {file} is no adapter that is known (it has {first}); docs/guides/adapters.md lists them")


def class_name(folder: Path) -> str | None:
    """The class of diffusers whose folder this is; None where it is no such folder.

    Raises:
        InputError: Its config is damaged.
    """
    config = folder / "config.json"
    if not config.is_file():
        return None
    try:
        values = dict(json.loads(config.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{config} is no config of an adapter ({one_line(error)}); copy the folder again") from error
    return str(values["_class_name"]) if "_class_name" in values else None
