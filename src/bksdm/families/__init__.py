"""Model families: what a recipe means for one kind of U-Net. Nothing above knows more than `derive`."""

from bksdm.errors import InputError
from bksdm.families import sd_unet
from bksdm.recipe import Config, Pruning, Recipe


def derive(recipe: Recipe, teacher_config: Config) -> Pruning:
    """What follows from `recipe` for a teacher with this U-Net config.

    Raises:
        InputError: The family is not known, or the teacher cannot satisfy the recipe.
    """
    reason = sd_unet.why_not(teacher_config)
    if reason:
        raise InputError(f"this U-Net cannot be pruned: {reason}; give a model shaped like Stable Diffusion 1.x or 2.x")
    return sd_unet.derive(recipe, teacher_config)
