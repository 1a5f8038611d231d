"""`bksdm adapt`: a LoRA, a textual inversion or a ControlNet that was made for a teacher, for its student.

A student's layers are numbered anew. What was made for the teacher names layers by its numbers, so that stock loading
leaves some of it out and puts some on other layers, without a word.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bksdm.adapters.controlnet import SELECTION_FILE, Selection, load_controlnet
from bksdm.adapters.lora import LORA_FILE, carried, check_fits, lora_file, read_lora, widths, write_lora
from bksdm.errors import InputError
from bksdm.families import skip_connections
from bksdm.models import load_config, load_unet_config
from bksdm.options import AdaptOptions
from bksdm.prune import as_list, checked_pruning
from bksdm.recipe import Config, Pruning
from bksdm.runs import check_free, files_digest, replace_folder, run_files, write_text

RESULT_FILE = "adapted.json"
_OF_THE_ENCODER = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")


@dataclass(frozen=True)
class Adapted:
    """What became of an adapter.

    Attributes:
        kind: lora, textual_inversion or controlnet.
        out: Where it lies.
        kept: How many modules it changes in the student; of a ControlNet, how many residuals the student takes.
        dropped: The teacher's modules that it changed and the student has not.
        moved: The teacher's module -> the student's, where they differ.
    """

    kind: str
    out: Path
    kept: int
    dropped: tuple[str, ...]
    moved: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"out": str(self.out), "dropped": list(self.dropped)}

    def text(self) -> str:
        lines = [f"{self.kind.replace('_', ' ')} in {self.out}: {self.kept} kept, {len(self.dropped)} dropped"]
        lines += [f"  moved    {there} -> {here}" for there, here in self.moved.items()]
        return "\n".join(lines + [f"  dropped  {name}" for name in self.dropped])


def adapt(options: AdaptOptions) -> Adapted:
    """Carry an adapter over to a student.

    Raises:
        InputError: The adapter, the teacher or the student is unfit; see the message.
    """
    teacher = load_unet_config(options.teacher)
    pruning = checked_pruning(options.teacher, options.model, teacher, load_unet_config(options.model))
    source, out = Path(options.adapter).expanduser(), Path(options.out)
    is_controlnet = (source / "config.json").is_file()
    files = sorted(file for file in source.glob("*") if file.is_file()) if is_controlnet else [lora_file(source)]
    settings = dataclasses.asdict(options) | {"adapter_content": files_digest(files)}
    check_free(out, "adapt", settings, ("json",))
    try:
        with replace_folder(out) as partial:
            if is_controlnet:
                made = _controlnet(source, teacher, pruning, partial)
            elif vectors := _inversion(files[0]):
                made = _same_words(files[0], vectors, options, partial)
            else:
                made = _lora(files[0], teacher, pruning, partial)
            for name, text in run_files("adapt", settings).items():
                write_text(partial / name, text)
            made = dataclasses.replace(made, out=out)
            write_text(partial / RESULT_FILE, json.dumps(made.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    return made


def _lora(file: Path, teacher: Config, pruning: Pruning, folder: Path) -> Adapted:
    state = read_lora(file)
    _check_teacher(file, state, teacher)
    kept, dropped = carried(state, pruning)
    if not kept:
        raise InputError(f"lora {file} changes none of the layers that the student has kept; train one on the student")
    write_lora(kept, folder / LORA_FILE)
    modules = {name: pruning.student_key(name.removeprefix("unet.")) for name in widths(state) if "unet." in name}
    moved = {there: f"unet.{here}" for there, here in modules.items() if here and there != f"unet.{here}"}
    return Adapted("lora", folder, len(widths(kept)), tuple(dropped), moved)


def _check_teacher(file: Path, state: Mapping[str, Tensor], teacher: Config) -> None:
    """Refuse a LoRA that was not made for this teacher."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(teacher)
    check_fits(state, {"unet": unet}, file)


def _inversion(file: Path) -> dict[str, Tensor]:
    """The vectors of a textual inversion by the name of their entry, if the file is one."""
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"adapter {file} cannot be read: {' '.join(str(error).split())[:200]}") from error
    few = len(tensors) == 1 and not any("lora" in name for name in tensors)
    return tensors if few and all(tensor.ndim <= 2 for tensor in tensors.values()) else {}


def _same_words(file: Path, vectors: dict[str, Tensor], options: AdaptOptions, folder: Path) -> Adapted:
    """A student has its teacher's text encoder, so that vectors of words go over as they are."""
    width, own = next(iter(vectors.values())).shape[-1], load_config(options.model, "text_encoder")["hidden_size"]
    if width != own:
        raise InputError(
            f"textual inversion {file} has vectors of {width} numbers, and the text encoder of {options.model} takes "
            f"{own}; it is of another family"
        )
    shutil.copyfile(file, folder / file.name)
    return Adapted("textual_inversion", folder, 1, (), {})


def _controlnet(source: Path, teacher: Config, pruning: Pruning, folder: Path) -> Adapted:
    config = load_controlnet(source).config
    for key in _OF_THE_ENCODER:
        ours, theirs = config.get(key), teacher.get(key)
        if as_list(ours) != as_list(theirs):
            raise InputError(
                f"controlnet {source} is not of this teacher: its {key} is {ours}, and the teacher's {theirs}"
            )
    selection = Selection.of(pruning, teacher)
    for file in source.glob("*"):
        if file.name == "config.json" or file.suffix == ".safetensors":
            shutil.copyfile(file, folder / file.name)
    write_text(folder / SELECTION_FILE, json.dumps(selection.to_dict(), indent=2) + "\n")
    whole, own = skip_connections(teacher), skip_connections(pruning.student_config)
    dropped = [path for path in whole if path not in selection.taps] + ([] if selection.mid else ["mid_block"])
    moved = {there: here for there, here in zip(selection.taps, own, strict=True) if there != here}
    return Adapted("controlnet", folder, len(own) + selection.mid, tuple(dropped), moved)
