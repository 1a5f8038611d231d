"""A student of a teacher's folder, made by copying: of its tensors every byte stays, and no number is read.

What a folder holds is asked of its configs and of the headers of its weights, so that neither torch nor diffusers is
imported. One that does not show by these that it is whole and usual is left to loading (`inherit`), which knows more,
and says what is wrong.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from bksdm.common.errors import InputError
from bksdm.common.runs import write_text
from bksdm.families import derive
from bksdm.families.family import Family
from bksdm.families.layers import Shapes
from bksdm.families.recipe import Config, Pruning, Recipe
from bksdm.models.configs import read_json
from bksdm.models.folders import check_fit, check_folder, complete, copy_parts, named_parts, save_vocabulary
from bksdm.models.parts import PIECE, Stored, copy_weights, find_weights, stored
from bksdm.runtime.schedulers import check_scheduler
from bksdm.runtime.tokens import saved_words

_READ_FORMATS = ("F32", "F16", "BF16")
_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_EXTRACTORS = ("CLIPFeatureExtractor", "CLIPImageProcessor")
_UNREAD = ("safety_checker", "image_encoder")  # which a student has as they are
# What attention was called in VAEs before 2023, which diffusers still reads.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = re.compile(rf"(?<=\.attentions\.0\.)({'|'.join(_OLD_ATTENTION)})(?=\.)")


@dataclass(frozen=True)
class Copy:
    """What a student's folder is copied from.

    Attributes:
        teacher: The teacher's folder.
        family: That it is of.
        index, scheduler: What the files of its pipeline and of its scheduler say.
        config: Of its denoiser, with what it leaves out.
        pixels: To a side of one of the denoiser's latents.
        pruning: What follows from the recipe.
        tensors: Of the student's denoiser, by name, as they lie in the teacher's.
    """

    teacher: Path
    family: Family
    index: Config
    scheduler: Config
    config: dict[str, Any]
    pixels: int
    pruning: Pruning
    tensors: Mapping[str, Stored]

    @classmethod
    def of(cls, teacher: Path, model: str, recipe: Recipe) -> "Copy | None":
        """Of a teacher's folder; None where it has to be loaded to be sure of it.

        Arguments:
            teacher: The folder.
            model: The MODEL that it is.
            recipe: What stays.

        Raises:
            InputError: It is no whole pipeline, or cannot satisfy the recipe.
        """
        family = check_folder(teacher)
        try:
            configs = {name: read_json(teacher / name / "config.json") for name in family.networks}
            index = read_json(teacher / "model_index.json")
            scheduler = read_json(teacher / "scheduler" / "scheduler_config.json")
            tensors = _whole(teacher, family, configs)
            check_fit(family, configs, model)
            if tensors is None or not _is_usual(teacher, family, index, scheduler):
                return None
        except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        config = {**family.defaults, **configs[family.denoiser]}
        pixels = family.patch * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        pruning = derive(recipe, config)
        inherited = _inherited(family, pruning, tensors)
        if inherited is None:
            return None
        return cls(teacher, family, index, scheduler, config, pixels, pruning, inherited)

    def remark(self) -> str | None:
        """What its family has to say of the teacher, if anything."""
        return self.family.remark(self.index, self.config, self.scheduler)

    def write(self, folder: Path) -> None:
        """Fill the folder of the student with a stock pipeline."""
        denoiser = folder / self.family.denoiser
        copy_parts(self.teacher, folder, but=[self.family.denoiser])
        denoiser.mkdir()
        write_text(denoiser / "config.json", self._written())
        copy_weights(denoiser, self.tensors)
        complete(folder, self.family, {})
        for name in self.family.tokenizers:
            if self.index[name][1] in _CLIP_TOKENIZERS and not (folder / name / "merges.txt").is_file():
                save_vocabulary(_tokenizer(folder / name), folder / name)

    def _written(self) -> str:
        """The config of the student's denoiser, as diffusers writes it."""
        made_by = {
            "_class_name": self.family.networks[self.family.denoiser],
            "_diffusers_version": version("diffusers"),
        }
        return json.dumps(self.pruning.student_config | made_by, indent=2, sort_keys=True) + "\n"


def _inherited(family: Family, pruning: Pruning, tensors: Mapping[str, Stored]) -> dict[str, Stored] | None:
    """The tensors of the student, by its names; None where its config does not tell which, or they fill several files.

    What is in which of these goes by an order that only the network knows.
    """
    shapes = family.shapes_of(pruning.student_config)
    if shapes is None:
        return None
    found = {name: tensors[pruning.teacher_key(name)] for name in shapes}
    for name, shape in shapes.items():
        assert found[name].shape == shape, f"{name}: {shape} from {found[name].shape}"
    return found if sum(tensor.size for tensor in found.values()) <= PIECE else None


def _whole(teacher: Path, family: Family, configs: Mapping[str, Config]) -> dict[str, Stored] | None:
    """The tensors of the denoiser, if all networks have those that their configs want, in their shapes."""
    found = {}
    for name in family.networks:
        weights = find_weights(teacher / name)
        found[name] = stored(weights.files if weights else ())
        wanted = family.shapes_of(configs[name], name)
        if wanted is None or not _has(_plainly_named(found[name], family.networks[name]), wanted):
            return None
    return found[family.denoiser]


def _has(tensors: Mapping[str, Stored], wanted: Shapes) -> bool:
    return all(
        name in tensors and tensors[name].shape == shape and tensors[name].dtype in _READ_FORMATS
        for name, shape in wanted.items()
    )


def _plainly_named(tensors: Mapping[str, Stored], kind: str) -> dict[str, Stored]:
    """The tensors of a network by the names that `Family.shapes_of` has for them."""
    if kind == "AutoencoderKL":
        return {_ATTENTION.sub(lambda old: _OLD_ATTENTION[old[0]], name): t for name, t in tensors.items()}
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def _is_usual(teacher: Path, family: Family, index: Config, scheduler: Config) -> bool:
    """Whether the parts that are no networks are known, and can be read.

    Raises:
        InputError: The scheduler is none that is known here.
    """
    parts = dict(named_parts(index))
    if not {*family.networks, *family.tokenizers, "scheduler"} <= parts.keys():
        return False
    check_scheduler({"_class_name": parts["scheduler"][1], **scheduler}, flows=family.by_flow)
    usual = scheduler.get("_class_name", parts["scheduler"][1]) == parts["scheduler"][1]
    for name, (_, kind) in parts.items():
        if name in family.tokenizers:
            usual &= kind in _CLIP_TOKENIZERS and _is_plain(teacher / name)
        elif name == "feature_extractor":
            usual &= kind in _EXTRACTORS and bool(read_json(teacher / name / "preprocessor_config.json"))
        else:
            usual &= name in (*family.networks, *_UNREAD, "scheduler")
    return bool(usual)


def _is_plain(folder: Path) -> bool:
    """Whether a tokenizer is one of CLIP's without words of several vectors, of which there may be more to say."""
    config = read_json(folder / "tokenizer_config.json")
    more = folder / "added_tokens.json"
    added = [str(token["content"]) for token in config.get("added_tokens_decoder", {}).values()]
    added += read_json(more) if more.is_file() else []
    added += [token.content for token in _tokenizer(folder).get_added_tokens_decoder().values()]
    return config.get("tokenizer_class", _CLIP_TOKENIZERS[0]) in _CLIP_TOKENIZERS and not saved_words(added)


def _tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        return Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # the library raises no narrower kind
        raise ValueError(f"{folder} cannot be read") from error
