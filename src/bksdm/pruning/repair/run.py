"""`bksdm prune --repair`: the student that is to be saved, corrected on captioned pictures."""

import math

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from bksdm.common.devices import choose_device
from bksdm.common.errors import InputError
from bksdm.common.progress import bar, say
from bksdm.common.prompts import cut_line
from bksdm.data.source import Source, spread
from bksdm.evaluate.output_error import probes
from bksdm.families import derive, family_of_pipeline
from bksdm.families.recipe import Recipe
from bksdm.models.configs import check_ready, load_denoiser_config
from bksdm.models.pipelines import check_text_to_image, cutting, denoiser, load_pipeline
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.inherit import prune_unet
from bksdm.pruning.repair.layers import Repair
from bksdm.pruning.repair.record import Repaired

_LATENTS_AT_ONCE = 2**15
_PICTURES_AT_ONCE = 32


def repair(options: PruneOptions, recipe: Recipe, source: Source) -> tuple[dict[str, Tensor], Repaired]:
    """The tensors of a student that differ from its teacher's once it is corrected, in float32, and what that did.

    Raises:
        InputError: An option, the teacher or the data are unfit, or the recipe removes nothing.
    """
    _check(options, recipe)
    teacher = load_pipeline(options.teacher).to(_device(options.device))
    check_text_to_image(teacher, options.teacher)
    entries = spread(source.pictures, options.repair_pictures)
    if line := cut_line([entry.text for entry in entries], cutting(teacher), "captions"):
        say(line)
    student, pruning = prune_unet(denoiser(teacher), recipe)
    asked = list(probes(teacher, entries, options.seed, _at_once(teacher)))
    work = Repair(denoiser(teacher), student, pruning, asked, options.ridge, options.seed)
    layers = []
    with bar(len(work.places), "layers") as progress:
        for residual in work.residuals():
            layers.append(residual)
            progress.advance()
    tensors = student.state_dict()
    return {name: tensors[name].cpu() for name in work.changed}, Repaired(len(entries), work.output, tuple(layers))


def _check(options: PruneOptions, recipe: Recipe) -> None:
    check_ready("prune", options.teacher, options={"repair": options.repair})
    if options.repair_pictures < 1:
        raise InputError(f"repair_pictures is {options.repair_pictures}; give at least 1, and better a few hundred")
    if not (math.isfinite(options.ridge) and options.ridge > 0):
        raise InputError(f"ridge is {options.ridge}; give a number above 0, such as 0.03")
    if not derive(recipe, load_denoiser_config(options.teacher)).removed:
        raise InputError(f"recipe {options.recipe} removes nothing, so there is nothing to repair; leave out --repair")


def _device(name: str) -> torch.device:
    device = choose_device(name)
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


def _at_once(teacher: DiffusionPipeline) -> int:
    """Pictures in a batch."""
    height, width = family_of_pipeline(teacher).latent_sides(denoiser(teacher).config)
    return max(1, min(_PICTURES_AT_ONCE, _LATENTS_AT_ONCE // (height * width)))
