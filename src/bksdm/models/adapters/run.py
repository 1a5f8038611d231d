"""`bksdm adapt`: what was made for a teacher, such as a LoRA or a ControlNet, for its student.

A student's layers are numbered anew. What was made for the teacher names layers by its numbers, so that stock loading
leaves some of it out and puts some on other layers, without a word.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.common.runs import check_free, files_digest, replace_folder, run_files, write_text
from bksdm.common.tables import listed
from bksdm.families import family_claiming, family_of, skip_connections
from bksdm.families.family import Family
from bksdm.families.recipe import Config, Pruning
from bksdm.models.adapters import ip_adapter, kinds, motion
from bksdm.models.adapters.block_controlnet import Places, inherited, with_those_that_went
from bksdm.models.adapters.controlnet import SELECTION_FILE, Selection, load_controlnet, read_single_file
from bksdm.models.adapters.kinds import LORA_FILE, adapter_file, kind_of, named, read_tensors, write_tensors
from bksdm.models.adapters.lora import carried, check_fits
from bksdm.models.adapters.lora_files import check_made_for, lora_files, read_lora
from bksdm.models.adapters.lora_out import diffusers_leaves_out, write_lora
from bksdm.models.adapters.t2i_adapter import check_scale, widths_of
from bksdm.models.adapters.words import check_widths, read_words, write_words
from bksdm.models.configs import check_ready, load_config, load_denoiser_config
from bksdm.models.parts import copy_part
from bksdm.options.adapt import AdaptOptions
from bksdm.pruning.told import checked_pruning

RESULT_FILE = "adapted.json"
_OF_THE_ENCODER = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
_OF_THE_BLOCKS = (
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "dim",
    "n_heads",
)
_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Adapted:
    """What became of an adapter.

    Attributes:
        kind: What it is, as `bksdm.models.adapters.kinds` calls it.
        out: Where it lies.
        kept: How many modules it changes in the student; of what gives residuals, how many the student takes.
        dropped: The teacher's modules that it changed and the student has not.
        moved: The teacher's module -> the student's, where they differ.
    """

    kind: str
    out: Path
    kept: int
    dropped: tuple[str, ...] = ()
    moved: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def by_places(cls, kind: str, out: Path, places: Mapping[str, str | None]) -> "Adapted":
        """From the teacher's modules with the student's, or None."""
        kept = {there: here for there, here in places.items() if here is not None}
        gone = tuple(there for there, here in places.items() if here is None)
        return cls(kind, out, len(kept), gone, {there: here for there, here in kept.items() if there != here})

    def to_dict(self) -> dict[str, Any]:
        kind = self.kind.lower().replace(" ", "_").replace("-", "_")
        return dataclasses.asdict(self) | {"kind": kind, "out": str(self.out), "dropped": list(self.dropped)}

    def text(self) -> str:
        lines = [f"{self.kind} in {self.out}: {self.kept} kept, {len(self.dropped)} dropped"]
        lines += [f"  moved    {there} -> {here}" for there, here in self.moved.items()]
        return "\n".join(lines + [f"  dropped  {name}" for name in self.dropped])


@dataclass(frozen=True)
class _Pair:
    """Teacher and student, without their weights."""

    options: AdaptOptions
    teacher: Config
    pruning: Pruning

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        return self.family.outline(self.teacher)

    @cached_property
    def student(self) -> UNet2DConditionModel:
        return self.family.outline(self.pruning.student_config)

    @cached_property
    def family(self) -> Family:
        return family_of(self.teacher)

    @cached_property
    def networks(self) -> dict[str, nn.Module]:
        """The teacher's, of which the text encoders are the student's too."""
        made: dict[str, nn.Module] = {self.family.denoiser: self.unet}
        encoders = {name: load_config(self.options.model, name) for name in self.family.encoders}
        return made | {name: self.family.outline(config, name) for name, config in encoders.items()}

    @cached_property
    def text_widths(self) -> list[int]:
        return [load_config(self.options.model, name)["hidden_size"] for name in self.family.encoders]


def adapt(options: AdaptOptions) -> Adapted:
    """Carry an adapter over to a student.

    Raises:
        InputError: The adapter, the teacher or the student is unfit; see the message.
    """
    check_ready("adapt", options.teacher)
    teacher = load_denoiser_config(options.teacher)
    pruning = checked_pruning(options.teacher, options.model, teacher, load_denoiser_config(options.model))
    source, out = Path(options.adapter).expanduser(), Path(options.out)
    kind, family = kind_of(source), family_of(teacher)
    if kind not in family.adapters:
        raise InputError(
            f"adapter {source} is {named(kind)}, which is not carried over for {family.name}; give one of "
            f"{', '.join(family.adapters)}"
        )
    _check_teachers(source, kind)
    settings = dataclasses.asdict(options) | {"adapter_content": files_digest(_files(source, kind))}
    check_free(out, "adapt", settings, ("json",))
    try:
        with replace_folder(out) as partial:
            made = _CARRY[kind](source, _Pair(options, teacher, pruning), partial)
            for name, text in run_files("adapt", settings).items():
                write_text(partial / name, text)
            made = dataclasses.replace(made, out=out)
            write_text(partial / RESULT_FILE, json.dumps(made.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    return made


def _check_teachers(source: Path, kind: str) -> None:
    """Refuse what was carried over before: its layers have a student's numbers. Words have none."""
    file = (source if source.is_dir() else source.parent) / RESULT_FILE
    if file.is_file() and kind != kinds.WORDS:
        raise InputError(f"adapter {source} was carried over to a student already; give the one of the teacher")


def _files(source: Path, kind: str) -> list[Path]:
    if kinds.class_name(source):
        return sorted(file for file in source.glob("*") if file.is_file())
    return lora_files(source) if kind == kinds.LORA else [adapter_file(source)]


def _lora(source: Path, pair: _Pair, folder: Path) -> Adapted:
    check_made_for(source, None)
    weights = read_lora(source, pair.networks, pair.family)
    check_fits(weights, pair.networks, pair.family, source, "give one of this teacher")
    kept, dropped = carried(weights, pair.pruning, pair.family.denoiser)
    if not kept.layers and not kept.words:
        raise InputError(
            f"lora {source} changes none of the layers that the student has kept; train one on the student"
        )
    for word, vectors in kept.words.items():
        check_widths(word, vectors, pair.text_widths)
    if kept.words:
        say(f"it brings the words {listed(list(kept.words))}")
    if not kept.layers:
        write_words(kept.words, folder, pair.family)
        return Adapted(kinds.WORDS, folder, len(kept.words), tuple(dropped))
    write_lora(kept, folder / LORA_FILE, pair.family, pair.pruning.recipe)
    if diffusers_leaves_out(kept.layers):
        say("stock diffusers reads this LoRA without its DoRA magnitudes; bksdm, ComfyUI and InvokeAI read it whole")
    places = dict(zip((layer for layer in weights.layers if layer not in dropped), kept.layers, strict=True))
    return Adapted.by_places(kinds.LORA, folder, places | dict.fromkeys(dropped))


def _words(source: Path, pair: _Pair, folder: Path) -> Adapted:
    """A student has its teacher's text encoders, so that vectors of words go over as they are."""
    words = read_words(adapter_file(source), pair.family)
    for word, vectors in words.items():
        check_widths(word, vectors, pair.text_widths)
    write_words(words, folder, pair.family)
    return Adapted(kinds.WORDS, folder, len(words))


def _controlnet(source: Path, pair: _Pair, folder: Path) -> Adapted:
    own = kinds.class_name(source)
    if own not in (None, pair.family.controlnet):
        raise InputError(
            f"controlnet {source} is a {own}, and {pair.family.name} has a {pair.family.controlnet}; give one"
        )
    if depths := pair.family.depths(pair.teacher):
        return _block_controlnet(source, pair, folder, depths)
    if own:
        network = load_controlnet(source)
        if not pair.family.claims(network.config):
            made_for = family_claiming(network.config).name
            raise InputError(f"controlnet {source} is of {made_for}; give one of {pair.family.name}")
        _check_config("controlnet", source, network.config, pair.teacher, _OF_THE_ENCODER)
        copy_part(source, folder)
    else:
        network = read_single_file(adapter_file(source), pair.unet, pair.family)
        network.save_pretrained(folder)
    selection = Selection.of(pair.pruning, pair.teacher)
    write_text(folder / SELECTION_FILE, json.dumps(selection.to_dict(), indent=2) + "\n")
    whole, kept = skip_connections(pair.teacher), skip_connections(pair.pruning.student_config)
    places: dict[str, str | None] = dict.fromkeys(whole) | dict(zip(selection.taps, kept, strict=True))
    return Adapted.by_places(kinds.CONTROLNET, folder, places | {"mid_block": "mid_block" if selection.mid else None})


def _block_controlnet(source: Path, pair: _Pair, folder: Path, depths: Mapping[str, int]) -> Adapted:
    """One whose residuals are for blocks by their numbers."""
    if not kinds.class_name(source):
        wanted = f"give the folder of a {pair.family.controlnet}"
        raise InputError(f"controlnet {source} is one file, which is not read for {pair.family.name}; {wanted}")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _check_config("controlnet", source, config, pair.teacher, [key for key in _OF_THE_BLOCKS if key in config])
    kept = inherited(pair.pruning, pair.family.depths(pair.pruning.student_config))
    given: dict[str, Iterable[int]] = {stack: range(depth) for stack, depth in depths.items()}
    taken: dict[str, tuple[int | None, ...]] = dict(kept)
    if some := config.get("control_layers_places"):
        given = dict.fromkeys(depths, some)
        taken = {stack: with_those_that_went(numbers, some) for stack, numbers in kept.items()}
    copy_part(source, folder)
    write_text(folder / SELECTION_FILE, json.dumps(Places(taken, depths).to_dict(), indent=2) + "\n")
    here = {f"{stack}.{there}": f"{stack}.{own}" for stack in taken for own, there in enumerate(taken[stack])}
    whole = [f"{stack}.{number}" for stack, numbers in given.items() for number in numbers]
    return Adapted.by_places(kinds.CONTROLNET, folder, {path: here.get(path) for path in whole})


def _t2i_adapter(source: Path, pair: _Pair, folder: Path) -> Adapted:
    file = adapter_file(source)
    theirs, ours = (pair.family.stage_residuals(c) for c in (pair.teacher, pair.pruning.student_config))
    tensors, widths = read_tensors(file)[0], list(theirs.values())
    own = widths_of(tensors, len(widths))
    if own != widths:
        raise InputError(
            f"T2I-Adapter {source} gives residuals of {own} channels, and the teacher's stages have {widths}; it is of "
            f"another family, so give one of this teacher"
        )
    halvings = len(load_config(pair.options.model, "vae")["block_out_channels"]) - 1
    check_scale(tensors, pair.family.shrinks * 2**halvings, source)
    copy_part(source, folder) if kinds.class_name(source) else shutil.copyfile(file, folder / file.name)
    return Adapted.by_places(kinds.T2I_ADAPTER, folder, {path: path if path in ours else None for path in theirs})


def _ip_adapter(source: Path, pair: _Pair, folder: Path) -> Adapted:
    file = adapter_file(source)
    tensors, header = read_tensors(file)
    theirs, ours = (ip_adapter.attentions(unet.attn_processors) for unet in (pair.unet, pair.student))
    try:
        ip_adapter.check_widths(tensors, theirs, pair.unet.state_dict())
        kept, places = ip_adapter.renumbered(tensors, theirs, ours, pair.pruning)
    except InputError as error:
        raise InputError(f"IP-Adapter {file} does not fit this teacher: {error}") from error
    write_tensors(kept, folder / file.name, header)
    return Adapted.by_places(kinds.IP_ADAPTER, folder, places)


def _motion(source: Path, pair: _Pair, folder: Path) -> Adapted:
    file, student = adapter_file(source), pair.pruning.student_config
    tensors, header = read_tensors(file)
    if kinds.class_name(source):
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        _check_config("motion module", source, config, pair.teacher, ("block_out_channels",))
        write_text(folder / "config.json", json.dumps(motion.student_config(config, student), indent=2) + "\n")
    motion.check_layers(tensors, pair.unet.state_dict(), file)
    try:
        kept, places = motion.renumbered(tensors, pair.pruning)
    except InputError as error:
        raise InputError(f"motion module {file} is not read: {error}") from error
    write_tensors(kept, folder / (_WEIGHTS if source.is_dir() else file.name), header)
    return Adapted.by_places(kinds.MOTION, folder, places)


_CARRY: dict[str, Callable[[Path, _Pair, Path], Adapted]] = {
    kinds.LORA: _lora,
    kinds.WORDS: _words,
    kinds.CONTROLNET: _controlnet,
    kinds.T2I_ADAPTER: _t2i_adapter,
    kinds.IP_ADAPTER: _ip_adapter,
    kinds.MOTION: _motion,
}


def _check_config(what: str, source: Path, own: Mapping[str, Any], teacher: Config, keys: Iterable[str]) -> None:
    """Refuse what was made for a U-Net of another config."""
    for key in keys:
        ours, theirs = own.get(key), teacher.get(key)
        if _as_list(ours) != _as_list(theirs):
            raise InputError(f"{what} {source} is not of this teacher: its {key} is {ours}, and the teacher's {theirs}")


def _as_list(value: object) -> object:
    """An entry of a config as its file has it: files know no tuples."""
    return list(value) if isinstance(value, tuple) else value
